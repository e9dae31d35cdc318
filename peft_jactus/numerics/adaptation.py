"""Adaptation ranks: in which directions they read a layer's inputs at the start.

A layer's rank is shared out: ``W' x = L C R^T x + B A x``, where ``A`` ``(adaptation rank, in)`` and ``B`` ``(out,
adaptation rank)`` train, and ``B`` starts at zero. What an adapter learns in few steps depends on where ``A`` looks:
along the gradient of the weight it sees what the task wants to change (cf. LoRA-GA, Wang et al., arXiv:2407.05000),
along the inputs what the task's data have most of (EVA, Paischer et al., arXiv:2410.07170).

In the retained space, ``B A`` is added to the factor of a `frozen_weight.FrozenWeight`: ``W' = L (F + B A)`` in a
layer that is wide or square, ``(F + B A) R^T`` in a tall one. It adds no rank, so that none has to be set aside. In
return, one side of what is learned stays in the space of the compressed weight's columns, or of its rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from peft_jactus.numerics.linalg import eigh_descending

if TYPE_CHECKING:
    from torch import Tensor

    from peft_jactus.numerics.frozen_weight import FrozenWeight
    from peft_jactus.numerics.moments import LayerStatistics

AdaptationInit = Literal["gradient", "inputs", "random"]
AdaptationSpace = Literal["free", "retained"]

# Length of a row of A in a direction that has the mean share of the inputs: that of a row of LoRA's A
# (`kaiming_uniform_` with a = sqrt(5)), times LoRA's usual scale of 2.
ROW_LENGTH = 2 / math.sqrt(3)


def capped_adaptation_rank(adaptation_rank: int, rank: int) -> int:
    """Return how many of a layer's ``rank`` are left to the task: ``adaptation_rank``, but at most half of them."""
    return min(adaptation_rank, rank // 2)


def starting_directions(
    weight: Tensor, statistics: LayerStatistics | None, adaptation_rank: int, init: AdaptationInit
) -> Tensor:
    """Return ``A`` ``(adaptation_rank, in)`` at the start, float64.

    Each row sees inputs as large as a row of LoRA's does, so that LoRA's learning rates serve. Where much of the
    inputs lies in a row's direction, the row is short. No row is longer than `ROW_LENGTH`.

    Args:
        weight: ``(out, in)``; its shape and device.
        statistics: Of the layer; not read by ``"random"``.
        adaptation_rank: At most half of ``min(out, in)``.
        init: Along the weight's gradient, along the inputs, or at random from torch's generator, as LoRA's.
    """
    if init == "random":
        entries = torch.rand(adaptation_rank, weight.shape[1], dtype=torch.float64).to(weight.device)
        return (2 * entries - 1) * (ROW_LENGTH * math.sqrt(3 / weight.shape[1]))
    assert statistics is not None
    if init == "gradient":
        assert statistics.weight_gradient is not None
        directions = statistics.weight_gradient.leading(adaptation_rank)[1]
    else:
        directions = eigh_descending(statistics.input.covariance)[1][:, :adaptation_rank]
    lengths = _lengths(directions, statistics.input.covariance.to(directions.device))
    return (directions * lengths).mT.to(weight.device)


def in_space_of(directions: Tensor, weight: FrozenWeight) -> Tensor:
    """Return ``A`` of an adapted factor (`FrozenWeight.adapted`) that reads inputs as ``directions`` do, or nearly.

    Args:
        directions: ``(adaptation rank, in)``, float64.
        weight: The compressed weight.

    Returns:
        The directions, if the factor holds rows. Else ``(adaptation rank, rank)``: the nearest ones among those that
        the weight's rows span, in least squares.
    """
    if weight.by_rows:
        return directions
    scale, _ = weight.scales_of_adaptation(directions.dtype)
    columns = weight.basis.dense().to(directions) * scale
    # The scaled columns have a condition number of about 20, so that the normal equations are exact enough.
    found: Tensor = torch.linalg.solve(columns.mT @ columns, columns.mT @ directions.mT).mT
    return found


def _lengths(directions: Tensor, covariance: Tensor) -> Tensor:
    """Return how long the row of ``A`` is to be in each of ``directions`` ``(in, count)``, unit vectors.

    ``ROW_LENGTH * sqrt(mean / variance)``, for the variance of the inputs in the direction, and its mean over all.
    """
    variances = ((covariance @ directions) * directions).sum(0)
    mean = covariance.diagonal().mean()
    # A direction with less than the mean has the full length; so has one that no input was in.
    return ROW_LENGTH * torch.where(variances > mean, mean / variances, 1.0).sqrt()
