"""Text classification with MiniLM: LoRA at full size against JACTUS at a retained ratio, same Trainer and budget.

    python benchmarks/text_classification.py --data-dir ../shared/data/trec --method jactus --seeds 0 1 2

One JSON for each case lies under ``benchmarks/results/text_classification``; a case whose file exists is skipped, so
that a run can be stopped and resumed. ``--report`` turns the files into a Markdown table.
Learning rates are chosen with ``--validation``, which trains on 90 % of the training rows and scores on the others.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from _environment import environment, write_result
from _text import MAX_LENGTH, MINILM
from _training import accuracy, training_arguments
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

from peft_jactus import JactusConfig, calibrate, rank_summary


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("JACTUS_DATA", "../shared/data") + "/trec")
    parser.add_argument("--method", choices=["lora", "jactus"], default="jactus")
    parser.add_argument("--retained-ratio", type=float, nargs="+", default=[0.8])
    parser.add_argument("--storage", choices=["factored", "pivoted"], default="pivoted")
    parser.add_argument("--allocation", choices=["global", "uniform"], default="global")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-train-samples", type=int, help="default: all rows")
    parser.add_argument("--calibration-batches", type=int, default=16)
    parser.add_argument("--head-warmup-steps", type=int, default=0)
    parser.add_argument(
        "--validation",
        action="store_true",
        help="hold out 10 %% of the training rows and score there",
    )
    parser.add_argument("--config", type=json.loads, default={}, help="further JactusConfig fields, as JSON")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "text_classification")
    parser.add_argument("--report", action="store_true", help="print the table of the results and stop")
    return parser.parse_args(arguments)


def load_splits(data_dir, tokenizer, *, validation, max_rows):
    data = load_dataset("parquet", data_dir=data_dir)
    columns = ["text", "text_pair"] if "text_pair" in data["train"].column_names else ["text"]
    train, test = data["train"], data.get("test", data.get("validation"))
    if validation:
        parts = train.train_test_split(test_size=0.1, seed=0)
        train, test = parts["train"], parts["test"]

    if max_rows is not None:
        train = train.shuffle(seed=0).select(range(max_rows))

    def encode(batch):
        encoded = tokenizer(*(batch[column] for column in columns), truncation=True, max_length=MAX_LENGTH)
        return {**encoded, "labels": batch["label"]}

    num_labels = train.features["label"].num_classes
    drop = train.column_names
    return (
        train.map(encode, batched=True, remove_columns=drop),
        test.map(encode, batched=True, remove_columns=drop),
        num_labels,
    )


def adapt(model, args, ratio, train, collator):
    """Wrap the model for the method; return it and what that took."""
    started = time.perf_counter()
    if args.method == "lora":
        config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=16, lora_alpha=32)
        return get_peft_model(model, config), {}
    config = JactusConfig(
        task_type="SEQ_CLS",
        target_modules="all-linear",
        retained_ratio=ratio,
        storage=args.storage,
        allocation=args.allocation,
        **args.config,
    )
    loader = torch.utils.data.DataLoader(train, args.batch_size, shuffle=True, collate_fn=collator)
    calibrate(
        model,
        config,
        loader,
        max_batches=args.calibration_batches,
        head_warmup_steps=args.head_warmup_steps,
    )
    calibrated = time.perf_counter()
    model = get_peft_model(model, config)
    summary = rank_summary(model)
    return model, {
        "calibration_seconds": calibrated - started,
        "factorization_seconds": time.perf_counter() - calibrated,
        "retained_ratio_reached": summary.retained_ratio,
        "dense_layers": sum(row.stays_dense for row in summary.rows),
    }


def run_case(args, ratio, seed):
    """Train and score one case; return the trained model, its test set and collator, and the figures."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    train, test, num_labels = load_splits(
        args.data_dir, tokenizer, validation=args.validation, max_rows=args.max_train_samples
    )
    model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=num_labels)
    collator = DataCollatorWithPadding(tokenizer)
    model, case = adapt(model, args, ratio, train, collator)
    case["trainable_parameters"] = model.get_nb_trainable_parameters()[0]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=training_arguments(
                folder,
                learning_rate=args.learning_rate,
                epochs=args.epochs,
                seed=seed,
                batch_size=args.batch_size,
                train_sampling_strategy="group_by_length",
            ),
            train_dataset=train,
            eval_dataset=test,
            data_collator=collator,
            compute_metrics=accuracy,
        )
        case["train_seconds"] = trainer.train().metrics["train_runtime"]
        case["accuracy"] = trainer.evaluate()["eval_accuracy"]
    return model, test, collator, case


def settings_of(args, ratio, seed):
    settings = {
        "task": Path(args.data_dir).name,
        "model": "all-MiniLM-L6-v2",
        "method": args.method,
        "learning_rate": args.learning_rate,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "max_train_samples": args.max_train_samples,
        "seed": seed,
        "scored_on": "held-out training rows" if args.validation else "test",
    }
    if args.method == "jactus":
        settings |= {
            "retained_ratio": ratio,
            "storage": args.storage,
            "allocation": args.allocation,
            "calibration_batches": args.calibration_batches,
            "head_warmup_steps": args.head_warmup_steps,
            **args.config,
        }
    return settings


def file_name(settings, further):
    parts = [settings["task"], settings["method"]]
    if settings["method"] == "jactus":
        parts += [f"{settings['retained_ratio']:g}", settings["storage"], settings["allocation"]]
        parts += [f"warmup{settings['head_warmup_steps']}"] if settings["head_warmup_steps"] else []
        parts += [f"{key}={value}" for key, value in further.items()]
    parts += [f"lr{settings['learning_rate']:g}", f"ep{settings['epochs']:g}"]
    parts += [f"{settings['max_train_samples']}rows"] if settings["max_train_samples"] else []
    parts += ["validation"] if settings["scored_on"] != "test" else []
    return "-".join(parts) + f"-seed{settings['seed']}.json"


def report(folder):
    groups = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        groups.setdefault(path.stem.rpartition("-seed")[0], []).append(result)
    lines = [
        "| case | accuracy, mean of seeds | lowest to highest | seeds | kept of targeted layers | trainable |",
        "|---|---|---|---|---|---|",
    ]
    for case, results in groups.items():
        scores = [100 * result["accuracy"] for result in results]
        kept = 100 * statistics.mean(result.get("retained_ratio_reached", 1.0) for result in results)
        trainable = statistics.mean(result["trainable_parameters"] for result in results)
        lines.append(
            f"| {case} | {statistics.mean(scores):.2f} | {min(scores):.2f} to {max(scores):.2f} | {len(scores)} "
            f"| {kept:.1f} % | {trainable:,.0f} |"
        )
    return "\n".join(lines)


def main():
    args = parse_arguments()
    if args.report:
        print(report(args.out))
        return
    transformers.logging.set_verbosity_error()
    for ratio in args.retained_ratio:
        for seed in args.seeds:
            settings = settings_of(args, ratio, seed)
            path = args.out / file_name(settings, args.config)
            if path.exists():
                print("have", path.name)
                continue
            *_, case = run_case(args, ratio, seed)
            result = {**settings, **case, "environment": environment()}
            write_result(path, result)
            print(
                path.name,
                f"{result['accuracy']:.4f}",
                f"{result['train_seconds']:.0f} s",
                flush=True,
            )
        if args.method == "lora":
            break


if __name__ == "__main__":
    main()
