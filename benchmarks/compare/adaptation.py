"""How adaptation ranks are set: every variant and learning rate on held-out training rows, never on test rows.

    python -m benchmarks.compare.adaptation run                  # adaptation-text.jsonl; --tasks, --variants, --rates
    python -m benchmarks.compare.adaptation report               # adaptation-text.md

A variant is a `JactusConfig` with the fields below, compressed before the first step and trained in one pass; or LoRA,
at full size. Data, steps, head and schedule are those of `benchmarks.compare`. A result that is there is not computed
again.
"""

import itertools
import tempfile
from pathlib import Path

import transformers
from datasets import disable_progress_bars
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import set_seed

from benchmarks.compare.adapting import with_adapter
from benchmarks.compare.cases import EPOCHS, EPOCHS_BY_TASK, LEARNING_RATE_GROUPS
from benchmarks.compare.starts import HEAD_WARMUP_STEPS
from benchmarks.compare.training import make_trainer
from benchmarks.harness.arguments import add_data_dir, study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, Table
from benchmarks.harness.reporting import markdown_table, write_markdown
from benchmarks.tasks.loading import load_workload
from peft_jactus import JactusConfig, calibrate, rank_summary

TASKS = ("clinc150", "trec", "mr")
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
WARM = {"head_warmup_steps": HEAD_WARMUP_STEPS}
# By name: fields of the config, on top of the ratio, and of the call of `calibrate`. As in the paper: "core".
VARIANTS = {
    "lora": None,
    "core": {"adaptation_rank": 0},
    "gradient 32, warm head": {"adaptation_rank": 32, **WARM},  # the default
    "gradient 16, warm head": {"adaptation_rank": 16, **WARM},
    "gradient 64, warm head": {"adaptation_rank": 64, **WARM},
    "gradient 32": {"adaptation_rank": 32},
    "inputs 32, warm head": {"adaptation_rank": 32, "adaptation_init": "inputs", **WARM},
    "random 32, warm head": {"adaptation_rank": 32, "adaptation_init": "random", **WARM},
    "gradient 32, core, warm head": {"adaptation_rank": 32, "train_core": True, **WARM},
}


def parse_arguments():
    parser = study_parser(__doc__)
    parser.add_argument("command", choices=["run", "report"])
    add_data_dir(parser)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    rows = LEARNING_RATE_GROUPS["text"]["others"].num_rows
    parser.add_argument("--rows", type=int, default=rows, help="training rows at most")
    parser.add_argument("--out", type=Path, default=RESULTS / "compare", help="folder of the table")
    return parser.parse_args()


def table_in(folder):
    return Table(
        folder / "adaptation-text.jsonl",
        key=("task", "retained_ratio", "variant", "learning_rate", "seed", "num_rows", "epochs"),
    )


def cases(args):
    for seed, task, ratio, variant, rate in itertools.product(
        args.seeds, args.tasks, args.ratios, args.variants, args.rates
    ):
        yield {
            "task": task,
            "retained_ratio": 1.0 if VARIANTS[variant] is None else ratio,
            "variant": variant,
            "learning_rate": rate,
            "seed": seed,
            "num_rows": args.rows,
            "epochs": EPOCHS_BY_TASK.get(task, EPOCHS),
        }


def adapted(case, workload):
    """Return the model ready to train, and what it keeps of the targeted layers."""
    model = workload.make_model()
    fields = VARIANTS[case["variant"]]
    if fields is None:
        return with_adapter(model, "lora", workload), 1.0
    fields = dict(fields)
    warmup = fields.pop("head_warmup_steps", 0)
    config = JactusConfig(
        task_type=workload.task_type, target_modules="all-linear", retained_ratio=case["retained_ratio"], **fields
    )
    calibrate(model, config, workload.calibration_batches(), head_warmup_steps=warmup, progress_bar=False)
    model = get_peft_model(model, config)
    return model, rank_summary(model).retained_ratio


def run(case, args):
    """Train and score one case."""
    workload = load_workload("text", args.data_dir, case["task"], num_rows=args.rows, scored_on="held-out")
    set_seed(case["seed"])
    model, kept = adapted(case, workload)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model,
            workload,
            folder,
            learning_rate=case["learning_rate"],
            epochs=case["epochs"],
            seed=case["seed"],
        )
        seconds = trainer.train().metrics["train_runtime"]
        scores = trainer.evaluate()
    return {
        "retained_ratio_reached": kept,
        "loss": scores["eval_loss"],
        "accuracy": scores["eval_accuracy"],
        "train_seconds": seconds,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def markdown(results):
    """Return a table for each task and ratio: a row a variant, a column a rate."""
    sections = []
    for task, ratio in sorted({(result["task"], result["retained_ratio"]) for result in results}):
        found = [result for result in results if (result["task"], result["retained_ratio"]) == (task, ratio)]
        rates = sorted({result["learning_rate"] for result in found})
        rows = [
            [variant, *(cell(found, variant, rate) for rate in rates)]
            for variant in VARIANTS
            if any(result["variant"] == variant for result in found)
        ]
        head = [f"{task}, kept {ratio:g}", *(f"{rate:g}" for rate in rates)]
        sections.append(markdown_table(head, rows))
    introduction = (
        "Accuracy in percent, and loss, on held-out training rows, by learning rate. One training of MiniLM each; a "
        "standard error is about 1.3 points of accuracy."
    )
    return "\n\n".join([introduction, *sections])


def cell(results, variant, rate):
    found = [r for r in results if (r["variant"], r["learning_rate"]) == (variant, rate)]
    return "; ".join(f"{100 * result['accuracy']:.1f}, {result['loss']:.3f}" for result in found)


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    table = table_in(args.out)
    if args.command == "report":
        write_markdown(args.out / "adaptation-text.md", markdown(table.read()))
        return
    started_at = environment()  # the code that runs, whatever becomes of the files meanwhile
    for case in tqdm(list(cases(args)), unit="case"):
        if not table.contains(case):
            table.add({**case, **run(case, args), "environment": started_at})


if __name__ == "__main__":
    main()
