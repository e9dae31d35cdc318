"""From deployed layers in float32 to the same in 8 or 4 bits a number.

8 bits are rounded number by number. 4 bits would hurt: the first of a layer's two parts sums up correlated inputs, and
the second sees little else than a few directions of what comes out. So both are rounded with feedback by the inputs'
second moment, as calibration collected it, the second after it was fitted anew to the rounded first.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_jactus.deployment.layers import ColumnPivotedLinear, FactorizedLinear, LowRankLinear, RowPivotedLinear
from peft_jactus.deployment.parts import linear_part, wide_weight
from peft_jactus.deployment.quantized_linear import QuantizedLinear
from peft_jactus.errors import NumericalWarning
from peft_jactus.numerics.linalg import to_decomposition_dtype
from peft_jactus.numerics.quantization import BITS, bitsandbytes_functional
from peft_jactus.numerics.rounding import fit_to_inputs

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
        if bits != 4:
            return cls(bits, None)
        if statistics is None:
            warnings.warn(
                "4 bits without `statistics` round each number by itself, which loses several times as much. Give "
                "what `calibrate` returned, or `CalibrationStatistics.load(file)`.",
                NumericalWarning,
                stacklevel=3,
            )
            return cls(4, None)
        missing = [name for name in adapted.config.layer_ranks if name not in statistics]
        if missing:
            raise ValueError(f"`statistics` has nothing of {missing[:5]}; give those of this model's calibration.")
        return cls(4, statistics)

    def dtype_before(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of what is going to be rounded: wide, so that it is not rounded twice."""
        return dtype if self.bits is None else torch.promote_types(dtype, torch.float32)

    def of(self, name: str, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return the layer ``name``, rounded, for a model of ``dtype``."""
        if self.bits is None:
            return layer
        moment = None if self.statistics is None else self.statistics[name].input.covariance
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
        second_moment: ``(in, in)`` of the layer's inputs. Default: all inputs alike. 8 bits do without.
    """
    rounding = _Parts(bits, dtype)
    if not isinstance(layer, FactorizedLinear):
        assert isinstance(layer, nn.Linear | Conv1D)
        weight = layer.weight.mT if isinstance(layer, Conv1D) else layer.weight
        return rounding.part(weight, layer.bias, second_moment)
    if second_moment is None:
        second_moment = torch.eye(layer.in_features, dtype=torch.float64, device=layer.weight.device)
    if isinstance(layer, LowRankLinear):
        return _low_rank(layer, rounding, second_moment)
    if isinstance(layer, RowPivotedLinear):
        return _row_pivoted(layer, rounding, second_moment)
    assert isinstance(layer, ColumnPivotedLinear)
    return _column_pivoted(layer, rounding, second_moment)


class _Parts:
    """How the parts of a layer are rounded: 8 bits at once, 4 bits by the second moment of what they see."""

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        self.bits, self.dtype = bits, dtype

    def part(self, weight: Tensor, bias: Tensor | None, second_moment: Tensor | None) -> QuantizedLinear:
        """Return a rounded part ``(out, in)``, whose inputs have ``second_moment`` ``(in, in)``."""
        linear = linear_part(weight, bias, torch.float32, weight.device)
        moment = second_moment if self.bits < 8 else None
        return QuantizedLinear.from_linear(linear, self.bits, dtype=self.dtype, second_moment=moment)

    def second_part(
        self, layer_weight: Tensor, first: Tensor, as_it_was: Tensor, bias: Tensor | None, second_moment: Tensor
    ) -> QuantizedLinear:
        """Return what is nearest to ``layer_weight`` behind the rounded ``first`` ``(rank, in)``, rounded.

        With 8 bits that is the part ``as_it_was``.
        """
        if self.bits == 8:
            return self.part(as_it_was, bias, None)
        first = to_decomposition_dtype(first)
        fitted = fit_to_inputs(layer_weight, first, second_moment)
        return self.part(fitted, bias, first @ to_decomposition_dtype(second_moment) @ first.mT)


def _low_rank(layer: LowRankLinear, rounding: _Parts, second_moment: Tensor) -> LowRankLinear:
    up, down = wide_weight(layer.up), wide_weight(layer.down)
    if rounding.bits < 8:
        # Any rotation between the factors gives the same weight. This one mixes large and small directions, which
        # share their groups' scales (as in QuIP: Chee et al., arXiv:2307.13304).
        rotation = _rotation(layer.rank).to(down)
        up, down = up @ rotation.mT, rotation @ down
    first = rounding.part(down, None, second_moment)
    second = rounding.second_part(up @ down, first.dense_weight(), up, layer.bias, second_moment)
    return LowRankLinear(first, second)


def _rotation(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    rotation: Tensor = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator)).Q
    return rotation


def _row_pivoted(layer: RowPivotedLinear, rounding: _Parts, second_moment: Tensor) -> RowPivotedLinear:
    rows = rounding.part(layer.rows.weight, None, second_moment)
    others = layer.row_index.argsort()[layer.rank :]
    second = rounding.second_part(
        layer.dense_weight()[others], rows.dense_weight(), layer.others.weight, None, second_moment
    )
    bias = None if layer.bias is None else layer.bias.detach().to(rounding.dtype, copy=True)
    return RowPivotedLinear(rows, second, layer.row_index, bias)


def _column_pivoted(layer: ColumnPivotedLinear, rounding: _Parts, second_moment: Tensor) -> ColumnPivotedLinear:
    order = layer.column_index.long()
    rest = order[layer.rank :]
    others = rounding.part(layer.others.weight, None, second_moment[rest][:, rest])
    coefficients = to_decomposition_dtype(others.dense_weight())
    combined = coefficients.new_zeros(layer.rank, layer.in_features)  # what the columns see, of the inputs
    combined[:, order[: layer.rank]] = torch.eye(layer.rank).to(coefficients)
    combined[:, rest] = coefficients
    columns = rounding.second_part(layer.dense_weight(), combined, layer.columns.weight, layer.bias, second_moment)
    return ColumnPivotedLinear(others, columns, layer.column_index)


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
