"""From the results of routing.py to Markdown tables and plots."""

import statistics

from benchmarks.harness.records import Table
from benchmarks.harness.reporting import markdown_table, mean_and_spread, spread, write_markdown
from benchmarks.tasks.commonsense.scoring import standard_error
from peft_jactus.deployment.plots import light_and_dark

RATIOS = ("0.8", "0.6", "0.4")
METHODS = ("static uniform", "static global", "second order", "average", "routed")
# In the order of the tables.
DECOMPOSITIONS = ("asvd", "fwsvd", "jactus", "svd-llm", "svd")


def studies_of(blocks):
    """Return the fields of each kind of case, by name; the main one first."""
    changes = {
        "linear, broad": {},
        "two-layer, broad": {"router": "mlp"},
        "linear, novels alone": {"corpus": "novels"},
        "linear, all kinds": {"corpus": "all kinds"},
        "linear, three times all kinds": {"corpus": "all kinds", "blocks": 3 * blocks},
        "first block, broad": {"router": "first block"},
        "first block, all kinds": {"router": "first block", "corpus": "all kinds"},
        "first block, three times all kinds": {"router": "first block", "corpus": "all kinds", "blocks": 3 * blocks},
        "first block, three times all kinds, in rows of 128 tokens": {
            "router": "first block",
            "corpus": "all kinds",
            "blocks": 3 * blocks,
            "length": 128,
        },
        "linear, half of broad": {"blocks": blocks // 2},
        "linear, a quarter of broad": {"blocks": blocks // 4},
    }
    main = {"router": "linear", "corpus": "broad", "blocks": blocks, "length": None}
    return {name: main | change for name, change in changes.items()}


def results_of(folder, subject):
    """Return the table of all results of a subject."""
    return Table(
        folder / f"{file_name(subject)}.jsonl",
        key=("kind", "decomposition", "router", "corpus", "blocks", "pool", "seed", "length"),
    )


def file_name(subject):
    return "routing" if subject == "small" else f"routing-{subject}"


def corpora_of(results):
    """Return the texts that all results are scored on, in their order."""
    return list(results[0]["dense"])


def matching(results, **fields):
    return [result for result in results if all(result.get(name) == value for name, value in fields.items())]


def decompositions_of(results):
    """Return those that models were made with, static or routed."""
    found = {result["decomposition"] for result in results}
    return [name for name in DECOMPOSITIONS if name in found]


def values(results, decomposition, method, ratio, corpus, figure, study):
    """Return one number for each seed."""
    if method.startswith("static"):
        found = matching(results, kind="static", decomposition=decomposition)
        return [result[method.removeprefix("static ")][ratio][corpus][figure] for result in found]
    found = matching(results, kind="router", decomposition=decomposition, **study)
    largest = max((result["pool"] for result in found), default=None)
    found = matching(found, pool=largest)
    key = method.replace(" ", "_")
    return [result[key][ratio][corpus][figure] for result in found]


def cell(numbers, digits):
    return mean_and_spread(numbers, f".{digits}f") if numbers else ""


def main_table(results, study, figure, digits):
    """Return a row for each decomposition and method."""
    head = ["factors", "choice of ranks", *(f"{corpus} {ratio}" for corpus in corpora_of(results) for ratio in RATIOS)]
    rows = []
    for decomposition in decompositions_of(results):
        for method in METHODS:
            cells = [
                cell(values(results, decomposition, method, ratio, corpus, figure, study), digits)
                for corpus in corpora_of(results)
                for ratio in RATIOS
            ]
            if any(cells):
                rows.append([decomposition, method, *cells])
    return markdown_table(head, rows)


def studies_table(results, studies, decomposition, figure, digits):
    """Return a row for each kind of router and of corpus."""
    head = ["router", *(f"{corpus} {ratio}" for corpus in corpora_of(results) for ratio in RATIOS)]
    rows = []
    for name, study in studies.items():
        for method in ("average", "routed"):
            cells = [
                cell(values(results, decomposition, method, ratio, corpus, figure, study), digits)
                for corpus in corpora_of(results)
                for ratio in RATIOS
            ]
            if any(cells):
                rows.append([f"{name}: {method}", *cells])
    return markdown_table(head, rows)


def prompt_table(results):
    """Return what each router's choice by prompt changes, against its own for all prompts; of the largest pool."""
    by_case = {}
    for result in matching(results, kind="router"):
        case = (result["decomposition"], router_name(result))
        by_case.setdefault(case, []).append(result)
    columns = [(corpus, ratio) for corpus in corpora_of(results) for ratio in RATIOS]
    rows = []
    for case, found in by_case.items():
        largest = matching(found, pool=max(result["pool"] for result in found))
        rows.append([*case, *(change_by_prompt(largest, ratio, corpus) for corpus, ratio in columns)])
    return markdown_table(["factors", "router", *(" ".join(column) for column in columns)], rows)


def router_name(result):
    """Return what tables call a trained router."""
    cut = f" in rows of {result['length']} tokens" if "length" in result else ""
    return f"{result['router']}, {result['corpus']}, {result['blocks']} blocks{cut}"


def change_by_prompt(results, ratio, corpus):
    """Return the divergence of *routed* over that of *average*, less one, in percent, of all seeds together.

    With its standard error over blocks, where their divergences are known.
    """
    routed, average = ([result[kind][ratio][corpus] for result in results] for kind in ("routed", "average"))
    quotient = sum(of_seed["divergence"] for of_seed in routed) / sum(of_seed["divergence"] for of_seed in average)
    change = f"{100 * (quotient - 1):+.1f}"
    if not all("divergence_by_block" in of_seed for of_seed in (*routed, *average)):
        return change
    mine, theirs = (
        [statistics.mean(values) for values in zip(*(of_seed["divergence_by_block"] for of_seed in kind), strict=True)]
        for kind in (routed, average)
    )
    if len(mine) < 2:
        return change
    residuals = [one - quotient * other for one, other in zip(mine, theirs, strict=True)]
    error = statistics.stdev(residuals) / len(residuals) ** 0.5 / statistics.mean(theirs)
    return f"{change} ± {100 * error:.1f}"


def gain_table(results):
    """Return how near a trained router comes to choices that were optimised on the scored text itself."""
    head = ["factors", "active", "text", "average", "routed", "optimised on the scored text"]
    rows = [
        [result["decomposition"], ratio, corpus, *(f"{figures[kind]['divergence']:.4f}" for kind in figures)]
        for result in matching(results, kind="patterns")
        for ratio, by_corpus in result["gain"].items()
        for corpus, figures in by_corpus.items()
    ]
    return markdown_table(head, rows)


def accuracy_table(results):
    """Return a row for each router, active share and choice of ranks."""
    rows = []
    for result in results:
        found = dict(result["accuracy"])
        dense = found.pop("dense")
        described = [result["decomposition"], router_name(result)]
        rows.append([*described, "", "dense", f"{dense['accuracy']:.1f}", "", ""])
        for ratio, by_choice in found.items():
            for choice, scores in by_choice.items():
                differences = [
                    ""
                    if other is scores
                    else f"{scores['accuracy'] - other['accuracy']:+.1f} ± "
                    f"{standard_error([scores['sets']], [other['sets']]):.1f}"
                    for other in (dense, by_choice["average"])
                ]
                rows.append([*described, ratio, choice, f"{scores['accuracy']:.1f}", *differences])
    head = ["factors", "router", "active", "choice of ranks", "mean", "less dense", "less average"]
    return markdown_table(head, rows)


@light_and_dark()
def plot_shares(results, study, path):
    """Draw divergence from the dense model against the active share."""
    from matplotlib.figure import Figure

    decompositions = decompositions_of(results)
    figure = Figure(figsize=(3 * len(decompositions), 8 / 3 * len(corpora_of(results))), layout="constrained")
    corpora = corpora_of(results)
    axes = figure.subplots(len(corpora), len(decompositions), sharex=True, sharey="row", squeeze=False)
    for row, corpus in enumerate(corpora):
        for column, decomposition in enumerate(decompositions):
            axis = axes[row][column]
            for method in ("static uniform", "static global", "average", "routed"):
                lines = [
                    values(results, decomposition, method, ratio, corpus, "divergence", study) for ratio in RATIOS
                ]
                if all(lines):
                    means = [statistics.mean(line) for line in lines]
                    spreads = [spread(line) for line in lines]
                    axis.errorbar([float(ratio) for ratio in RATIOS], means, spreads, capsize=3, label=method)
            axis.set_yscale("log")
            axis.set_title(f"{decomposition}, {corpus}", fontsize=9)
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("active share of the dense parameters")
    figure.supylabel("divergence from the dense model, nats a token")
    figure.savefig(path, dpi=110)


@light_and_dark()
def plot_patterns(results, path):
    """Draw how patterns would change while decoding, and with the similarity of prompts."""
    from matplotlib.figure import Figure

    found = matching(results, kind="patterns")
    figure = Figure(figsize=(9, 3.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), result in zip(axes, found, strict=True):
        for ratio, by_corpus in result["decoding"].items():
            for corpus, line in by_corpus.items():
                left.plot(line["lengths"], line["overlap"], label=f"{corpus}, active {ratio}")
        left.set_title(f"{result['decomposition']}: choice for a longer text against that for its start", fontsize=9)
        left.set_xlabel("tokens")
        left.set_ylabel("overlap (Jaccard)")
        left.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        for ratio, bins in result["similarity"].items():
            points = [point for point in bins if point["pairs"] >= 20]
            right.plot([p["cosine"] for p in points], [p["overlap"] for p in points], label=f"active {ratio}")
        right.set_title(f"{result['decomposition']}: choices of two prompts", fontsize=9)
        right.set_xlabel("cosine of the router's inputs")
        right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def markdown(results, title, blocks):
    studies = studies_of(blocks)
    main = next(iter(studies.values()))
    dense = results[0]["dense"]
    pools = {}
    for name in DECOMPOSITIONS:
        shares = [result["pool"] for result in matching(results, kind="router", decomposition=name, **main)]
        pools |= {name: max(shares)} if shares else {}
    pool_line = ", ".join(f"{name} {share:g}" for name, share in pools.items())
    pool_line = f" Shares that are chosen from: {pool_line}." if pools else ""
    dense_line = ", ".join(f"{corpus} {dense[corpus]['perplexity']:.2f}" for corpus in corpora_of(results))
    parts = [
        f"# Ranks by prompt on {title} (`python -m benchmarks.parse.routing`)",
        f"Perplexity of the dense model: {dense_line}. Mean ± standard deviation over seeds of the router; static "
        "models have none. *second order*: the choice before training, the same for all prompts; *average*: the "
        "trained scores of the average prompt, the same for all; *routed*: the trained choice for each prompt. "
        f"The numbers in the head are active shares.{pool_line}",
    ]
    if matching(results, kind="static"):
        parts += [
            "## Divergence from the dense model, nats a token",
            main_table(results, main, "divergence", 4),
            "## Perplexity",
            main_table(results, main, "perplexity", 2),
        ]
    parts += [
        "## What the prompt adds: divergence of *routed* against *average*, %",
        "± is the standard error over blocks of text, where it is known; below zero, the choice by prompt is better.",
        prompt_table(results),
    ]
    for name in decompositions_of(results):
        if any(matching(results, kind="router", decomposition=name, **study) for study in list(studies.values())[1:]):
            parts += [
                f"## Kinds of routers and of corpora ({blocks} blocks of 256 tokens): divergence, {name} factors",
                studies_table(results, studies, name, "divergence", 4),
            ]
    return "\n\n".join([*parts, *further_parts(results)])


def further_parts(results):
    """Return what is in the report if it was run: how much there is to gain, and multiple choice."""
    parts = []
    if any(result["gain"] for result in matching(results, kind="patterns")):
        parts += [
            "## How much there is to gain: divergence on 16 blocks of each corpus, seed 0",
            gain_table(results),
        ]
    answered = matching(results, kind="accuracy")
    if answered:
        parts += [
            f"## Multiple choice, {answered[0]['questions']} questions of each of 7 sets",
            "Mean of the sets, %, by lm-evaluation-harness. Routed: by the question, without its endings. Differences "
            "with the standard error over questions, which are the same.",
            accuracy_table(answered),
        ]
    return parts


def write_report(folder, subject, title, blocks):
    """Write ``routing.md`` and two plots beside the table."""
    results, name = results_of(folder, subject).read(), file_name(subject)
    write_markdown(folder / f"{name}.md", markdown(results, title, blocks))
    if matching(results, kind="static"):
        plot_shares(results, next(iter(studies_of(blocks).values())), folder / f"{name}.png")
    if matching(results, kind="patterns"):
        plot_patterns(results, folder / f"{name}_patterns.png")
