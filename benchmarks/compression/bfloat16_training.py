"""Training all of a compressed checkpoint with bfloat16: is it finite, and does its loss follow that of float32?

    python -m benchmarks.compression.bfloat16_training
    python -m benchmarks.compression.bfloat16_training --task novels --learning-rate 2e-5 1e-4
    JACTUS_LLAMA=outputs/smollm2 python -m benchmarks.compression.bfloat16_training --task wikitext2 \\
        --learning-rate 2e-5 --batch-size 1 --models dense pivoted    # an hour

A Llama (JACTUS_LLAMA; by default the small one), compressed to 0.8 without training, and the dense one beside it; each
is fine-tuned whole by the Trainer, on the same rows in the same order: in float32; in mixed precision (`bf16=True`:
weights in float32, products in bfloat16); and with its weights in bfloat16, too. What counts is the mean loss of every
20 steps.
"""

import copy
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from peft import get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from benchmarks.harness.arguments import add_data_dir, study_parser
from benchmarks.harness.environment import environment
from benchmarks.harness.records import RESULTS, write_document
from benchmarks.tasks.language import LLAMA
from benchmarks.tasks.loading import load_workload
from peft_jactus import JactusConfig, calibrate, export_compressed

MODELS = ("dense", "pivoted", "factored")
# Of each way to train: the dtype of the weights, and whether products are in bfloat16 all the same.
PRECISIONS = {"float32": ("float32", False), "mixed": ("float32", True), "bfloat16": ("bfloat16", False)}


def parse_arguments():
    parser = study_parser(__doc__)
    add_data_dir(parser)
    parser.add_argument("--task", default="ptb")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[2e-5, 4e-4])
    parser.add_argument("--retained-ratio", type=float, default=0.8)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path, help="default: results/compression/bfloat16_training-TASK.json")
    args = parser.parse_args()
    args.out = args.out or RESULTS / "compression" / f"bfloat16_training-{args.task}.json"
    return args


def save_models(args, workload, folder):
    """Write the dense model and the compressed ones, in float32; return their folders by name."""
    set_seed(0)
    dense = workload.make_model()
    config = JactusConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=args.retained_ratio, adaptation_rank=0
    )
    found = calibrate(dense, config, workload.calibration_batches()[:4], progress_bar=False)
    dense.save_pretrained(folder / "dense")
    for storage in (name for name in args.models if name != "dense"):
        config = JactusConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            retained_ratio=args.retained_ratio,
            adaptation_rank=0,
            storage=storage,
        )
        config.statistics = found
        export_compressed(get_peft_model(copy.deepcopy(dense), config), folder / storage, progress_bar=False)
    return {name: folder / name for name in args.models}


def losses_of(source, workload, args, learning_rate, precision):
    """Fine-tune all of a model; return the mean loss of every 20 steps, and whether all parameters are finite."""
    dtype, is_mixed = PRECISIONS[precision]
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=learning_rate,
            bf16=is_mixed,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=workload.train, data_collator=workload.collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return logged, all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    warnings.simplefilter("ignore", UserWarning)
    started_at = environment()
    workload = load_workload(
        "language", args.data_dir, args.task, num_rows=args.steps * args.batch_size, scored_on="test"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = save_models(args, workload, Path(folder))
        for rate in args.learning_rate:
            for name, place in models.items():
                row = {"model": name, "learning_rate": rate}
                for precision in PRECISIONS:
                    losses, row[f"{precision}_is_finite"] = losses_of(place, workload, args, rate, precision)
                    row[precision] = losses
                    pairs = zip(row["float32"], losses, strict=True)
                    row[f"{precision}_largest_difference"] = max(abs(loss / wide - 1) for wide, loss in pairs)
                    print(name, rate, precision, row[f"{precision}_largest_difference"], losses, flush=True)
                rows.append(row)
    settings = {name: getattr(args, name) for name in ("task", "steps", "batch_size", "retained_ratio")}
    write_document(args.out, {"model": Path(LLAMA).name, **settings, "rows": rows, "environment": started_at})


if __name__ == "__main__":
    main()
