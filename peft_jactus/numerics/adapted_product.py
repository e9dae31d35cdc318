"""The product of inputs with a weight of low rank that does not train, and with adaptation ranks, which do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from peft_jactus._dtypes import autocast_dtype
from peft_jactus.numerics.frozen_weight import FrozenWeight

if TYPE_CHECKING:
    from torch import Tensor

    from peft_jactus.numerics.frozen_weight import RoundedWeight


class _AdaptedProduct(torch.autograd.Function):
    """`_product` with a gradient that gathers where autograd would add up, and adds up in place.

    It keeps the inputs once, as they came, and what the adaptation ranks see of them, ``(rows, adaptation rank)``.
    Of a weight in few bits it keeps the codes, and makes numbers of them once more for the gradient (as in QLoRA:
    Dettmers et al., arXiv:2305.14314).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: FrozenWeight | RoundedWeight, bias: Tensor | None, down: Tensor, up: Tensor
    ) -> Tensor:
        dtype = _dtype_of_adaptation(x, weight.dtype, down)
        seen = x.to(dtype) @ down.to(dtype).mT
        parts, ctx.put_together = weight.taken_apart()
        ctx.save_for_backward(x, seen, down, up, *parts)
        return _add_product_(weight.numbers().product(x.to(weight.dtype), bias), seen, up.to(dtype).mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, seen, down, up, *parts = ctx.saved_tensors
        of_x, *_, of_down, of_up = ctx.needs_input_grad
        gradient_of_adaptation = gradient.to(seen.dtype)
        gradient_seen = gradient_of_adaptation @ up.to(seen.dtype)
        gradient_x = gradient_down = gradient_up = None
        if of_x:
            gradient_x = ctx.put_together(*parts).transposed_product(gradient)
            gradient_x = _add_product_(gradient_x, gradient_seen, down.to(seen.dtype)).to(x.dtype)
        if of_down:
            gradient_down = (gradient_seen.mT @ x.to(seen.dtype)).to(down.dtype)
        if of_up:
            gradient_up = (gradient_of_adaptation.mT @ seen).to(up.dtype)
        return gradient_x, None, None, gradient_down, gradient_up


def _dtype_of_adaptation(x: Tensor, dtype: torch.dtype, down: Tensor) -> torch.dtype:
    """Return the dtype of the products with what trains: its own, but bfloat16 in a bfloat16 model, as under autocast.

    In float32 the few adaptation ranks of a wide bfloat16 layer would take as long as a third of the frozen weight.
    Float16 overflows in the sums of gradients.
    """
    return torch.bfloat16 if x.dtype == dtype == torch.bfloat16 else down.dtype


def _add_product_(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add ``left @ right`` in place: one large allocation less. A narrower ``output`` is rounded once."""
    same = output.dtype == left.dtype
    return output.addmm_(left, right) if same else output.add_(left @ right)


def _frozen_product(x: Tensor, weight: FrozenWeight | RoundedWeight, bias: Tensor | None) -> Tensor:
    """Return the product in a graph that is compiled; its gradient makes numbers of codes once more."""
    parts, put_together = weight.taken_apart()

    def product(x: Tensor, *parts: Tensor) -> Tensor:
        return put_together(*parts).product(x, bias)

    if isinstance(weight, FrozenWeight) or not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return product(x, *parts)
    output: Tensor = checkpoint(product, x, *parts, use_reentrant=False)
    return output


def adapted_product(
    x: Tensor, weight: FrozenWeight | RoundedWeight, bias: Tensor | None, down: Tensor, up: Tensor
) -> Tensor:
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
        weight, x, down, up = weight.to(dtype), x.to(dtype), down.to(dtype), up.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():  # which makes its own gradient
            adapting = _dtype_of_adaptation(rows, weight.dtype, down)
            output = _frozen_product(rows.to(weight.dtype), weight, bias)
            output = (output + rows.to(adapting) @ down.to(adapting).mT @ up.to(adapting).mT).to(output.dtype)
        else:
            output = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]  # torch has no annotation here
                rows, weight, bias, down, up
            )
    return output.view(*x.shape[:-1], output.shape[-1])
