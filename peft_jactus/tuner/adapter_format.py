"""The tensors of one adapted layer: their names, shapes and dtypes, and the factors that they hold."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from peft_jactus.numerics.adaptation import capped_adaptation_rank
from peft_jactus.numerics.core_product import core_scales
from peft_jactus.numerics.factorization import LayerFactors, LowRankWeight
from peft_jactus.numerics.frozen_weight import FrozenWeight, RoundedWeight, has_row_basis
from peft_jactus.numerics.interpolation import InterpolativeBasis
from peft_jactus.numerics.quantization import code_dtype, code_shape, num_groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from typing_extensions import Self

    from peft_jactus.numerics.adaptation import AdaptationSpace
    from peft_jactus.numerics.moments import LayerStatistics
    from peft_jactus.tuner.config import JactusConfig


# Formats of what an adapter's tensors are and mean, the coordinates of its core (`core_product.STEP_NORM`) among them:
# 1 has no adaptation ranks, 2 has, 3 has what is frozen in few bits, 4 an adaptation in the retained space, in any
# number of bits. Any other is refused: it might load, and compute something else.
READABLE_FORMATS = (1, 2, 3, 4)
# Those that train, where they are there.
TRAINABLE = ("jactus_core", "jactus_adapt_down", "jactus_adapt_up")
# The large ones that do not, and are in few bits if that is asked for.
FROZEN = ("jactus_left", "jactus_frozen_factor", "jactus_right")
# What `unfilled` puts into integers, where it could not be. All numbers of a weight in 4 bits in the middle of the
# negative ones is what no rounding leads to: one of each group is the largest.
_NEVER = {torch.int32: -1, torch.int8: -128, torch.uint8: 0x44}


def adapter_format(config: JactusConfig) -> int:
    """Return the format of an adapter: the first one that can hold it, for the sake of earlier versions."""
    if config.adaptation_rank and config.adaptation_space == "retained":
        return 4
    if config.frozen_bits is not None:
        return 3
    return 2 if config.adaptation_rank else 1


@dataclass(frozen=True)
class AdapterShape:
    """Ranks of one adapted layer, and whether its core trains.

    Attributes:
        core_rank: Size of the core.
        adaptation_rank: Ranks beside it, which train.
        core_trains: Whether the weight has a core, which trains; else it is a `FrozenWeight`.
        frozen_bits: Of a number of that, if it is a `RoundedWeight`.
        space: Of the adaptation.
    """

    core_rank: int
    adaptation_rank: int = 0
    core_trains: bool = True
    frozen_bits: int | None = None
    space: AdaptationSpace = "free"

    @classmethod
    def of(cls, config: JactusConfig, rank: int, out_features: int, in_features: int) -> Self:
        """Return the shape of a layer of a total ``rank``; full rank means a dense weight with adaptation on top."""
        full_rank = min(out_features, in_features)
        adaptation_rank = capped_adaptation_rank(config.adaptation_rank, min(rank, full_rank))
        # Of a rank of one, none is left to the task: then the core has to train.
        core_trains = config.core_trains or not adaptation_rank
        space: AdaptationSpace = "free" if core_trains or rank >= full_rank else config.adaptation_space
        core_rank = rank if rank >= full_rank or space == "retained" else rank - adaptation_rank
        return cls(core_rank, adaptation_rank, core_trains, None if core_trains else config.frozen_bits, space)

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
            outputs, inputs = out_features, in_features
            if self.space == "retained":
                outputs, inputs = shapes["jactus_frozen_factor"]
            shapes["jactus_adapt_down"] = (self.adaptation_rank, inputs)
            shapes["jactus_adapt_up"] = (outputs, self.adaptation_rank)
        return shapes if self.frozen_bits is None else shapes | _shapes_of_codes(shapes, self.frozen_bits)

    def dtype_of(self, name: str, model_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of one tensor in a model: what trains has float32 at least."""
        if name.endswith("_order"):
            return torch.int32
        if name in FROZEN and self.frozen_bits is not None:
            return code_dtype(self.frozen_bits)
        return torch.promote_types(model_dtype, torch.float32) if name in TRAINABLE else model_dtype


def _shapes_of_codes(shapes: Mapping[str, tuple[int, ...]], bits: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in FROZEN:
        if name in shapes:
            rows, columns = shapes[name]
            if name == "jactus_right":  # the side that meets the inputs first, as its rounding sees it
                rows, columns = columns, rows
            found[name] = code_shape((rows, columns), bits)
            found[f"{name}_scale"] = (num_groups((rows, columns)),)
    return found


TENSOR_NAMES = (
    "jactus_left",
    "jactus_left_scale",
    "jactus_left_order",
    "jactus_core",
    "jactus_frozen_factor",
    "jactus_frozen_factor_scale",
    "jactus_right",
    "jactus_right_scale",
    "jactus_right_order",
    "jactus_bias",
    "jactus_adapt_down",
    "jactus_adapt_up",
)


def unfilled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what a checkpoint has to fill: NaN, or integers that are not there."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else _NEVER[dtype], device=device, dtype=dtype)


def is_unfilled(tensor: Tensor) -> bool:
    """Whether any of it still is as `unfilled` made it; of two codes in a byte, all."""
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    if tensor.dtype == torch.uint8:
        return bool(tensor.numel() and (tensor == _NEVER[torch.uint8]).all())
    return bool((tensor <= _NEVER[tensor.dtype]).any())


def num_in_buffers(
    adapters: Iterable[tuple[Mapping[str, Tensor], AdapterShape]], out_features: int, in_features: int
) -> int:
    """Return how many numbers a layer's adapters hold in buffers, in however few bits; what they share counts once."""
    counts: dict[int, int] = {}
    for tensors, shape in adapters:
        numbers = dataclasses.replace(shape, frozen_bits=None).tensors(out_features, in_features, bias=True)
        for name, tensor in tensors.items():
            if name in numbers and not isinstance(tensor, nn.Parameter) and not name.endswith("_order"):
                counts[id(tensor)] = math.prod(numbers[name])
    return sum(counts.values())


def tensors_of(
    factors: LayerFactors, shape: AdapterShape, dtype: torch.dtype, statistics: LayerStatistics | None
) -> dict[str, Tensor]:
    """Return the factors as tensors, by name: copies, as a bias may be that of the dense layer, which stays as it is.

    Args:
        factors: What `factorize` made.
        shape: How they are shared out.
        dtype: Of the model.
        statistics: The layer's, for rounding what is frozen to 4 bits by them.
    """
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
        if shape.frozen_bits is None:
            tensors = {**_basis_tensors(side, weight.basis), "jactus_frozen_factor": weight.factor}
        else:
            moment = None if statistics is None or shape.frozen_bits == 8 else statistics.input.covariance
            tensors = _rounded_tensors(side, weight.rounded(shape.frozen_bits, dtype=dtype, second_moment=moment))
    optional = {"jactus_bias": factors.bias, "jactus_adapt_down": factors.down, "jactus_adapt_up": factors.up}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    return {
        name: tensor.to(shape.dtype_of(name, dtype), copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _basis_tensors(side: str, basis: InterpolativeBasis) -> dict[str, Tensor]:
    return {f"jactus_{side}": basis.coefficients, f"jactus_{side}_order": basis.order}


def _rounded_tensors(side: str, weight: RoundedWeight) -> dict[str, Tensor]:
    return {
        f"jactus_{side}": weight.coefficients,
        f"jactus_{side}_scale": weight.coefficient_scales,
        f"jactus_{side}_order": weight.order,
        "jactus_frozen_factor": weight.factor,
        "jactus_frozen_factor_scale": weight.factor_scales,
    }


def _basis_in(tensors: Mapping[str, Tensor], side: str) -> InterpolativeBasis:
    return InterpolativeBasis(tensors[f"jactus_{side}_order"], tensors[f"jactus_{side}"])


def bases_in(tensors: Mapping[str, Tensor]) -> tuple[InterpolativeBasis, InterpolativeBasis]:
    """Return the bases on both sides of a core that trains."""
    return _basis_in(tensors, "left"), _basis_in(tensors, "right")


def frozen_weight_in(tensors: Mapping[str, Tensor], shape: AdapterShape) -> FrozenWeight | RoundedWeight:
    """Return what does not train among an adapter's tensors, where there is no core."""
    by_rows = "jactus_left" in tensors
    side, factor = "left" if by_rows else "right", tensors["jactus_frozen_factor"]
    if shape.frozen_bits is None:
        return FrozenWeight(_basis_in(tensors, side), factor, by_rows)
    scales = tensors["jactus_frozen_factor_scale"]
    return RoundedWeight(
        order=tensors[f"jactus_{side}_order"],
        coefficients=tensors[f"jactus_{side}"],
        coefficient_scales=tensors[f"jactus_{side}_scale"],
        factor=factor,
        factor_scales=scales,
        by_rows=by_rows,
        rank=shape.core_rank,
        long_side=max(tensors["jactus_adapt_down"].shape[1], tensors["jactus_adapt_up"].shape[0]),
        dtype=scales.dtype,
    )


def frozen_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of what does not train, which is the model's; of codes, that of their scales."""
    names = ("jactus_frozen_factor_scale", "jactus_left", "jactus_right")
    return next(tensors[name].dtype for name in names if name in tensors)


def weight_of(tensors: Mapping[str, Tensor], shape: AdapterShape) -> LowRankWeight:
    """Return the weight that the tensors hold, detached, in the dtype of what trains, float32 at least."""
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    wide = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}
    bias, down, up = (wide.get(f"jactus_{name}") for name in ("bias", "adapt_down", "adapt_up"))
    if shape.core_trains:
        bases = bases_in(tensors | wide)
        left_scale, right_scale = core_scales(*bases)
        core = wide["jactus_core"] / left_scale / right_scale
        left, right = (basis.dense() for basis in bases)
        return LowRankWeight(left, core, right, bias, down, up)
    weight = frozen_weight_in(tensors, shape).to(dtype).numbers()
    if shape.space == "retained":
        assert down is not None
        assert up is not None
        return LowRankWeight.of(weight.adapted(down, up), bias)
    return LowRankWeight.of(weight, bias, down, up)
