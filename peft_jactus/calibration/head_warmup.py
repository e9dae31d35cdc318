"""A short training of the head alone: a fresh head gives noise for gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peft_jactus._processes import broadcast_
from peft_jactus._progress import progress
from peft_jactus.calibration.batches import to_model_device
from peft_jactus.calibration.model_state import prepared_for_calibration
from peft_jactus.tuner.targeting import head_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from peft_jactus.calibration.batches import Batch
    from peft_jactus.calibration.summed_loss import SummedLoss
    from peft_jactus.tuner.config import JactusConfig


@dataclass(frozen=True)
class HeadWarmup:
    """How long and how fast to train the head."""

    num_steps: int
    learning_rate: float


def warm_up_head(
    model: nn.Module,
    config: JactusConfig,
    batches: Iterable[Batch],
    compute_loss: SummedLoss,
    settings: HeadWarmup,
    *,
    progress_bar: bool,
) -> None:
    """Train the head of ``model`` in place, in evaluation mode; leave all else as it was. Raise if there is none."""
    parameters = head_parameters(model, config)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    bar = progress(
        itertools.islice(_cycled(batches), settings.num_steps),
        description="Warming up the head",
        unit="step",
        total=settings.num_steps,
        shown=progress_bar,
    )
    gradients = [parameter.grad for parameter in parameters]
    try:
        with prepared_for_calibration(model, train_mode=False), torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            optimizer.zero_grad()
            for batch in bar:
                inputs = to_model_device(batch, model)
                torch.autograd.backward(compute_loss(model, inputs) / compute_loss.count(model, inputs))
                optimizer.step()
                optimizer.zero_grad()
        for parameter in parameters:  # processes saw other batches
            broadcast_(parameter.data, source=0)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def head_parameters(model: nn.Module, config: JactusConfig) -> list[nn.Parameter]:
    """Return the parameters of the head; raise `ValueError` if none is found."""
    names = head_names(config)
    heads = [
        module
        for name, module in model.named_modules()
        if any(name == head or name.endswith(f".{head}") for head in names)
    ]
    parameters = [parameter for head in heads for parameter in head.parameters()]
    if not parameters:
        raise ValueError(
            "`head_warmup_steps` needs a head to train, and none was found. Name it in `modules_to_save`, or set "
            "`task_type`."
        )
    return parameters


def _cycled(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            return
