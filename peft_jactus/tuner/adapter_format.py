"""The tensors of one adapted layer: their names, shapes and dtypes, and the factors that they hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peft_jactus.numerics.adaptation import capped_adaptation_rank
from peft_jactus.numerics.adapted_product import FrozenWeight, has_row_basis
from peft_jactus.numerics.core_product import core_scales
from peft_jactus.numerics.factorization import LayerFactors, LowRankWeight
from peft_jactus.numerics.interpolation import InterpolativeBasis

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from typing_extensions import Self


# Formats of what an adapter's tensors are and mean, the coordinates of its core (`core_product.STEP_NORM`) among them:
# 1 has no adaptation ranks, 2 has. Any other is refused: it might load, and compute something else.
READABLE_FORMATS = (1, 2)
# Those that train, where they are there.
TRAINABLE = ("jactus_core", "jactus_adapt_down", "jactus_adapt_up")


def adapter_format(adaptation_rank: int) -> int:
    """Return the format of an adapter: the first one that can hold it, for the sake of earlier versions."""
    return 2 if adaptation_rank else 1


@dataclass(frozen=True)
class AdapterShape:
    """Ranks of one adapted layer, and whether its core trains.

    Attributes:
        core_rank: Size of the core.
        adaptation_rank: Ranks beside it, which train.
        core_trains: Whether the weight has a core, which trains; else it is a `FrozenWeight`.
    """

    core_rank: int
    adaptation_rank: int = 0
    core_trains: bool = True

    @classmethod
    def of(cls, rank: int, out_features: int, in_features: int, *, adaptation_rank: int, core_trains: bool) -> Self:
        """Return the shape of a layer of a total ``rank``; full rank means a dense weight with adaptation on top."""
        full_rank = min(out_features, in_features)
        adaptation_rank = capped_adaptation_rank(adaptation_rank, min(rank, full_rank))
        # Of a rank of one, none is left to the task: then the core has to train.
        core_trains = core_trains or not adaptation_rank
        return cls(rank if rank >= full_rank else rank - adaptation_rank, adaptation_rank, core_trains)

    def tensors(self, out_features: int, in_features: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor, by name."""
        rank, by_rows = self.core_rank, has_row_basis(out_features, in_features)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.core_trains or by_rows:
            shapes["jactus_left"] = (out_features - rank, rank)
            shapes["jactus_left_order"] = (out_features,)
        if self.core_trains:
            shapes["jactus_core"] = (rank, rank)
        else:
            shapes["jactus_frozen_factor"] = (rank, in_features) if by_rows else (out_features, rank)
        if self.core_trains or not by_rows:
            shapes["jactus_right"] = (in_features - rank, rank)
            shapes["jactus_right_order"] = (in_features,)
        if bias:
            shapes["jactus_bias"] = (out_features,)
        if self.adaptation_rank:
            shapes["jactus_adapt_down"] = (self.adaptation_rank, in_features)
            shapes["jactus_adapt_up"] = (out_features, self.adaptation_rank)
        return shapes


TENSOR_NAMES = (
    "jactus_left",
    "jactus_left_order",
    "jactus_core",
    "jactus_frozen_factor",
    "jactus_right",
    "jactus_right_order",
    "jactus_bias",
    "jactus_adapt_down",
    "jactus_adapt_up",
)


def tensor_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of one tensor in a model: what trains has float32 at least."""
    if name.endswith("_order"):
        return torch.int32
    return torch.promote_types(model_dtype, torch.float32) if name in TRAINABLE else model_dtype


def unfilled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what a checkpoint has to fill: NaN, or features that there are not."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else -1, device=device, dtype=dtype)


def is_unfilled(tensor: Tensor) -> bool:
    """Whether any of it still is as `unfilled` made it."""
    return bool((tensor.isnan() if tensor.is_floating_point() else tensor < 0).any())


def tensors_of(factors: LayerFactors, shape: AdapterShape) -> dict[str, Tensor]:
    """Return the factors as tensors, by name."""
    if shape.core_trains:
        left_scale, right_scale = core_scales(factors.left, factors.right)
        tensors = {
            **_basis_tensors("left", factors.left),
            "jactus_core": factors.core * left_scale * right_scale,
            **_basis_tensors("right", factors.right),
        }
    else:
        weight = FrozenWeight.from_factors(factors.left, factors.core, factors.right)
        side = "left" if weight.by_rows else "right"
        tensors = {**_basis_tensors(side, weight.basis), "jactus_frozen_factor": weight.factor}
    optional = {"jactus_bias": factors.bias, "jactus_adapt_down": factors.down, "jactus_adapt_up": factors.up}
    return tensors | {name: tensor for name, tensor in optional.items() if tensor is not None}


def _basis_tensors(side: str, basis: InterpolativeBasis) -> dict[str, Tensor]:
    return {f"jactus_{side}": basis.coefficients, f"jactus_{side}_order": basis.order}


def _basis_in(tensors: Mapping[str, Tensor], side: str) -> InterpolativeBasis:
    return InterpolativeBasis(tensors[f"jactus_{side}_order"], tensors[f"jactus_{side}"])


def bases_in(tensors: Mapping[str, Tensor]) -> tuple[InterpolativeBasis, InterpolativeBasis]:
    """Return the bases on both sides of a core that trains."""
    return _basis_in(tensors, "left"), _basis_in(tensors, "right")


def frozen_weight_in(tensors: Mapping[str, Tensor]) -> FrozenWeight:
    """Return what does not train among an adapter's tensors, where there is no core."""
    by_rows = "jactus_left" in tensors
    return FrozenWeight(_basis_in(tensors, "left" if by_rows else "right"), tensors["jactus_frozen_factor"], by_rows)


def coefficients_in(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the coefficients of a basis, ``(others, core rank)``; ``None`` if there is no basis."""
    return tensors.get("jactus_left", tensors.get("jactus_right"))


def frozen_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of what does not train, which is the model's."""
    coefficients = coefficients_in(tensors)
    assert coefficients is not None
    return coefficients.dtype


def weight_of(tensors: Mapping[str, Tensor]) -> LowRankWeight:
    """Return the weight that the tensors hold, detached, in the dtype of what trains, float32 at least."""
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    wide = {name: tensor if name.endswith("_order") else tensor.detach().to(dtype) for name, tensor in tensors.items()}
    if "jactus_core" in wide:
        bases = bases_in(wide)
        left_scale, right_scale = core_scales(*bases)
        core = wide["jactus_core"] / left_scale / right_scale
        left, right = (basis.dense() for basis in bases)
    else:
        left, right = frozen_weight_in(wide).sides()
        core = torch.eye(left.shape[1], dtype=dtype, device=left.device)
    optional = (wide.get(f"jactus_{name}") for name in ("bias", "adapt_down", "adapt_up"))
    return LowRankWeight(left, core, right, *optional)
