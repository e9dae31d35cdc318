"""What several processes share of a tuner: layers are shared out, and factors that one makes are used by all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft_jactus._processes import broadcast_, gather_objects, share_out
from peft_jactus.numerics.factorization import LayerFactors
from peft_jactus.numerics.interpolation import InterpolativeBasis
from peft_jactus.tuner.targeting import features_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def factors_for_all(
    factors: LayerFactors | None, owner: int, features: tuple[int, int], device: torch.device, *, bias: bool
) -> LayerFactors:
    """Return the factors of process ``owner``.

    Args:
        factors: There, what it made; elsewhere ``None``.
        owner: The process that made them.
        features: Of the layer, ``(out, in)``.
        device: Of its weight.
        bias: Whether they have one.
    """
    ranks = None if factors is None else (factors.core_rank, factors.adaptation_rank)
    found = gather_objects(ranks)[owner]
    assert found is not None
    if factors is None:
        factors = _empty_factors(features, device, *found, bias=bias)
    optional = (factors.bias, factors.down, factors.up)
    bases = (factors.left, factors.right)
    tensors = [factors.core, *(tensor for basis in bases for tensor in (basis.order, basis.coefficients))]
    for tensor in (*tensors, *(tensor for tensor in optional if tensor is not None)):
        broadcast_(tensor, owner)
    return factors


def _empty_factors(
    features: tuple[int, int], device: torch.device, core_rank: int, adaptation_rank: int, *, bias: bool
) -> LayerFactors:
    out_features, in_features = features

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=device)

    left, right = (
        InterpolativeBasis(torch.empty(dim, dtype=torch.int64, device=device), empty(dim - core_rank, core_rank))
        for dim in (out_features, in_features)
    )
    return LayerFactors(
        left,
        empty(core_rank, core_rank),
        right,
        empty(out_features) if bias else None,
        empty(adaptation_rank, in_features) if adaptation_rank else None,
        empty(out_features, adaptation_rank) if adaptation_rank else None,
    )


def share_out_layers(targets: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return which process factorizes which layer; the time grows with the cube of its sides."""
    shapes = {name: features_of(module) for name, module in targets.items()}
    return share_out({name: float(sum(side**3 for side in shape)) for name, shape in shapes.items()})


def digest(tensor: Tensor) -> float:
    """Return a number that is hardly the same for two tensors, or for two orders of one."""
    weights = torch.arange(1, 1 + tensor.numel(), dtype=torch.float64, device=tensor.device)
    return float(tensor.detach().flatten().double() @ weights)
