"""JACTUS on a vision transformer: calibrate on images, fine-tune, and keep the smaller model.

    python examples/image_classification.py                 # ViT-Base and CIFAR-100 from the Hub
    python examples/image_classification.py --small --data-dir ../shared/data/fashion_mnist

`--small` needs no download of a model: it trains a small ViT on the odd classes of the data first,
so that there is a pretrained model to adapt to the even ones. Any directory of parquet files with
an image and a label column will do.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from _common import num_trainable, weight_bytes, write_results
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DefaultDataCollator,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from peft_jactus import JactusConfig, calibrate, export_compressed, plot_ranks, rank_summary

# -- settings -------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="name, directory")
parser.add_argument("--small", action="store_true", help="train a small ViT to adapt; no download")
parser.add_argument("--dataset", default="cifar100", help="Hub name")
parser.add_argument("--data-dir", help="directory of parquet files, instead of --dataset")
parser.add_argument("--output-dir", type=Path, default=Path("outputs/image_classification"))
parser.add_argument("--retained-ratio", type=float, default=0.8, help="kept share of the weights")
parser.add_argument("--calibration-batches", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=1e-3, help="of what trains")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--max-train-samples", type=int, help="default: all")
parser.add_argument("--max-eval-samples", type=int, help="default: all")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

args.output_dir.mkdir(parents=True, exist_ok=True)
device = "cuda" if torch.cuda.is_available() else "cpu"
transformers.logging.set_verbosity_error()  # or it reports at length that the head is new

# -- data -----------------------------------------------------------------------------------------

source = {"path": "parquet", "data_dir": args.data_dir} if args.data_dir else {"path": args.dataset}
dataset = load_dataset(**source)
if "test" not in dataset and "validation" not in dataset:
    dataset = dataset["train"].train_test_split(test_size=0.2, seed=0)
dataset = DatasetDict(train=dataset["train"], test=dataset["test" if "test" in dataset else "validation"])
features = dataset["train"].features
image_column = next(name for name, feature in features.items() if isinstance(feature, Image))
# The finest labels, where there are several: CIFAR-100 has 20 coarse classes and 100 fine ones.
label_column = max(
    (name for name, feature in features.items() if isinstance(feature, ClassLabel)),
    key=lambda name: features[name].num_classes,
)
dataset = dataset.rename_columns({image_column: "image", label_column: "label"})
dataset = dataset.select_columns(["image", "label"])
class_names = features[label_column].names


def with_pixels(rows: Dataset, processor: transformers.BaseImageProcessor) -> Dataset:
    """Let rows be prepared for the model as they are read."""

    def transform(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": batch["label"]}

    return rows.with_transform(transform)


def trainer_for(model: nn.Module, rows: DatasetDict, epochs: float) -> Trainer:
    training = TrainingArguments(
        output_dir=args.output_dir / "trainer",
        num_train_epochs=epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=128,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        bf16=device == "cuda",
        seed=args.seed,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # or the Trainer drops the image before it becomes pixels
        dataloader_num_workers=8 if device == "cuda" else 0,
        dataloader_pin_memory=device == "cuda",
    )
    return Trainer(
        model=model,
        args=training,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=DefaultDataCollator(),
        compute_metrics=lambda outputs: {
            "accuracy": float(np.mean(outputs.predictions.argmax(-1) == outputs.label_ids))
        },
    )


# -- with --small: a pretrained model of our own --------------------------------------------------


def part_of_classes(remainder: int) -> tuple[DatasetDict, list[str]]:
    """Return the rows of the even (0) or odd (1) classes, with their labels counted from 0."""
    rows = dataset.filter(lambda label: label % 2 == remainder, input_columns="label")
    names = class_names[remainder::2]
    rows = rows.map(lambda row: {"label": row["label"] // 2})
    return rows.cast_column("label", ClassLabel(names=names)), names


if args.small:
    set_seed(args.seed)
    args.model = str(args.output_dir / "pretrained")
    side = dataset["train"][0]["image"].width
    processor = transformers.ViTImageProcessor(  # not imported above, where it would ask for torchvision
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    odd_rows, odd_names = part_of_classes(1)
    model_config = ViTConfig(
        image_size=side,
        patch_size=side // 4,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=len(odd_names),
    )
    pretrained = ViTForImageClassification(model_config)
    odd_rows = DatasetDict({split: with_pixels(r, processor) for split, r in odd_rows.items()})
    trainer = trainer_for(pretrained, odd_rows, epochs=4)
    trainer.train()
    print(f"small ViT on {', '.join(odd_names)}: {trainer.evaluate()['eval_accuracy']:.1%}")
    pretrained.base_model.save_pretrained(args.model)  # without its head
    processor.save_pretrained(args.model)
    dataset, class_names = part_of_classes(0)

# -- the task -------------------------------------------------------------------------------------

processor = AutoImageProcessor.from_pretrained(args.model)
for split, limit in (("train", args.max_train_samples), ("test", args.max_eval_samples)):
    rows = dataset[split].shuffle(seed=0)  # not args.seed: all seeds see the same rows
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    dataset[split] = with_pixels(rows, processor)


def load_model() -> nn.Module:
    set_seed(args.seed)
    model = AutoModelForImageClassification.from_pretrained(
        args.model, num_labels=len(class_names), ignore_mismatched_sizes=True
    )
    return model.to(device)


# -- calibrate, compress, train -------------------------------------------------------------------

model = load_model()
dense_parameters = model.num_parameters()
# PEFT has no task type for images, so the new head is named: trained whole, never compressed.
config = JactusConfig(
    target_modules="all-linear",
    exclude_modules=["classifier"],
    modules_to_save=["classifier"],
    retained_ratio=args.retained_ratio,
)
loader = DataLoader(dataset["train"], args.batch_size, collate_fn=DefaultDataCollator())
start = time.perf_counter()
calibrate(model, config, loader, max_batches=args.calibration_batches, head_warmup_steps=50)
model = get_peft_model(model, config)
preparation_seconds = time.perf_counter() - start
model.print_trainable_parameters()
summary = rank_summary(model)
print(summary)
plot_ranks(model).savefig(args.output_dir / "ranks.png", dpi=150)

trainer = trainer_for(model, dataset, args.epochs)
start = time.perf_counter()
trainer.train()
training_seconds = time.perf_counter() - start
evaluation = trainer.evaluate()

# -- save, load, look at a few --------------------------------------------------------------------

model.save_pretrained(args.output_dir / "adapter")
export_compressed(model, args.output_dir / "compressed", processor=processor, overwrite=True)
reloaded = PeftModel.from_pretrained(load_model(), args.output_dir / "adapter").eval()
batch = next(iter(DataLoader(dataset["test"], 8, collate_fn=DefaultDataCollator())))
with torch.no_grad():
    predicted = reloaded(pixel_values=batch["pixel_values"].to(device)).logits.argmax(-1)
for label, prediction in zip(batch["labels"].tolist(), predicted.tolist(), strict=True):
    print(f"reloaded adapter: a {class_names[label]} is taken for a {class_names[prediction]}")

stored = sum(row.num_stored for row in summary.rows)
targeted = sum(row.num_dense for row in summary.rows)
results = {
    "accuracy": evaluation["eval_accuracy"],
    "classes": len(class_names),
    "trainable": num_trainable(model),
    "targeted_parameters": {"dense": targeted, "kept": stored},
    "parameters": {"dense": dense_parameters, "kept": dense_parameters - targeted + stored},
    "adapter_bytes": (args.output_dir / "adapter/adapter_model.safetensors").stat().st_size,
    "weight_bytes": weight_bytes(model),
    "preparation_seconds": preparation_seconds,
    "training_seconds": training_seconds,
}
write_results(args.output_dir / "results.json", args, results)
print(
    f"accuracy {results['accuracy']:.1%} on {len(class_names)} classes, with "
    f"{stored / targeted:.1%} of the targeted parameters and "
    f"{results['parameters']['kept'] / dense_parameters:.1%} of all"
)
print(f"Written to {args.output_dir}: adapter/, compressed/, ranks.png, results.json")
