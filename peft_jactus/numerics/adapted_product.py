"""The product of inputs with a weight of low rank that does not train, and with adaptation ranks, which do.

The weight is held as some of its rows or of its columns: ``W = B F``, where ``F`` ``(rank, in)`` are rows of the
weight that span all of them and ``B`` ``(out, rank)`` is an `interpolation.InterpolativeBasis`; or ``W = F B^T`` with
columns ``F`` ``(out, rank)`` and ``B`` ``(in, rank)``. Both take ``rank (out + in - rank)`` numbers, and as many
multiplications. The basis is that of the smaller side, where putting features in order costs less.
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


class _AdaptedProduct(torch.autograd.Function):
    """`_product` with a gradient that gathers where autograd would add up, and adds up in place.

    It keeps the inputs once, as they came, and what the adaptation ranks see of them, ``(rows, adaptation rank)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        order: Tensor,
        coefficients: Tensor,
        factor: Tensor,
        by_rows: bool,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
    ) -> Tensor:
        weight = FrozenWeight(InterpolativeBasis(order, coefficients), factor, by_rows)
        dtype = _dtype_of_adaptation(x, factor, down)
        seen = x.to(dtype) @ down.to(dtype).mT
        ctx.save_for_backward(x, seen, order, coefficients, factor, down, up)
        ctx.by_rows = by_rows
        return _add_product_(weight.product(x.to(factor.dtype), bias), seen, up.to(dtype).mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, seen, order, coefficients, factor, down, up = ctx.saved_tensors
        of_x, *_, of_down, of_up = ctx.needs_input_grad
        gradient_of_adaptation = gradient.to(seen.dtype)
        gradient_seen = gradient_of_adaptation @ up.to(seen.dtype)
        gradient_x = gradient_down = gradient_up = None
        if of_x:
            weight = FrozenWeight(InterpolativeBasis(order, coefficients), factor, ctx.by_rows)
            gradient_x = weight.transposed_product(gradient)
            gradient_x = _add_product_(gradient_x, gradient_seen, down.to(seen.dtype)).to(x.dtype)
        if of_down:
            gradient_down = (gradient_seen.mT @ x.to(seen.dtype)).to(down.dtype)
        if of_up:
            gradient_up = (gradient_of_adaptation.mT @ seen).to(up.dtype)
        return gradient_x, None, None, None, None, None, gradient_down, gradient_up


def _dtype_of_adaptation(x: Tensor, factor: Tensor, down: Tensor) -> torch.dtype:
    """Return the dtype of the products with what trains: its own, but bfloat16 in a bfloat16 model, as under autocast.

    In float32 the few adaptation ranks of a wide bfloat16 layer would take as long as a third of the frozen weight.
    Float16 overflows in the sums of gradients.
    """
    return torch.bfloat16 if x.dtype == factor.dtype == torch.bfloat16 else down.dtype


def _add_product_(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add ``left @ right`` in place: one large allocation less. A narrower ``output`` is rounded once."""
    same = output.dtype == left.dtype
    return output.addmm_(left, right) if same else output.add_(left @ right)


def adapted_product(x: Tensor, weight: FrozenWeight, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """Return ``x (W + up down)^T + bias``; ``x``, ``up`` and ``down`` get gradients.

    Args:
        x: ``(..., in)``.
        weight: ``W`` ``(out, in)``.
        bias: ``(out,)`` or ``None``, of the dtype of the weight.
        down: ``(adaptation rank, in)``.
        up: ``(out, adaptation rank)``.

    Returns:
        ``(..., out)``, of the dtype of the weight, or of autocast.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        basis = InterpolativeBasis(weight.basis.order, weight.basis.coefficients.to(dtype))
        weight = FrozenWeight(basis, weight.factor.to(dtype), weight.by_rows)
        x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():  # which makes its own gradient
            adapting = _dtype_of_adaptation(rows, weight.factor, down)
            output = weight.product(rows.to(weight.factor.dtype), bias)
            output = (output + rows.to(adapting) @ down.to(adapting).mT @ up.to(adapting).mT).to(output.dtype)
        else:
            output = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]  # torch has no annotation here
                rows, weight.basis.order, weight.basis.coefficients, weight.factor, weight.by_rows, bias, down, up
            )
    return output.view(*x.shape[:-1], output.shape[-1])
