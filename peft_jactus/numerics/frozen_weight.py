"""A weight of low rank that does not train, held as some of its rows or of its columns.

``W = B F``, where ``F`` ``(rank, in)`` are rows of the weight that span all of them and ``B`` ``(out, rank)`` is an
`interpolation.InterpolativeBasis`; or ``W = F B^T`` with columns ``F`` ``(out, rank)`` and ``B`` ``(in, rank)``. Both
take ``rank (out + in - rank)`` numbers, and as many multiplications. The basis is that of the smaller side, where
putting features in order costs less.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from peft_jactus.numerics.interpolation import InterpolativeBasis
from peft_jactus.numerics.quantization import dequantize, quantize, quantize_pair

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor


def has_row_basis(out_features: int, in_features: int) -> bool:
    """Whether a frozen weight of this shape is held as some of its rows; else as some of its columns."""
    return out_features <= in_features


@dataclass(frozen=True)
class FrozenWeight:
    """A weight ``(out, in)`` of low rank.

    Attributes:
        basis: Of the rows, ``(out, rank)``, if ``by_rows``; else of the columns, ``(in, rank)``.
        factor: ``(rank, in)`` rows; else ``(out, rank)`` columns.
        by_rows: Which of the two.
    """

    basis: InterpolativeBasis
    factor: Tensor
    by_rows: bool

    @classmethod
    def from_factors(cls, left: InterpolativeBasis, core: Tensor, right: InterpolativeBasis) -> FrozenWeight:
        """Return the weight ``left core right^T``."""
        if has_row_basis(left.dim, right.dim):
            return cls(left, core @ right.dense().mT, by_rows=True)
        return cls(right, left.dense() @ core, by_rows=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the products with it."""
        return self.factor.dtype

    def to(self, dtype: torch.dtype) -> FrozenWeight:
        """Return the weight in another dtype."""
        return FrozenWeight(self.basis.to(dtype), self.factor.to(dtype), self.by_rows)

    def numbers(self) -> FrozenWeight:
        """Return the weight itself; see `RoundedWeight.numbers`."""
        return self

    def taken_apart(self) -> tuple[tuple[Tensor, ...], Callable[..., FrozenWeight]]:
        """Return what it is made of, and how to make it of that."""
        parts = (self.basis.order, self.basis.coefficients, self.factor)
        return parts, partial(_put_together, by_rows=self.by_rows)

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return ``left`` ``(out, rank)`` and ``right`` ``(in, rank)``, whose product ``left right^T`` it is."""
        return (self.basis.dense(), self.factor.mT) if self.by_rows else (self.factor, self.basis.dense())

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map rows ``(rows, in)`` to ``(rows, out)``."""
        return self.after_factor(self.before_factor(x) @ self.factor.mT, bias)

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """Map the gradient of `product` ``(rows, out)`` to that of its inputs ``(rows, in)``."""
        return self.transposed_before_factor(self.transposed_after_factor(gradient) @ self.factor)

    def before_factor(self, x: Tensor) -> Tensor:
        """Map rows ``(rows, in)`` to what the factor is multiplied with, in their dtype: them, or ``(rows, rank)``."""
        return x if self.by_rows else self.basis.to(x.dtype).project(x)

    def after_factor(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """Map rows of that product to those of the whole one ``(rows, out)``; ``z`` may be overwritten."""
        output = self.basis.expand(z) if self.by_rows else z
        return output if bias is None else output.add_(bias)  # in place: one large allocation less

    def transposed_before_factor(self, gradient: Tensor) -> Tensor:
        """Map the gradient of what `before_factor` returns to that of its inputs."""
        return gradient if self.by_rows else self.basis.expand(gradient)

    def transposed_after_factor(self, gradient: Tensor) -> Tensor:
        """Map the gradient of what `after_factor` returns to that of its inputs."""
        return self.basis.project(gradient) if self.by_rows else gradient

    def scales_of_adaptation(self, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
        """Return what ``down`` and ``up`` of an adapted factor are multiplied with, for basis columns of length one.

        So a step of an optimizer in any of their numbers changes the weight alike (cf. `core_product`). The first is
        ``(1, rank)`` if the factor holds columns, the second ``(rank, 1)`` if it holds rows; the other is one.
        """
        scales = self.basis.column_norms().reciprocal().to(dtype)
        # A number: torch.compile fails where it makes a tensor of ones once more for the gradient (inductor, float32).
        return (1.0, scales.unsqueeze(1)) if self.by_rows else (scales.unsqueeze(0), 1.0)

    def adapted(self, down: Tensor, up: Tensor) -> FrozenWeight:
        """Return the weight with ``factor + up down`` in place of the factor, both scaled as for `adapted_product`."""
        of_down, of_up = self.scales_of_adaptation(self.dtype)
        change = (up.to(self.dtype) * of_up) @ (down.to(self.dtype) * of_down)
        return dataclasses.replace(self, factor=self.factor + change)

    def rounded(self, bits: int, *, dtype: torch.dtype, second_moment: Tensor | None) -> RoundedWeight:
        """Return the weight in 8 or 4 bits a number.

        Args:
            bits: 8 or 4.
            dtype: Of the scales, and of products.
            second_moment: ``(in, in)`` of the inputs, for rounding to 4 bits; ``None``: all inputs alike.
        """
        coefficients, order = self.basis.coefficients, self.basis.order
        if second_moment is not None:
            second_moment = second_moment.to(self.factor.device)
        if not coefficients.numel():  # full rank: the factor is the weight
            second_moment = None if bits == 8 else second_moment
            of_factor = quantize(self.factor, bits, dtype=dtype, second_moment=second_moment)
            of_coefficients = quantize(coefficients, bits, dtype=dtype)
        elif self.by_rows:
            of_factor, of_coefficients = quantize_pair(
                self.factor, coefficients, bits, dtype=dtype, second_moment=second_moment
            )
        else:
            of_coefficients, of_factor = quantize_pair(
                coefficients.mT.contiguous(), self.factor, bits, dtype=dtype, second_moment=second_moment, order=order
            )
        long_side = self.factor.shape[1 if self.by_rows else 0]
        return RoundedWeight(order, *of_coefficients, *of_factor, self.by_rows, self.basis.rank, long_side, dtype)


def _put_together(order: Tensor, coefficients: Tensor, factor: Tensor, *, by_rows: bool) -> FrozenWeight:
    return FrozenWeight(InterpolativeBasis(order, coefficients), factor, by_rows)


@dataclass(frozen=True)
class RoundedWeight:
    """A `FrozenWeight` in 8 or 4 bits a number (`quantization`).

    Attributes:
        order: That of the basis, ``(short side,)``.
        coefficients: Codes of those of the basis, ``(others, rank)``, if ``by_rows``; else of their transpose.
        coefficient_scales: Their scales.
        factor: Codes of the factor.
        factor_scales: Their scales.
        by_rows: As that of `FrozenWeight`.
        rank: Of the weight.
        long_side: The larger one of ``out`` and ``in``.
        dtype: Of the products with it.
    """

    order: Tensor
    coefficients: Tensor
    coefficient_scales: Tensor
    factor: Tensor
    factor_scales: Tensor
    by_rows: bool
    rank: int
    long_side: int
    dtype: torch.dtype

    def to(self, dtype: torch.dtype) -> RoundedWeight:
        """Return the weight for products in another dtype; nothing is rounded before they are made."""
        return dataclasses.replace(self, dtype=dtype)

    def numbers(self) -> FrozenWeight:
        """Return the weight in numbers to compute with, made anew at each call."""
        parts, put_together = self.taken_apart()
        return put_together(*parts)

    def taken_apart(self) -> tuple[tuple[Tensor, ...], Callable[..., FrozenWeight]]:
        """Return the codes and scales that it is made of, and how to make numbers of them."""
        parts = (self.order, self.coefficients, self.coefficient_scales, self.factor, self.factor_scales)
        return parts, partial(
            _dequantized, by_rows=self.by_rows, rank=self.rank, long_side=self.long_side, dtype=self.dtype
        )


def _dequantized(
    order: Tensor,
    coefficients: Tensor,
    coefficient_scales: Tensor,
    factor: Tensor,
    factor_scales: Tensor,
    *,
    by_rows: bool,
    rank: int,
    long_side: int,
    dtype: torch.dtype,
) -> FrozenWeight:
    num_others = order.shape[0] - rank
    of_factor, of_coefficients = (rank, long_side), (num_others, rank)
    if not by_rows:
        of_factor, of_coefficients = of_factor[::-1], of_coefficients[::-1]
    found = dequantize(coefficients, coefficient_scales, of_coefficients).to(dtype)
    basis = InterpolativeBasis(order, found if by_rows else found.mT)
    return FrozenWeight(basis, dequantize(factor, factor_scales, of_factor).to(dtype), by_rows)
