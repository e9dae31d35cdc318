"""Factors that one process makes, and all of them use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft_jactus._processes import broadcast_, gather_objects
from peft_jactus.numerics.factorization import LayerFactors
from peft_jactus.numerics.interpolation import InterpolativeBasis

if TYPE_CHECKING:
    from torch import Tensor


def factors_for_all(factors: LayerFactors | None, owner: int, weight: Tensor, *, bias: bool) -> LayerFactors:
    """Return the factors of process ``owner``.

    Args:
        factors: There, what it made; elsewhere ``None``.
        owner: The process that made them.
        weight: ``(out, in)``.
        bias: Whether they have one.
    """
    rank = gather_objects(0 if factors is None else factors.rank)[owner]
    if factors is None:
        (out_features, in_features), device = weight.shape, weight.device

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float64, device=device)

        left, right = (
            InterpolativeBasis(torch.empty(dim, dtype=torch.int64, device=device), empty(dim - rank, rank))
            for dim in (out_features, in_features)
        )
        factors = LayerFactors(left, empty(rank, rank), right, empty(out_features) if bias else None)
    tensors = [factors.left.order, factors.left.coefficients, factors.core]
    tensors += [factors.right.order, factors.right.coefficients, *([] if factors.bias is None else [factors.bias])]
    for tensor in tensors:
        broadcast_(tensor, owner)
    return factors
