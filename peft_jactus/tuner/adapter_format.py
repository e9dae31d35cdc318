"""The tensors of one adapted layer: their names, shapes and dtypes, and the factors that they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft_jactus.numerics.core_product import core_scales
from peft_jactus.numerics.factorization import LayerFactors
from peft_jactus.numerics.interpolation import InterpolativeBasis

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


# Of what an adapter's tensors are and mean, the coordinates of its core (`core_product.STEP_NORM`) among them. One of
# another number is refused: it might load, and compute something else.
ADAPTER_FORMAT = 1


def tensor_shapes(out_features: int, in_features: int, rank: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, by name."""
    shapes: dict[str, tuple[int, ...]] = {
        "jactus_left": (out_features - rank, rank),
        "jactus_left_order": (out_features,),
        "jactus_core": (rank, rank),
        "jactus_right": (in_features - rank, rank),
        "jactus_right_order": (in_features,),
    }
    return {**shapes, "jactus_bias": (out_features,)} if bias else shapes


TENSOR_NAMES = tuple(tensor_shapes(1, 1, 1, bias=True))


def tensor_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of one tensor in a model: the core trains, in float32 at least."""
    if name.endswith("_order"):
        return torch.int32
    return torch.promote_types(model_dtype, torch.float32) if name == "jactus_core" else model_dtype


def unfilled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what a checkpoint has to fill: NaN, or features that there are not."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else -1, device=device, dtype=dtype)


def is_unfilled(tensor: Tensor) -> bool:
    """Whether any of it still is as `unfilled` made it."""
    return bool((tensor.isnan() if tensor.is_floating_point() else tensor < 0).any())


def tensors_of(factors: LayerFactors) -> dict[str, Tensor]:
    """Return the factors as tensors, by name."""
    left_scale, right_scale = core_scales(factors.left, factors.right)
    tensors = {
        "jactus_left": factors.left.coefficients,
        "jactus_left_order": factors.left.order,
        "jactus_core": factors.core * left_scale * right_scale,
        "jactus_right": factors.right.coefficients,
        "jactus_right_order": factors.right.order,
    }
    return tensors if factors.bias is None else {**tensors, "jactus_bias": factors.bias}


def factors_of(tensors: Mapping[str, Tensor]) -> LayerFactors:
    """Return the factors that the tensors hold, detached, in the dtype of the core, float32 at least."""
    dtype = torch.promote_types(tensors["jactus_core"].dtype, torch.float32)

    def wide(name: str) -> Tensor:
        return tensors[name].detach().to(dtype)

    left, right = (
        InterpolativeBasis(tensors[f"jactus_{side}_order"], wide(f"jactus_{side}")) for side in ("left", "right")
    )
    left_scale, right_scale = core_scales(left, right)
    core = wide("jactus_core") / left_scale / right_scale
    return LayerFactors(left, core, right, wide("jactus_bias") if "jactus_bias" in tensors else None)
