"""The product of inputs with a weight of low rank that does not train, and with adaptation ranks, which do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from peft_jactus._dtypes import autocast_dtype
from peft_jactus.numerics.frozen_weight import FrozenWeight

if TYPE_CHECKING:
    from torch import Tensor

    from peft_jactus.numerics.adaptation import AdaptationSpace
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


class _RetainedProduct(torch.autograd.Function):
    """`_retained_product` with a gradient that keeps as little, and is made in the same ways."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: FrozenWeight | RoundedWeight, bias: Tensor | None, down: Tensor, up: Tensor
    ) -> Tensor:
        dtype = _dtype_of_adaptation(x, weight.dtype, down)
        parts, ctx.put_together = weight.taken_apart()
        output, seen = _retained_product(x.to(weight.dtype), weight.numbers(), bias, down.to(dtype), up.to(dtype))
        ctx.save_for_backward(x, seen, down, up, *parts)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, seen, down, up, *parts = ctx.saved_tensors
        of_x, *_, of_down, of_up = ctx.needs_input_grad
        weight: FrozenWeight = ctx.put_together(*parts)
        scale_of_down, scale_of_up = weight.scales_of_adaptation(seen.dtype)
        gradient_z = weight.transposed_after_factor(gradient)
        gradient_of_adaptation = gradient_z.to(seen.dtype)
        gradient_seen = gradient_of_adaptation @ (up.to(seen.dtype) * scale_of_up)
        gradient_x = gradient_down = gradient_up = None
        if of_x:
            scaled_down = down.to(seen.dtype) * scale_of_down
            gradient_z = _add_product_(gradient_z @ weight.factor, gradient_seen, scaled_down)
            gradient_x = weight.transposed_before_factor(gradient_z).to(x.dtype)
        if of_down:
            # First over the rows, so that what enters the factor need not be made again. Float16 would lose small
            # sums, and overflow in large ones.
            gradient_down = weight.before_factor(gradient_seen.mT @ x.to(seen.dtype))
            gradient_down = (gradient_down * scale_of_down).to(down.dtype)
        if of_up:
            gradient_up = (gradient_of_adaptation.mT @ seen * scale_of_up).to(up.dtype)
        return gradient_x, None, None, gradient_down, gradient_up


def _retained_product(
    x: Tensor, weight: FrozenWeight, bias: Tensor | None, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output ``(rows, out)``, and what the adaptation ranks see ``(rows, adaptation rank)``."""
    of_down, of_up = weight.scales_of_adaptation(down.dtype)
    entering = weight.before_factor(x)
    seen = entering.to(down.dtype) @ (down * of_down).mT
    return weight.after_factor(_add_product_(entering @ weight.factor.mT, seen, (up * of_up).mT), bias), seen


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


def _compiled_retained_product(
    x: Tensor, weight: FrozenWeight | RoundedWeight, bias: Tensor | None, down: Tensor, up: Tensor
) -> Tensor:
    parts, put_together = weight.taken_apart()

    def product(x: Tensor, down: Tensor, up: Tensor, *parts: Tensor) -> Tensor:
        return _retained_product(x, put_together(*parts), bias, down, up)[0]

    if isinstance(weight, FrozenWeight) or not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return product(x, down, up, *parts)
    output: Tensor = checkpoint(product, x, down, up, *parts, use_reentrant=False)
    return output


def adapted_product(
    x: Tensor,
    weight: FrozenWeight | RoundedWeight,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    space: AdaptationSpace = "free",
) -> Tensor:
    """Return the product with the weight and its adaptation; ``x``, ``up`` and ``down`` get gradients.

    ``x (W + up down)^T + bias``; or, in the retained space, that with ``F + up down`` in place of the factor ``F`` of
    ``W`` (see `FrozenWeight`), in coordinates of basis columns of length one (`FrozenWeight.scales_of_adaptation`).

    Args:
        x: ``(..., in)``.
        weight: ``W`` ``(out, in)``.
        bias: ``(out,)`` or ``None``, of the dtype of the weight.
        down: ``(adaptation rank, in)``; in the retained space, ``(adaptation rank, columns of F)``.
        up: ``(out, adaptation rank)``; in the retained space, ``(rows of F, adaptation rank)``.
        space: Which of the two.

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
            down, up = down.to(adapting), up.to(adapting)
            if space == "retained":
                output = _compiled_retained_product(rows.to(weight.dtype), weight, bias, down, up)
            else:
                output = _frozen_product(rows.to(weight.dtype), weight, bias)
                output = (output + rows.to(adapting) @ down.mT @ up.mT).to(output.dtype)
        else:
            function = _RetainedProduct if space == "retained" else _AdaptedProduct
            output = function.apply(  # type: ignore[no-untyped-call]  # torch has no annotation here
                rows, weight, bias, down, up
            )
    return output.view(*x.shape[:-1], output.shape[-1])
