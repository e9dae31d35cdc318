"""One picture of the three comparisons, for README: few methods, and colours for light and dark pages.

python -m benchmarks.compare.overview    # results/compare/overview.svg, from the committed tables
"""

import statistics
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.compare.cases import RATIOS
from benchmarks.compare.tables import COLORS, by_seed, load_results, mean_of_all_seeds
from benchmarks.harness.arguments import study_parser
from benchmarks.harness.records import RESULTS
from peft_jactus.deployment.plots import light_and_dark

PANELS = {
    "text": "8 text tasks\naccuracy, %",
    "vision": "4 image tasks\naccuracy, %",
    "language": "2 texts, lower is better\nperplexity",
}
# Label in the tables, name, and style or width of the line.
FULL_SIZE = (("full", "full fine-tuning", ":"), ("lora", "LoRA", "--"), ("dora", "DoRA", "-."))
COMPRESSED = (
    ("jactus pivoted", "JACTUS", 3),
    ("hira+jactus-cores pivoted", "HiRA, then JACTUS", 2),  # of texts only
    ("svd-llm+lora", "SVD-LLM, then LoRA", 1.5),
)
LEAST_SPAN = 5  # of an axis, so that tenths of a point look like what they are


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "compare", help="folder of the tables")
    return parser.parse_args()


def means(results):
    """Return {label: mean over tasks and seeds}."""
    tasks = {result["task"] for result in results}
    seeds = {result["seed"] for result in results}
    found = {label: mean_of_all_seeds(of_label, tasks, seeds) for label, of_label in by_seed(results).items()}
    return {label: statistics.mean(values) for label, values in found.items() if values}


def draw_panel(axes, title, found):
    for label, name, style in FULL_SIZE:
        axes.axhline(found[label], color=COLORS[label], linestyle=style, linewidth=1.5, label=f"{name}, 100 %")
    shares = [100 * ratio for ratio in RATIOS]
    for label, name, width in COMPRESSED:
        values = [found[key] for ratio in RATIOS if (key := f"{label} {ratio:g}") in found]
        if values:
            axes.plot(shares, values, color=COLORS[label], linewidth=width, label=name)
    middle, span = statistics.mean(axes.get_ylim()), axes.get_ylim()[1] - axes.get_ylim()[0]
    axes.set_ylim(middle - max(span, LEAST_SPAN) / 2, middle + max(span, LEAST_SPAN) / 2)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(shares)
    axes.set_xlim(85, 35)
    axes.spines[["top", "right"]].set_visible(False)


@light_and_dark()
def plot(folder):
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        draw_panel(axes, title, means(load_results(folder, kind)))
    figure.supxlabel("kept of the linear layers, %", fontsize=10)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=9)
    return figure


def main():
    folder = parse_arguments().out
    # The same file from the same tables, whenever it is drawn.
    with mpl.rc_context({"svg.hashsalt": "peft-jactus"}):
        plot(folder).savefig(folder / "overview.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
