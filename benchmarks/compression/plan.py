"""The plan against what came out: the rise of the loss that `plan_ranks` expects, and the one that is measured.

    python -m benchmarks.compression.plan run       # plan-text.jsonl; --tasks and --seeds pick a part of it
    python -m benchmarks.compression.plan report    # plan-text.md and plan-text.png

MiniLM is fine-tuned as for `benchmarks.compression.loss`, calibrated on 16 batches of its training rows, planned for
several ratios from that one calibration, and compressed at each of them. Nothing is trained after that. The loss is
measured on the rows of the calibration and on test rows; the divergence from the dense model's predictions, too, is
what the loss rises by where labels follow these. A result that is there is not computed again.
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

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
REPORTED = (0.8, 0.6, 0.4)
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
    """Return a row for each ratio, and sizes and losses of the dense model."""
    scored, workload = (
        load_workload("text", args.data_dir, task, num_rows=args.rows, scored_on=split)
        for split in ("test", "held-out")
    )
    model = pretrained(workload, seed)
    seen = workload.calibration_batches()
    config = JactusConfig(task_type=workload.task_type, target_modules="all-linear")
    plan = plan_ranks(model, config, calibrate(model, config, seen, progress_bar=False), progress_bar=False)
    unseen = list(DataLoader(scored.test, BATCH_SIZE, collate_fn=scored.collator))
    seen_loss, _ = score(model, seen)
    unseen_loss, dense = score(model, unseen)
    rows = []
    for ratio in tqdm(RATIOS, desc=f"{task} {seed}"):
        at = plan.at(ratio)
        small = get_peft_model(copy.deepcopy(model), replace(config, retained_ratio=ratio)).eval()
        unseen_small, predictions = score(small, unseen)
        rows.append({
            "retained_ratio": ratio,
            "retained_ratio_reached": at.retained_ratio,
            "model_ratio": at.model_ratio,
            "num_bytes": at.num_bytes,
            "expected_rise": at.loss_rise,
            "calibration_rise": score(small, seen)[0] - seen_loss,
            "test_rise": unseen_small - unseen_loss,
            "divergence": float(kl_div(predictions, dense, log_target=True, reduction="batchmean")),
        })
    dense_model = {"num_bytes": plan.dense_bytes, "calibration_loss": seen_loss, "test_loss": unseen_loss}
    return {"dense": dense_model, "rows": rows}


def at_ratio(results, ratio, name):
    """Return a figure of all results at a ratio."""
    return [row[name] for result in results for row in result["rows"] if row["retained_ratio"] == ratio]


def markdown(results):
    """Return a table of the reported ratios, and how far the expected rise is from each measured one."""
    rows = []
    for ratio in REPORTED:
        expected = at_ratio(results, ratio, "expected_rise")
        cells = [
            f"{statistics.mean(at_ratio(results, ratio, 'model_ratio')):.0%}",
            f"{statistics.mean(at_ratio(results, ratio, 'num_bytes')) / 1e6:.1f}",
            mean_and_spread((1000 * rise for rise in expected), ".2f"),
        ]
        for name in MEASURED:
            measured = at_ratio(results, ratio, name)
            times = statistics.mean(expected) / statistics.mean(measured)
            cells.append(f"{mean_and_spread((1000 * rise for rise in measured), '.2f')} ({times:.2f})")
        rows.append([f"{ratio:g}", *cells])
    tasks = sorted({result["task"] for result in results})
    head = ["kept", "of the whole model", "MB", "expected rise", *MEASURED.values()]
    correlations = ", ".join(f"{text} {rank_correlation(results, name):.3f}" for name, text in MEASURED.items())
    return (
        f"MiniLM on {' and '.join(tasks)}, {len(results)} runs, right after compression; 1e-3 nats, mean and standard "
        "deviation over the runs. In brackets: the mean expected rise over the mean measured one.\n\n"
        f"{markdown_table(head, rows)}\n\n"
        f"Rank correlation of the expected rise over all runs and {len(RATIOS)} ratios with: {correlations}."
    )


def rank_correlation(results, name):
    """Return Spearman's correlation of the expected rise with a measured figure."""
    pairs = [(row["expected_rise"], row[name]) for result in results for row in result["rows"]]
    ranks = torch.tensor(pairs, dtype=torch.float64).argsort(0).argsort(0).double()
    return float(torch.corrcoef(ranks.mT)[0, 1])


def plot(results, path):
    """Draw rises against the kept share, and the measured against the expected ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_ratio, by_expected = figure.subplots(1, 2)
    means = {
        name: [statistics.mean(at_ratio(results, ratio, name)) for ratio in RATIOS]
        for name in ("expected_rise", *MEASURED)
    }
    by_ratio.semilogy(RATIOS, means["expected_rise"], "o-", color="black", label="expected by the plan")
    for name, text in MEASURED.items():
        by_ratio.semilogy(RATIOS, [mean if mean > 0 else float("nan") for mean in means[name]], "o--", label=text)
        points = [(row["expected_rise"], row[name]) for result in results for row in result["rows"] if row[name] > 0]
        by_expected.loglog(*zip(*points, strict=True), "o", markersize=3, label=text)
    by_ratio.set_xlabel("kept of the targeted layers' parameters")
    by_ratio.set_ylabel("nats, mean over runs")
    by_ratio.legend(fontsize="small")
    limits = by_expected.get_xlim()
    by_expected.loglog(limits, limits, color="gray", linewidth=1)
    by_expected.set_xlabel("expected by the plan, nats")
    by_expected.set_ylabel("measured, nats; a point a run and ratio")
    by_expected.legend(fontsize="small")
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
