"""Batches as users pass them, and where they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from accelerate.utils import find_device, send_to_device
from torch import Tensor, nn

Batch = Mapping[str, Any]
LossFn = Callable[[nn.Module, Batch], Tensor]
# The label of positions without one, in transformers and torch.nn.functional.cross_entropy.
IGNORED_LABEL = -100


def to_model_device(batch: Batch, model: nn.Module) -> Batch:
    """Return ``batch`` on the device of the model's first parameter; raise `TypeError` if it is no mapping."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"`batches` must yield mappings of keyword arguments for the model; got a {type(batch).__name__}."
        )
    # What is offloaded says nothing; accelerate then moves inputs to where they are used.
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    device = next(devices, torch.device("cpu"))
    moved: Batch = send_to_device(dict(batch), device)
    return moved


def check_is_batch(batch: Batch) -> None:
    """Raise `TypeError` for what a model cannot take as a batch, such as a row of a data set."""
    tokens = batch.get("input_ids")
    is_row = isinstance(tokens, Tensor) and tokens.dim() < 2
    if is_row or find_device(batch) is None:
        found = {name: type(value).__name__ for name, value in batch.items()}
        raise TypeError(
            f"`batches` must yield batches of tensors, as a DataLoader does; got {found}, which looks like one row of "
            "a data set. Give `DataLoader(dataset, batch_size=8, collate_fn=data_collator)`, or a Trainer's "
            "`trainer.get_train_dataloader()`."
        )


def num_batches(batches: Iterable[Batch], max_batches: int | None) -> int | None:
    """Return how many batches will be drawn, if that can be known."""
    try:
        length = len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over a stream
        length = None
    known = [number for number in (length, max_batches) if number is not None]
    return min(known) if known else None
