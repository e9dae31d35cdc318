"""From deployed layers in float32 to the same in 8 or 4 bits a number."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_jactus.deployment.layers import ColumnPivotedLinear, FactorizedLinear, LowRankLinear, RowPivotedLinear
from peft_jactus.deployment.parts import wide_weight
from peft_jactus.deployment.quantized_linear import QuantizedLinear
from peft_jactus.errors import NumericalWarning
from peft_jactus.numerics.quantization import BITS, bitsandbytes_functional, quantize, quantize_pair

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from peft_jactus.deployment.adapted import Adapted
    from peft_jactus.numerics.moments import LayerStatistics


def check_bits(bits: int | None) -> None:
    """Raise `ValueError` for a number of bits that there is not; `ImportError`, if what it needs is not installed."""
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise ValueError(f"`bits` must be one of {BITS}, or None; got {bits!r}.")
    if bits == 4:
        bitsandbytes_functional()


@dataclass(frozen=True)
class Rounding:
    """To how many bits the layers of an adapter are rounded, and by which statistics.

    Attributes:
        bits: 8, 4, or ``None`` for not at all.
        statistics: Of the layers, by full name; or ``None``.
    """

    bits: int | None
    statistics: Mapping[str, LayerStatistics] | None

    @classmethod
    def checked(cls, bits: int | None, statistics: Mapping[str, LayerStatistics] | None, adapted: Adapted) -> Rounding:
        """Check what a user asks for, before any work; see `export_compressed`."""
        check_bits(bits)
        if bits is None:
            return cls(None, None)
        if statistics is None and bits == 8:
            return cls(8, None)
        if statistics is None:
            warnings.warn(
                "4 bits without `statistics` round each number independently, which loses several times as much. Give "
                "what `calibrate` returned, or `CalibrationStatistics.load(file)`.",
                NumericalWarning,
                stacklevel=3,
            )
            return cls(4, None)
        missing = [name for name in adapted.config.layer_ranks if name not in statistics]
        if missing:
            raise ValueError(f"`statistics` has nothing of {missing[:5]}; give those of this model's calibration.")
        return cls(bits, statistics)

    def dtype_before(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of what is going to be rounded: wide, so that it is not rounded twice."""
        return dtype if self.bits is None else torch.promote_types(dtype, torch.float32)

    def of(self, name: str, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return the layer ``name``, rounded, for a model that runs it in ``dtype``."""
        if self.bits is None:
            return layer
        moment = None
        if self.statistics is not None:  # those from a file are in CPU memory
            moment = self.statistics[name].input.covariance.to(next(layer.parameters()).device)
        return quantized_layer(layer, self.bits, dtype=dtype, second_moment=moment)


@torch.no_grad()
def quantized_layer(
    layer: nn.Module, bits: int, *, dtype: torch.dtype, second_moment: Tensor | None = None
) -> FactorizedLinear | QuantizedLinear:
    """Return a layer whose weights are in 8 or 4 bits.

    Args:
        layer: A deployed layer, or a plain one, in float32.
        bits: 8 or 4.
        dtype: Of the model.
        second_moment: ``(in, in)`` of the layer's inputs. Default: all inputs alike.
    """
    pair = partial(_pair, bits=bits, dtype=dtype, second_moment=second_moment)
    if isinstance(layer, LowRankLinear):
        down, up = wide_weight(layer.down), wide_weight(layer.up)
        if bits < 8:
            # Any rotation between the factors gives the same weight. This one mixes large and small directions, which
            # share their groups' scales (as in QuIP: Chee et al., arXiv:2307.13304).
            rotation = _rotation(layer.rank).to(down)
            down, up = rotation @ down, up @ rotation.mT
        return LowRankLinear(*pair(down, up, layer.bias))
    if isinstance(layer, RowPivotedLinear):
        bias = None if layer.bias is None else layer.bias.detach().to(dtype, copy=True)
        return RowPivotedLinear(*pair(layer.rows.weight, layer.others.weight, None), layer.row_index, bias)
    if isinstance(layer, ColumnPivotedLinear):
        order = layer.column_index.long()
        parts = pair(layer.others.weight, layer.columns.weight, layer.bias, order=order)
        return ColumnPivotedLinear(*parts, layer.column_index)
    assert isinstance(layer, nn.Linear | Conv1D)
    weight = layer.weight.mT if isinstance(layer, Conv1D) else layer.weight
    stored = quantize(weight, bits, dtype=dtype, second_moment=second_moment)
    return QuantizedLinear.from_codes(*stored, _shape(weight), layer.bias)


def _pair(
    first: Tensor, second: Tensor, bias: Tensor | None, *, bits: int, dtype: torch.dtype, **options: Any
) -> tuple[QuantizedLinear, QuantizedLinear]:
    stored = quantize_pair(first, second, bits, dtype=dtype, **options)
    return (
        QuantizedLinear.from_codes(*stored[0], _shape(first), None),
        QuantizedLinear.from_codes(*stored[1], _shape(second), bias),
    )


def _shape(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns


def _rotation(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    rotation: Tensor = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator)).Q
    return rotation


def with_empty_codes(layer: FactorizedLinear, bits: int) -> FactorizedLinear:
    """Return a deployed layer without values, with parts of 8 or 4 bits in place of its parts, for a file to fill."""
    for name, part in layer.named_children():
        assert isinstance(part, nn.Linear)
        quantized = QuantizedLinear(
            part.in_features,
            part.out_features,
            bits,
            bias=part.bias is not None,
            device=part.weight.device,
            dtype=part.weight.dtype,
        )
        setattr(layer, name, quantized)
    return layer
