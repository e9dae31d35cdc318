"""From the scores of a real Llama right after compression to Markdown and a plot."""

from benchmarks.compare.cases import RATIOS
from benchmarks.compression.loss_tables import AS_USED, DECOMPOSITIONS
from benchmarks.harness.records import Table
from benchmarks.harness.reporting import markdown_table, write_markdown
from benchmarks.tasks.commonsense.scoring import standard_error
from peft_jactus.deployment.plots import GREY, light_and_dark

CASE = ("decomposition", "retained_ratio", "storage", "allocation", "tokens", "dtype", "is_deployed")
OFF_THE_SCALE = 50  # times the dense model's perplexity
# Figures of other models, as their papers have them: of another size, and by other protocols.
QUOTED = (
    "Quoted, not run here: Llama-3.1-8B at 0.8, wikitext2 perplexity and mean of seven tasks: ZS-SVD 9.78 and 60.9 %, "
    "SVD-LLM 14.8, ASVD 2011 (LowRankArena's protocol)."
)


def results_of(folder):
    """Return the table of the results; a case has a line for each score."""
    return Table(folder / "llama.jsonl", key=("model", *CASE, "score"))


def load_scores(folder):
    """Return {fields of `CASE`: {score: record}}."""
    found = {}
    for record in results_of(folder).read():
        found.setdefault(tuple(record[name] for name in CASE), {})[record["score"]] = record
    return found


def figures(scores):
    """Return {name: value} of one case: perplexities, and mean accuracy in percent; what is not there is left out."""
    found = dict(scores["perplexity"]["perplexity"]) if "perplexity" in scores else {}
    if "multiple choice" in scores:
        found["accuracy"] = scores["multiple choice"]["accuracy"]
    return found


# -- tables -----------------------------------------------------------------------------------------------


def line(head, scores, dense):
    """Return the cells of one case; accuracy with the standard error of its distance from the dense model's."""
    found = figures(scores)
    accuracy = f"{found['accuracy']:.1f}" if "accuracy" in found else ""
    if accuracy and scores is not dense and "multiple choice" in dense:
        mine, reference = ([each["multiple choice"]["sets"]] for each in (scores, dense))
        accuracy += f" ± {standard_error(mine, reference):.1f}"
    return [*head, *(perplexity_cell(found.get(name)) for name in ("wikitext2", "ptb")), accuracy]


def perplexity_cell(value):
    if value is None:
        return ""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.0e}"


def dense_of(found, dtype):
    return found[("dense", 1.0, "factored", "uniform", 0, dtype, False)]


def markdown(found, table_tokens):
    """Return the main table, then every way."""
    records = [record for scores in found.values() for record in scores.values()]
    blocks = {f"{record['blocks']} blocks" for record in records if "blocks" in record}
    questions = {f"{record['questions']} questions" for record in records if "questions" in record}
    protocol = [f"perplexity of {each} of 256 tokens of each corpus" for each in sorted(blocks)]
    protocol += [
        f"multiple choice by lm-evaluation-harness, {each} of each set, ± the standard error of the distance from the "
        "dense model on the same questions"
        for each in sorted(questions)
    ]
    dense = dense_of(found, "bfloat16")
    head = ["kept", "decomposition", "wikitext2", "ptb", "mean of 7 sets, %"]
    rows = [line(["100 %", "dense"], dense, dense)]
    for ratio in RATIOS:
        for name in DECOMPOSITIONS:
            key = (name, ratio, *AS_USED[name], table_tokens, "bfloat16", False)
            if key in found:
                rows.append(line([f"{ratio:.0%}".replace("%", " %"), name], found[key], dense))
    every = [
        line([str(cell) for cell in key], scores, dense_of(found, key[5])) for key, scores in sorted(found.items())
    ]
    return "\n\n".join([
        f"{records[0]['model']} right after compression, nothing trained: {'; '.join(protocol)}. Calibrated on "
        f"{table_tokens:,} tokens of wikitext2's validation split; bfloat16. JACTUS as it is by default (pivoted, "
        "global ranks), peers as published (factored, uniform ranks).",
        markdown_table(head, rows),
        QUOTED,
        "Every case:",
        markdown_table([*CASE, *head[2:]], every),
    ])


def points_of(found, decomposition, table_tokens, name):
    """Return {kept share in percent: value} of a decomposition as it is used, where it was measured."""
    keys = {r: (decomposition, r, *AS_USED[decomposition], table_tokens, "bfloat16", False) for r in RATIOS}
    values = {100 * r: figures(found[key]).get(name) for r, key in keys.items() if key in found}
    return {share: value for share, value in values.items() if value is not None}


def draw_panel(axes, found, table_tokens, name):
    """Draw a corpus, or the accuracy; perplexities far from the dense model's are named, and not drawn."""
    dense = figures(dense_of(found, "bfloat16")).get(name)
    missing = []
    for decomposition in DECOMPOSITIONS:
        points = points_of(found, decomposition, table_tokens, name)
        if name != "accuracy" and points and min(points.values()) > OFF_THE_SCALE * dense:
            missing.append(decomposition)
        axes.plot(list(points), list(points.values()), label=decomposition)
    if dense is not None:
        axes.axhline(dense, color=GREY, linestyle="--", label="dense")
    axes.set_xlabel("kept of the targeted parameters, %")
    axes.set_ylabel("mean of 7 sets, %" if name == "accuracy" else f"perplexity on {name}")
    if name != "accuracy" and dense is not None:
        axes.set_yscale("log")
        axes.set_ylim(0.85 * dense, OFF_THE_SCALE * dense)
    axes.set_title(f"off the scale: {', '.join(missing)}" if missing else " ", fontsize=9)
    axes.grid(visible=True, alpha=0.3)


@light_and_dark()
def plot(found, table_tokens, path):
    """Draw perplexity of each corpus, and accuracy, against the kept share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("wikitext2", "ptb", "accuracy"), strict=True):
        draw_panel(axes, found, table_tokens, name)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=120)


def write_report(folder, table_tokens):
    """Write ``llama.md`` and ``llama.png`` beside the table."""
    found = load_scores(folder)
    write_markdown(folder / "llama.md", markdown(found, table_tokens))
    plot(found, table_tokens, folder / "llama.png")
