"""The product of inputs with ``left core right^T``, where the core trains.

The core is held in the coordinates of basis columns of one length: a step in one of its numbers changes the weight as
much as in any other, which an optimizer with steps of one size for all, like Adam, counts on. The bases are held as
``[I; T]`` (`interpolation.InterpolativeBasis`), cheaper to multiply with; so the core is scaled on its way in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peft_jactus._dtypes import autocast_dtype
from peft_jactus.numerics.interpolation import InterpolativeBasis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# What steps of one in all numbers of the core, with random signs, add to the weight: a Frobenius norm, the same for
# all ranks from here on. Chosen so that the learning rates of other adapters fit (benchmarks/notes/method.md).
STEP_NORM = 40


def step_scale(rank: int) -> float:
    """Return how much a step of one in one number of a core adds to the weight.

    Steps of Adam, of one size for all numbers, add up over a matrix: its best learning rate is inversely
    proportional to its width (Yang et al., arXiv:2203.03466). With this factor one rate serves all cores.
    """
    return min(1.0, STEP_NORM / rank)


def core_scales(left: InterpolativeBasis, right: InterpolativeBasis) -> tuple[Tensor, Tensor]:
    """Return ``(rank, 1)`` and ``(rank,)``: the core is that between the bases, times both."""
    return left.column_norms().unsqueeze(1) / step_scale(left.rank), right.column_norms()


class _CoreProduct(torch.autograd.Function):
    """`_product` with a gradient that gathers where the one of `index_select` would add up, which is slow.

    It keeps the inputs of the core, ``(rows, rank)``, and no other activation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor,
        left_order: Tensor,
        left: Tensor,
        right_order: Tensor,
        right: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        left_basis, right_basis = InterpolativeBasis(left_order, left), InterpolativeBasis(right_order, right)
        output, h, scales = _product(x, core, left_basis, right_basis, bias)
        ctx.save_for_backward(h, core, left_order, left, right_order, right, *scales)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, core, left_order, left, right_order, right, *scales = ctx.saved_tensors
        left_basis, right_basis = InterpolativeBasis(left_order, left), InterpolativeBasis(right_order, right)
        gradient_z = left_basis.project(gradient).to(core.dtype)  # (rows, rank)
        gradient_x = gradient_core = None
        if ctx.needs_input_grad[1]:
            gradient_core = _over(gradient_z.mT @ h, scales)
        if ctx.needs_input_grad[0]:
            gradient_h = (gradient_z @ _over(core, scales)).to(right.dtype)
            gradient_x = right_basis.expand(gradient_h)  # (rows, in)
        return gradient_x, gradient_core, None, None, None, None, None


def _over(core: Tensor, scales: Sequence[Tensor]) -> Tensor:
    for scale in scales:
        core = core / scale
    return core


def _product(
    x: Tensor,
    core: Tensor,
    left: InterpolativeBasis,
    right: InterpolativeBasis,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Return the output ``(rows, out)``, the inputs of the core ``(rows, rank)``, and the scales of the core."""
    scales = [scale.to(core.dtype) for scale in core_scales(left, right)]
    h = right.project(x).to(core.dtype)
    z = (h @ _over(core, scales).mT).to(left.coefficients.dtype)
    output = left.expand(z)
    if bias is not None:
        output = output.add_(bias)  # in place: one large allocation less
    return output, h, scales


def core_product(
    x: Tensor,
    core: Tensor,
    left: InterpolativeBasis,
    right: InterpolativeBasis,
    bias: Tensor | None,
) -> Tensor:
    """Return ``x right core' left^T + bias``, where ``core'`` is the core as the bases have it.

    Args:
        x: ``(..., in)``, of the dtype of the bases.
        core: ``(rank, rank)``, in the coordinates that it trains in (`core_scales`); its product is taken in its own
            dtype.
        left: Basis of the outputs, ``(out, rank)``.
        right: Basis of the inputs, ``(in, rank)``.
        bias: ``(out,)`` or ``None``; gets no gradient.

    Returns:
        ``(..., out)``, of the dtype of the bases.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, core = x.to(dtype), core.to(dtype)
        left, right = left.to(dtype), right.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():  # which makes its own gradient
            output = _product(rows, core, left, right, bias)[0]
        else:
            output = _CoreProduct.apply(  # type: ignore[no-untyped-call]  # torch has no annotation here
                rows, core, left.order, left.coefficients, right.order, right.coefficients, bias
            )
    return output.view(*x.shape[:-1], output.shape[-1])
