"""The tensors of one adapted layer: their names, shapes and dtypes, and the factors that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peft_jactus.numerics.adaptation import capped_adaptation_rank
from peft_jactus.numerics.core_product import core_scales
from peft_jactus.numerics.factorization import LayerFactors
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
        core_trains: Whether the core is a parameter. A frozen one has another name: PEFT takes parameters of an
            adapter for what it trains.
    """

    core_rank: int
    adaptation_rank: int = 0
    core_trains: bool = True

    @classmethod
    def of(cls, rank: int, out_features: int, in_features: int, *, adaptation_rank: int, core_trains: bool) -> Self:
        """Return the shape of a layer of a total ``rank``; full rank means a dense weight with adaptation on top."""
        adaptation_rank = capped_adaptation_rank(adaptation_rank, out_features, in_features)
        is_full = rank >= min(out_features, in_features)
        return cls(rank if is_full else rank - adaptation_rank, adaptation_rank, core_trains)

    @property
    def core_name(self) -> str:
        """Name of the tensor that holds the core."""
        return "jactus_core" if self.core_trains else "jactus_frozen_core"

    def tensors(self, out_features: int, in_features: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor, by name."""
        rank = self.core_rank
        shapes: dict[str, tuple[int, ...]] = {
            "jactus_left": (out_features - rank, rank),
            "jactus_left_order": (out_features,),
            self.core_name: (rank, rank),
            "jactus_right": (in_features - rank, rank),
            "jactus_right_order": (in_features,),
        }
        if bias:
            shapes["jactus_bias"] = (out_features,)
        if self.adaptation_rank:
            shapes["jactus_adapt_down"] = (self.adaptation_rank, in_features)
            shapes["jactus_adapt_up"] = (out_features, self.adaptation_rank)
        return shapes


TENSOR_NAMES = tuple(
    dict.fromkeys(name for trains in (True, False) for name in AdapterShape(1, 1, trains).tensors(1, 1, bias=True))
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
    core = factors.core
    if shape.core_trains:
        left_scale, right_scale = core_scales(factors.left, factors.right)
        core = core * left_scale * right_scale
    tensors = {
        "jactus_left": factors.left.coefficients,
        "jactus_left_order": factors.left.order,
        shape.core_name: core,
        "jactus_right": factors.right.coefficients,
        "jactus_right_order": factors.right.order,
        "jactus_bias": factors.bias,
        "jactus_adapt_down": factors.down,
        "jactus_adapt_up": factors.up,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def core_in(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the core among an adapter's tensors, whether it trains or not."""
    return tensors["jactus_core"] if "jactus_core" in tensors else tensors["jactus_frozen_core"]


def factors_of(tensors: Mapping[str, Tensor]) -> LayerFactors:
    """Return the factors that the tensors hold, detached, in the dtype of the core, float32 at least."""
    dtype = torch.promote_types(core_in(tensors).dtype, torch.float32)
    wide = {name: tensor if name.endswith("_order") else tensor.detach().to(dtype) for name, tensor in tensors.items()}
    left, right = (
        InterpolativeBasis(wide[f"jactus_{side}_order"], wide[f"jactus_{side}"]) for side in ("left", "right")
    )
    core = core_in(wide)
    if "jactus_core" in wide:
        left_scale, right_scale = core_scales(left, right)
        core = core / left_scale / right_scale
    optional = (wide.get(f"jactus_{name}") for name in ("bias", "adapt_down", "adapt_up"))
    return LayerFactors(left, core, right, *optional)
