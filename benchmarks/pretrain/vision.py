"""Pretrain a small ViT on CIFAR-10, for the benchmarks that need a vision model.

    python -m benchmarks.pretrain.vision --data-dir ../shared/data --out benchmarks/models/vit-cifar10

Stop it and run it again: it goes on at its last checkpoint. A folder that holds a finished model is left alone.
"""

from pathlib import Path

import torch
from datasets import load_dataset
from torch.nn.functional import pad
from transformers import Trainer, ViTConfig, ViTForImageClassification, set_seed

from benchmarks.pretrain.training import is_pretrained, pretraining_parser, train_and_save, training_arguments
from benchmarks.tasks.vision import SIZE, collate, load_images
from benchmarks.tasks.workload import classification_metrics

# Pixels of the border that random crops are taken from.
BORDER = 4


def parse_arguments():
    parser = pretraining_parser(__doc__, out="benchmarks/models/vit-cifar10", batch_size=128, learning_rate=2e-3)
    parser.add_argument("--task", default="cifar10")
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=30)
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
    if is_pretrained(args.out):
        return
    set_seed(args.seed)
    data = load_dataset("parquet", data_dir=str(Path(args.data_dir) / args.task))
    train, test = load_images(data["train"]), load_images(data["test" if "test" in data else "validation"])
    config = ViTConfig(
        image_size=SIZE,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_labels=1 + int(train.labels.max()),
    )
    trainer = AugmentingTrainer(
        model=ViTForImageClassification(config),
        args=training_arguments(args, num_train_epochs=args.epochs, per_device_eval_batch_size=256, weight_decay=0.1),
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=classification_metrics,
    )
    train_and_save(
        trainer,
        args,
        lambda metrics: {"test_loss": metrics["eval_loss"], "test_accuracy": metrics["eval_accuracy"]},
    )


if __name__ == "__main__":
    main()
