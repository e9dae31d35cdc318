"""The plan against what came out: the rise of the loss that `plan_ranks` expects, and the one that is measured.

    python -m benchmarks.compression.plan run       # plan-text.jsonl; --tasks and --seeds pick a part of it
    python -m benchmarks.compression.plan report    # plan-text.md and plan-text.png

MiniLM is fine-tuned as for `benchmarks.compression.loss`, calibrated on 16 batches, planned for several ratios from
that one calibration, and compressed at each of them. Nothing is trained after that. This is done twice: with batches
of its training rows, as most users calibrate, and with batches of rows that it has not seen. The loss is measured on
the rows of the calibration and on test rows. The divergence from the dense model's predictions is what the loss rises
by where labels follow these. A result that is there is not computed again.
"""

import copy
import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from peft import get_peft_model
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from benchmarks.compare.cases import SEEDS
from benchmarks.compression.loss import BATCH_SIZE, ROWS, TASKS, log_probabilities, pretrained
from benchmarks.harness.arguments import add_data_dir, study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, Table
from benchmarks.harness.reporting import markdown_table, mean_and_spread, write_markdown
from benchmarks.tasks.loading import load_workload
from peft_jactus import JactusConfig, calibrate, plan_ranks
from peft_jactus.deployment.plots import GREY, light_and_dark

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
REPORTED = (0.8, 0.6, 0.4)
# Rows of the calibration: those that the model was trained on, or training rows that were held out.
CALIBRATIONS = ("training", "held-out")
# What is compared with the expected rise, by its name in the results.
MEASURED = {
    "calibration_rise": "rise on the calibration rows",
    "test_rise": "rise on test rows",
    "divergence": "divergence on test rows",
}


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("command", choices=["run", "report"])
    add_data_dir(parser)
    parser.add_argument("--tasks", nargs="+", default=TASKS["text"])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows at most")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression", help="folder of the table")
    return parser.parse_args()


@torch.no_grad()
def score(model, batches):
    """Return the mean loss of a row, and the logarithms of the predicted probabilities."""
    losses, predictions = [], []
    for batch in batches:
        output = model(**batch)
        losses.append(float(output.loss) * len(batch["labels"]))
        predictions.append(log_probabilities(output))
    return sum(losses) / sum(map(len, predictions)), torch.cat(predictions)


def measure(args, task, seed):
    """Return losses of the dense model, and a row for each calibration and ratio."""
    scored, workload = (
        load_workload("text", args.data_dir, task, num_rows=args.rows, scored_on=split)
        for split in ("test", "held-out")
    )
    model = pretrained(workload, seed)
    test = list(DataLoader(scored.test, BATCH_SIZE, collate_fn=scored.collator))
    test_loss, dense = score(model, test)
    rows = []
    for calibrated_on in CALIBRATIONS:
        held_out = replace(workload, train=workload.test)
        batches = (workload if calibrated_on == "training" else held_out).calibration_batches()
        config = JactusConfig(task_type=workload.task_type, target_modules="all-linear", adaptation_rank=0)
        plan = plan_ranks(model, config, calibrate(model, config, batches, progress_bar=False), progress_bar=False)
        calibration_loss, _ = score(model, batches)
        for ratio in tqdm(RATIOS, desc=f"{task} {seed} {calibrated_on}"):
            at = plan.at(ratio)
            small = get_peft_model(copy.deepcopy(model), replace(config, retained_ratio=ratio)).eval()
            small_test_loss, predictions = score(small, test)
            rows.append({
                "calibrated_on": calibrated_on,
                "retained_ratio": ratio,
                "retained_ratio_reached": at.retained_ratio,
                "model_ratio": at.model_ratio,
                "num_bytes": at.num_bytes,
                "expected_rise": at.loss_rise,
                "calibration_rise": score(small, batches)[0] - calibration_loss,
                "test_rise": small_test_loss - test_loss,
                "divergence": float(kl_div(predictions, dense, log_target=True, reduction="batchmean")),
            })
    return {"dense": {"num_bytes": plan.dense_bytes, "test_loss": test_loss}, "rows": rows}


def figures(results, calibrated_on, name, ratio=None):
    """Return a figure of all runs, at one ratio or at all of them."""
    return [
        row[name]
        for result in results
        for row in result["rows"]
        if row["calibrated_on"] == calibrated_on and ratio in (None, row["retained_ratio"])
    ]


def markdown(results):
    """Return a table of the reported ratios, and how far the expected rise is from each measured one."""
    tasks = sorted({result["task"] for result in results})
    head = ["calibrated on", "kept", "of the whole model", "MB", "expected rise", *MEASURED.values()]
    rows = [table_row(results, *key) for key in itertools.product(CALIBRATIONS, REPORTED)]
    correlations = [
        f"- {calibrated_on} rows: "
        + ", ".join(
            f"{rank_correlation(results, calibrated_on, name):.3f} with the {text}" for name, text in MEASURED.items()
        )
        for calibrated_on in CALIBRATIONS
    ]
    return (
        f"MiniLM on {' and '.join(tasks)}, {len(results)} runs, right after compression; 1e-3 nats, mean and standard "
        "deviation over the runs. In brackets: the mean expected rise over the mean measured one.\n\n"
        f"{markdown_table(head, rows)}\n\n"
        f"Rank correlation of the expected rise over all runs and {len(RATIOS)} ratios, calibrated on\n\n"
        + "\n".join(correlations)
    )


def table_row(results, calibrated_on, ratio):
    def of(name):
        return figures(results, calibrated_on, name, ratio)

    def cell(name):
        measured = statistics.mean(of(name))
        times = f" ({statistics.mean(of('expected_rise')) / measured:.2f})" if measured > 0 else ""
        return f"{in_thousandths(of(name))}{times}"

    size = [f"{statistics.mean(of('model_ratio')):.0%}", f"{statistics.mean(of('num_bytes')) / 1e6:.1f}"]
    return [f"{calibrated_on} rows", f"{ratio:g}", *size, in_thousandths(of("expected_rise")), *map(cell, MEASURED)]


def in_thousandths(values):
    return mean_and_spread((1000 * value for value in values), ".2f")


def rank_correlation(results, calibrated_on, name):
    """Return Spearman's correlation of the expected rise with a measured figure."""
    pairs = torch.tensor([figures(results, calibrated_on, figure) for figure in ("expected_rise", name)])
    return float(torch.corrcoef(pairs.argsort(1).argsort(1).double())[0, 1])


@light_and_dark()
def plot(results, path):
    """Draw rises against the kept share, for each calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, calibrated_on in zip(figure.subplots(1, 2, sharey=True), CALIBRATIONS, strict=True):
        for name, text in {"expected_rise": "expected by the plan", **MEASURED}.items():
            means = [statistics.mean(figures(results, calibrated_on, name, ratio)) for ratio in RATIOS]
            style = {"color": GREY, "linestyle": "-"} if name == "expected_rise" else {"linestyle": "--"}
            axes.semilogy(RATIOS, [mean if mean > 0 else float("nan") for mean in means], label=text, **style)
        axes.set_title(f"calibrated on {calibrated_on} rows")
        axes.set_xlabel("kept of the targeted layers' parameters")
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].set_ylabel("nats, mean over runs")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    table = Table(args.out / "plan-text.jsonl", key=("task", "num_rows", "seed"))
    if args.command == "report":
        results = table.read()
        write_markdown(args.out / "plan-text.md", markdown(results))
        plot(results, args.out / "plan-text.png")
        return
    started_at = environment()  # the code that runs, whatever becomes of the files meanwhile
    for seed, task in itertools.product(args.seeds, args.tasks):
        case = {"task": task, "seed": seed, "num_rows": args.rows}
        if not table.contains(case):
            table.add({**case, **measure(args, task, seed), "environment": started_at})


if __name__ == "__main__":
    main()
