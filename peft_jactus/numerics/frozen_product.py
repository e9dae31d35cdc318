"""The product of inputs with a weight of low rank that does not train, held as some of its rows or of its columns.

``W = B F``, where ``F`` ``(rank, in)`` are rows of the weight that span all of them and ``B`` ``(out, rank)`` is an
`interpolation.InterpolativeBasis`; or ``W = F B^T`` with columns ``F`` ``(out, rank)`` and ``B`` ``(in, rank)``. Both
take ``rank (out + in - rank)`` numbers, and as many multiplications. The basis is that of the smaller side, where
putting features in order costs less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peft_jactus._dtypes import autocast_dtype
from peft_jactus.numerics.interpolation import InterpolativeBasis

if TYPE_CHECKING:
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

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return ``left`` ``(out, rank)`` and ``right`` ``(in, rank)``, whose product ``left right^T`` it is."""
        return (self.basis.dense(), self.factor.mT) if self.by_rows else (self.factor, self.basis.dense())

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map rows ``(rows, in)`` to ``(rows, out)``."""
        output = self.basis.expand(x @ self.factor.mT) if self.by_rows else self.basis.project(x) @ self.factor.mT
        return output if bias is None else output.add_(bias)  # in place: one large allocation less

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """Map the gradient of `product` ``(rows, out)`` to that of its inputs ``(rows, in)``."""
        if self.by_rows:
            return self.basis.project(gradient) @ self.factor
        return self.basis.expand(gradient @ self.factor)


class _FrozenProduct(torch.autograd.Function):
    """`FrozenWeight.product`; keeps no activation, and gathers in the backward pass where autograd would add up."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, order: Tensor, coefficients: Tensor, factor: Tensor, bias: Tensor | None, by_rows: bool
    ) -> Tensor:
        ctx.save_for_backward(order, coefficients, factor)
        ctx.by_rows = by_rows
        return FrozenWeight(InterpolativeBasis(order, coefficients), factor, by_rows).product(x, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        order, coefficients, factor = ctx.saved_tensors
        weight = FrozenWeight(InterpolativeBasis(order, coefficients), factor, ctx.by_rows)
        return weight.transposed_product(gradient), None, None, None, None, None


def frozen_product(x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + bias``; only ``x`` gets a gradient.

    Args:
        x: ``(..., in)``, of the dtype of the weight.
        weight: ``W`` ``(out, in)``.
        bias: ``(out,)`` or ``None``.

    Returns:
        ``(..., out)``, of the dtype of the weight, or of autocast.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        basis = InterpolativeBasis(weight.basis.order, weight.basis.coefficients.to(dtype))
        x, weight = x.to(dtype), FrozenWeight(basis, weight.factor.to(dtype), weight.by_rows)
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():  # which makes its own gradient
            output = weight.product(rows, bias)
        else:
            output = _FrozenProduct.apply(  # type: ignore[no-untyped-call]  # torch has no annotation here
                rows, weight.basis.order, weight.basis.coefficients, weight.factor, bias, weight.by_rows
            )
    return output.view(*x.shape[:-1], output.shape[-1])
