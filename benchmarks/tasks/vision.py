"""The image tasks: a small ViT with a new head, on images of 32 x 32 pixels."""

import os
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image
from torch.utils.data import Dataset
from transformers import ViTForImageClassification

from benchmarks.tasks.workload import Workload, classification_metrics, label_entropy, split_rows

# What benchmarks.pretrain.vision made: 3 MB, so that whoever runs the comparison again starts from the same weights.
VIT = os.environ.get("JACTUS_VIT") or str(Path(__file__).parents[1] / "models" / "vit-cifar10")
SIZE = 32
# More than for texts, because it costs little here.
MAX_TEST_ROWS = {"test": 4000, "held-out": 1000}


class Images(Dataset):
    """Images and their labels in memory.

    Args:
        pixels: ``(images, 3, 32, 32)``, uint8.
        labels: ``(images,)``.
    """

    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def load_images(rows):
    """Return the rows of a data set, with a column of images or one of 8 x 8 pixels, as `Images`."""
    pixels = torch.stack([torch.from_numpy(as_array(row)) for row in rows]).permute(0, 3, 1, 2)
    return Images(pixels.contiguous(), torch.tensor(rows["label"]))


def as_array(row):
    """Return one image as ``(32, 32, 3)``, uint8."""
    if "pixels" in row:
        image = Image.fromarray((np.array(row["pixels"], dtype=np.float32) * 255 / 16).astype(np.uint8).reshape(8, 8))
    else:
        image = row["image"]
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.array(image.convert("RGB"))


def collate(rows):
    """Return a batch, with pixels from -1 to 1."""
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels.float() / 127.5 - 1, "labels": torch.stack([row["labels"] for row in rows])}


def load_workload(data_dir, task, *, num_rows, scored_on):
    """Return the rows, the same for every seed."""
    data = load_dataset("parquet", data_dir=str(Path(data_dir) / task))
    if "test" not in data:
        data["test"] = data["validation"]
    max_test_rows = MAX_TEST_ROWS[scored_on]
    train, test = split_rows(data, num_rows=num_rows, scored_on=scored_on, max_test_rows=max_test_rows)
    num_labels = 1 + max(data["train"]["label"])
    return Workload(
        load_images(train),
        load_images(test),
        collate,
        lambda: ViTForImageClassification.from_pretrained(VIT, num_labels=num_labels, ignore_mismatched_sizes=True),
        classification_metrics,
        task_type=None,
        head="classifier",
        constant_loss=label_entropy(train["label"]),
    )
