"""From the table of results to Markdown and a plot."""

import math
import statistics
import textwrap

from benchmarks.compare.cases import METRIC, Case, budgets, results_of
from benchmarks.harness.reporting import markdown_table, mean_and_spread, spread, write_markdown
from benchmarks.tasks.commonsense.scoring import standard_error
from peft_jactus.deployment.plots import GREY, light_and_dark

# The row that the others' means are compared with, seed by seed.
REFERENCE = "dora"
# The same method, the same colour in every plot.
# JACTUS in blues, SVD-LLM in reds, full size in greys, violets, browns and olives.
COLORS = {
    "jactus pivoted": "#3a72b0",
    "jactus-embeddings pivoted": "#5f6fd0",
    "jactus-retained pivoted": "#17a2b8",
    "jactus-8-bits pivoted": "#1a8fa3",
    "jactus-4-bits pivoted": "#4a7fd0",
    "jactus-cores pivoted": "#0f8b8d",
    "lora+jactus-cores pivoted": "#6a86a8",
    "full+jactus-cores pivoted": "#7a74c8",
    "hira+jactus-cores pivoted": "#e08a1e",
    "jactus+lora pivoted": "#2f8f5b",
    "jactus+full pivoted": "#7a8a2a",
    "full+svd-llm+lora": "#d0572f",
    "svd-llm+full": "#d1495b",
    "svd+lora": "#3d8b3d",
    "svd-llm+lora": "#b04a4a",
    "lora+svd-llm+lora": "#b8651b",
    "full": GREY,
    "lora": "#9467bd",
    "lora-embeddings": "#bb6bd9",
    "dora": "#8c6d5a",
    "pissa": "#c2568f",
    "rslora": "#d19a3e",
    "eva": "#c9a3e0",
    "corda": "#b59a00",
    "lora-ga": "#6f7f2f",
    "hira": "#5a4636",
}
# Of methods with a single point each, in a plot; in points of the kept share.
POINT_DISTANCE = 1.0


def load_results(folder, kind):
    """Return the results that are reported: those of the table's rows, scored on the test split."""
    labels = {Case("", *budget).label for budget in budgets(kind)}
    results = results_of(folder, kind).read()
    return [result for result in results if result["scored_on"] == "test" and result["label"] in labels]


def score(result):
    """Return the task's metric in percent; of a language model, which has none, the perplexity."""
    if "accuracy" not in result:
        return math.exp(result["loss"])
    return 100 * result[METRIC.get(result["task"], "accuracy")]


def score_name(results):
    if not all("accuracy" in result for result in results):
        return "perplexity"
    others = sorted({(METRIC[result["task"]], result["task"]) for result in results if result["task"] in METRIC})
    return "accuracy" + "".join(f" ({metric} of {task})" for metric, task in others) + ", %"


def by_seed(results):
    """Return {label: {seed: {task: score}}}.

    Raises:
        ValueError: If two results differ in other settings only, a table has one of them; or if two methods had other
            rows of a task.
    """
    table, rows = {}, {}
    for result in results:
        found = (result["num_train_rows"], result["num_test_rows"])
        if rows.setdefault(result["task"], found) != found:
            raise ValueError(
                f"{result['label']} on {result['task']} has {found} rows (training, test), another method "
                f"{rows[result['task']]}; delete the results with old ones and run them again."
            )
        tasks = table.setdefault(result["label"], {}).setdefault(result["seed"], {})
        if result["task"] in tasks:
            raise ValueError(
                f"Two results of {result['label']} on {result['task']} with seed {result['seed']}; delete the one "
                "whose other settings (rows, epochs, rates) the table shall not have."
            )
        tasks[result["task"]] = score(result)
    return table


def means_over_tasks(seeds, tasks):
    """Return {seed: mean score} of the seeds that have all tasks."""
    return {seed: statistics.mean(s.values()) for seed, s in seeds.items() if len(s) == len(tasks)}


def mean_of_all_seeds(seeds, tasks, all_seeds):
    """Return the mean scores of the seeds, none if some are missing: seeds differ by more than methods do."""
    means = means_over_tasks(seeds, tasks)
    return list(means.values()) if set(means) == all_seeds else []


def markdown(results):
    """Return a row for each method: by task, over all tasks, and that mean less `REFERENCE`'s."""
    tasks = sorted({result["task"] for result in results})
    all_seeds = {result["seed"] for result in results}
    table = by_seed(results)
    reference = means_over_tasks(table.get(REFERENCE, {}), tasks)
    kept, trained = {}, {}
    for result in results:
        kept.setdefault(result["label"], []).append(result.get("retained_ratio_reached", 1.0))
        trained.setdefault(result["label"], []).append(result["trainable_parameters"])
    head = ["method", "kept", "trained", *tasks, "mean", f"less {REFERENCE}'s", "seeds"]
    rows = []
    for label, seeds in sorted(table.items(), key=lambda row: (-statistics.mean(kept[row[0]]), row[0])):
        cells = [
            mean_and_spread(s[task] for s in seeds.values() if task in s)
            if any(task in s for s in seeds.values())
            else ""
            for task in tasks
        ]
        whole = means_over_tasks(seeds, tasks)
        differences = [mean - reference[seed] for seed, mean in whole.items() if seed in reference]
        share = f"{100 * statistics.mean(kept[label]):.0f} %"
        means = mean_of_all_seeds(seeds, tasks, all_seeds)
        mean = f"**{mean_and_spread(means)}**" if means else ""
        difference = mean_and_spread(differences) if differences else ""
        millions = f"{statistics.mean(trained[label]) / 1e6:.2f}"
        rows.append([label, share, millions, *cells, mean, difference, f"{len(whole)} of {len(seeds)}"])
    explanation = (
        f"Mean and standard deviation over seeds of {score_name(results)}. A seed chooses the new head and the order "
        "of the batches; training and test rows are the same for all. A mean over tasks is there when all seeds "
        f"are; the difference from {REFERENCE}'s is taken seed by seed. Trained: millions of parameters."
    )
    return f"{explanation}\n\n{markdown_table(head, rows)}"


def sets_table(results):
    """Return a row for each method: its loss, its accuracy on each set, and the distance of that from `REFERENCE`'s.

    Args:
        results: Of a task that is several sets; methods are compared in the seeds that both have.
    """
    found, losses = {}, {}
    for result in results:
        found.setdefault(result["label"], {})[result["seed"]] = result["sets"]
        losses.setdefault(result["label"], []).append(result["loss"])
    names = list(results[0]["sets"])
    rows = []
    for label, seeds in found.items():
        accuracies = [statistics.mean(sets[name]["accuracy"] for sets in seeds.values()) for name in names]
        common = [seed for seed in seeds if seed in found.get(REFERENCE, {})]
        difference = ""
        if common and label != REFERENCE:
            mine, theirs = ([found[name][seed] for seed in common] for name in (label, REFERENCE))
            mean, reference = (
                statistics.mean(one["accuracy"] for sets in runs for one in sets.values()) for runs in (mine, theirs)
            )
            difference = f"{mean - reference:+.1f} ± {standard_error(mine, theirs):.1f}"
        cells = [*(f"{value:.1f}" for value in accuracies), f"**{statistics.mean(accuracies):.1f}**", difference]
        rows.append([label, f"{statistics.mean(losses[label]):.3f}", *cells, str(len(seeds))])
    questions = ", ".join(str(len(results[0]["sets"][name]["right"])) for name in names)
    explanation = (
        f"Loss: of a token of the right endings of {results[0]['num_test_rows']} test rows, nats. Accuracy on each "
        f"set, %; {questions} questions. Differences from {REFERENCE}'s mean: ± the standard error over questions, "
        "which are the same."
    )
    head = ["method", "loss", *names, "mean", f"less {REFERENCE}", "seeds"]
    return f"{explanation}\n\n{markdown_table(head, sorted(rows))}"


@light_and_dark()
def plot(results, path):
    """Draw scores against kept parameters, a line for each method that all seeds have, with the spread over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    tasks = {result["task"] for result in results}
    all_seeds = {result["seed"] for result in results}
    lines = {}
    for label, seeds in by_seed(results).items():
        means = mean_of_all_seeds(seeds, tasks, all_seeds)
        if not means:
            continue
        name, _, ratio = label.rpartition(" ")
        point = (100 * float(ratio) if name else 100.0, statistics.mean(means), spread(means))
        lines.setdefault(name or label, []).append(point)
    for name, points in side_by_side(lines):
        x, y, spreads = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, spreads, capsize=3, label=name, color=COLORS.get(name))
    axes.set_xlabel("kept of the targeted parameters, % (points of one share are side by side)")
    axes.set_ylabel(textwrap.fill(f"{score_name(results)}, mean over tasks", width=40))
    figure.legend(loc="outside right upper")  # lines may be anywhere within
    figure.savefig(path, dpi=150)


def side_by_side(lines):
    """Yield (name, points) by name; methods of a single point each have a place of their own around their share."""
    alone = {}
    for name, points in sorted(lines.items()):
        if len(points) == 1:
            alone.setdefault(points[0][0], []).append(name)
    for name, points in sorted(lines.items()):
        names = alone.get(points[0][0], [])
        shift = POINT_DISTANCE * (names.index(name) - (len(names) - 1) / 2) if name in names else 0.0
        yield name, [(share + shift, *rest) for share, *rest in points]


def write_report(folder, kind):
    """Write ``KIND.md`` and ``KIND.png`` beside the table."""
    results = load_results(folder, kind)
    parts = [markdown(results), *([sets_table(results)] if all("sets" in result for result in results) else [])]
    write_markdown(folder / f"{kind}.md", "\n\n".join(parts))
    plot(results, folder / f"{kind}.png")
