"""What each rank expert is worth for each prompt, from gradients: a router's starting point, and a reference for it.

Give each expert a gate, one if it runs. The dense model's predictions and the factorised ones agree (nearly) when all
run, so the gradient of their divergence vanishes there, and to second order an expert is worth half the Fisher
information of its gate, ``E[(d log p(y) / d gate)^2]`` over labels that the model itself would give (Martens,
arXiv:1412.1193).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from peft_jactus.calibration.batches import IGNORED_LABEL
from peft_jactus.parse.installation import router_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_jactus.calibration.batches import Batch


def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the predictions ``(batch, ..., classes)``; labels of the batch are not used.

    Raises:
        TypeError: If the model returns none.
        ValueError: If there is one class, as for a regression: nothing to be likely or not.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: Tensor | None = getattr(model(**inputs), "logits", None)
    if logits is None:
        raise TypeError(
            f"{type(model).__name__} returns no `logits` to compare. Load the model with a head (`AutoModelFor...`)."
        )
    if logits.shape[-1] < 2:
        raise ValueError(
            f"{type(model).__name__} returns one number, not one for each of several classes or tokens. A router is "
            "trained on the probabilities of classes or tokens, so a regression model cannot be routed."
        )
    return logits


def counted_positions(batch: Batch, logits: Tensor) -> Tensor:
    """Return ``logits.shape[:-1]``, bool: predictions that count; those at padding do not."""
    mask: Tensor | None = batch.get("attention_mask")
    if mask is None or mask.shape != logits.shape[:-1]:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    return mask.bool()


def expert_importance(
    model: PreTrainedModel,
    batch: Batch,
    *,
    positions: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the Fisher information of the gate of every expert, for each row.

    Args:
        model: A routed model.
        batch: Its keyword arguments.
        positions: Which predictions are counted: bool, of the shape of the logits without their last dimension.
            Default: all except padding.
        num_samples: Number of labels drawn for each prediction; each costs a backward pass.
        generator: Random generator for the labels.

    Returns:
        ``(batch, experts)``, float32, >= 0: twice the estimated divergence from the prediction with all experts if
        this expert is left out, in nats summed over positions.

    Raises:
        ValueError: If the model has no router.
    """
    router = router_of(model)
    if router is None:
        raise ValueError("`model` has no router; use `routed_copy`.")
    num_rows = len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
    gates = torch.ones(num_rows, len(router.table), device=router.weight.device, requires_grad=True)
    with torch.enable_grad(), router.gated(gates):
        logits = logits_of(model, batch).float()
        log_probabilities = functional.log_softmax(logits, dim=-1).flatten(0, -2)
        positions = counted_positions(batch, logits) if positions is None else positions
        total = torch.zeros_like(gates, requires_grad=False)
        for sample in range(num_samples):
            drawn = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator).squeeze(1)
            labels = drawn.masked_fill(~positions.flatten(), IGNORED_LABEL)
            loss = functional.nll_loss(log_probabilities, labels, ignore_index=IGNORED_LABEL, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, gates, retain_graph=sample + 1 < num_samples)
            total += gradient.square()
    return total / num_samples
