"""Pretrain a small ViT on CIFAR-10, for the benchmarks that need a vision model.

    python benchmarks/pretrain_vision.py --data-dir ../shared/data --out outputs/vit-cifar10

Stop it and run it again: it goes on at its last checkpoint. A folder that holds a finished model is left alone.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from _environment import environment, write_result
from _text import accuracy
from _vision import SIZE, collate, load_images
from datasets import load_dataset
from torch.nn.functional import pad
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers.trainer_utils import get_last_checkpoint

# Pixels of the border that random crops are taken from.
BORDER = 4


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data-dir", default=os.environ.get("JACTUS_DATA", "../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("outputs/vit-cifar10"))
    parser.add_argument("--task", default="cifar10")
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def collate_augmented(rows):
    """Return a batch of random crops of the padded images, half of them mirrored."""
    batch = collate(rows)
    padded = pad(batch["pixel_values"], (BORDER,) * 4)
    offsets = torch.randint(0, 2 * BORDER + 1, (len(rows), 2)).tolist()
    crops = [
        image[:, top : top + SIZE, left : left + SIZE] for image, (top, left) in zip(padded, offsets, strict=True)
    ]
    crops = [
        crop.flip(-1) if mirrored else crop for crop, mirrored in zip(crops, torch.rand(len(rows)) < 0.5, strict=True)
    ]
    return batch | {"pixel_values": torch.stack(crops)}


class AugmentingTrainer(Trainer):
    """Augments training batches only."""

    def get_train_dataloader(self):
        self.data_collator = collate_augmented
        loader = super().get_train_dataloader()
        self.data_collator = collate
        return loader


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if (args.out / "config.json").exists():
        print(f"{args.out} holds a model already.")
        return
    set_seed(args.seed)
    data = load_dataset("parquet", data_dir=str(Path(args.data_dir) / args.task))
    train, test = load_images(data["train"]), load_images(data["test" if "test" in data else "validation"])
    config = ViTConfig(
        image_size=SIZE,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_labels=1 + int(train.labels.max()),
    )
    model = ViTForImageClassification(config)
    checkpoints = args.out / "trainer"
    training = TrainingArguments(
        output_dir=checkpoints,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=256,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.05,
        logging_steps=100,
        save_steps=500,
        save_total_limit=1,
        seed=args.seed,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = AugmentingTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    last = get_last_checkpoint(checkpoints) if checkpoints.exists() else None
    trainer.train(resume_from_checkpoint=last)
    scores = trainer.evaluate()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result = {
        "settings": settings,
        "num_parameters": model.num_parameters(),
        "test_loss": scores["eval_loss"],
        "test_accuracy": scores["eval_accuracy"],
        "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
    }
    write_result(args.out / "pretraining.json", result)
    model.save_pretrained(args.out)
    shutil.rmtree(checkpoints)
    print(f"{args.out}: accuracy {scores['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
