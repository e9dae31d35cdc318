"""From the losses right after compression to Markdown and a plot."""

import itertools
import statistics

from benchmarks.compare.cases import RATIOS, STORAGES
from benchmarks.harness.records import Table
from benchmarks.harness.reporting import markdown_table, mean_and_spread, write_markdown
from peft_jactus.deployment.plots import light_and_dark

DECOMPOSITIONS = ("jactus", "kfac", "svd-llm", "asvd", "fwsvd", "svd")
ALLOCATIONS = ("global", "uniform")
# How a decomposition is used: JACTUS by its defaults, a peer as published.
AS_USED = {name: ("pivoted", "global") if name == "jactus" else ("factored", "uniform") for name in DECOMPOSITIONS}


def results_of(folder, kind):
    """Return the table of a kind's results."""
    return Table(folder / f"loss-{kind}.jsonl", key=("task", "num_rows", "seed"))


def load_results(folder, kind):
    """Return the results; seeds that do not have all tasks are left out.

    Raises:
        ValueError: If two are of the same task and seed.
    """
    table = results_of(folder, kind)
    results = table.read()
    if len({(result["task"], result["seed"]) for result in results}) < len(results):
        raise ValueError(
            f"{table.path} has two results of one task and seed; delete the one that the table shall not have."
        )
    tasks = {result["task"] for result in results}
    complete = {seed for seed in seeds(results) if {r["task"] for r in results if r["seed"] == seed} == tasks}
    return [result for result in results if result["seed"] in complete]


def seeds(results):
    return sorted({result["seed"] for result in results})


def means_by_seed(results):
    """Return {(decomposition, storage, allocation, retained ratio): {figure: [mean over tasks for each seed]}}.

    To the figures comes the ``increase``: the loss less that of the dense model of the same run.
    """
    found = {}
    for result in results:
        dense = result["rows"][0]
        for row in result["rows"]:
            key = tuple(row.get(name) for name in ("decomposition", "storage", "allocation", "retained_ratio"))
            figures = {name: row[name] for name in ("loss", "divergence")}
            figures["increase"] = row["loss"] - dense["loss"]
            for name, figure in figures.items():
                found.setdefault(key, {}).setdefault(name, {}).setdefault(result["seed"], []).append(figure)
    return {
        key: {name: [statistics.mean(of_seed) for of_seed in by_seed.values()] for name, by_seed in figures.items()}
        for key, figures in found.items()
    }


# Name, format and factor; on images much of the increase is below 1e-5.
FIGURES = {
    "increase": ("loss over the dense model's, 1e-3", "+.3f", 1000),
    "divergence": ("divergence", ".2e", 1),
}


def markdown(results):
    """Return increase of the loss, and divergence: of each as it is used, then in every way to use it."""
    found = means_by_seed(results)
    lines = [introduction(results), ""]
    lines += ["JACTUS as it is by default (pivoted, global ranks), peers as published (factored, uniform ranks):"]
    for figure, (name, *_) in FIGURES.items():
        rows = [
            [f"{ratio:g}", *(cell(found[(peer, *AS_USED[peer], ratio)], figure) for peer in DECOMPOSITIONS)]
            for ratio in RATIOS
        ]
        lines += ["", markdown_table([f"{name} at", *DECOMPOSITIONS], rows)]
    lines += ["", "Every one in every storage, with both allocations:"]
    columns = list(itertools.product(STORAGES, ALLOCATIONS))
    for figure, (name, *_) in FIGURES.items():
        rows = [
            [f"{ratio:g}", peer, *(cell(found[(peer, *column, ratio)], figure) for column in columns)]
            for ratio, peer in itertools.product(RATIOS, DECOMPOSITIONS)
        ]
        lines += ["", markdown_table(["kept", name, *map(" ".join, columns)], rows)]
    return "\n".join(lines)


def introduction(results):
    dense = {}
    for result in results:
        dense.setdefault(result["task"], []).append(result["rows"][0]["loss"])
    losses = ", ".join(f"{task} {mean_and_spread(of_seeds, '.3f')}" for task, of_seeds in sorted(dense.items()))
    return (
        f"Mean over {len(dense)} tasks; ± is the standard deviation over {len(seeds(results))} seeds. Loss of the "
        f"dense model: {losses}. Divergence: of a prediction from the dense model's, in nats; it is what the loss "
        "goes up by where labels follow the dense model's predictions."
    )


def cell(of_seeds, figure):
    _, form, factor = FIGURES[figure]
    return mean_and_spread((factor * value for value in of_seeds[figure]), form)


@light_and_dark()
def plot(results, path):
    """Draw the divergence against kept parameters, a line for each decomposition as it is used."""
    from matplotlib.figure import Figure

    found = means_by_seed(results)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in DECOMPOSITIONS:
        divergences = [statistics.mean(found[(name, *AS_USED[name], ratio)]["divergence"]) for ratio in RATIOS]
        axes.semilogy([100 * ratio for ratio in RATIOS], divergences, label=name)
    axes.set_xlabel("kept of the targeted parameters, %")
    axes.set_ylabel("divergence from the dense model right after compression")
    axes.legend()
    figure.savefig(path, dpi=150)


def write_report(folder, kind):
    """Write ``loss-KIND.md`` and ``loss-KIND.png`` beside the table."""
    results = load_results(folder, kind)
    write_markdown(folder / f"loss-{kind}.md", markdown(results))
    plot(results, folder / f"loss-{kind}.png")
