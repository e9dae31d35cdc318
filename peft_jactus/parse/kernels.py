"""The product of the chosen factors, ``up (down x)``: as one kernel where that pays, as two products elsewhere."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

# With more vectors the two products are no longer bound by reading the factors.
MAX_FUSED_ROWS = 16


def low_rank_product(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``up (down x) + bias``.

    Args:
        x: ``(..., in)``.
        down: ``(rank, in)``.
        up: ``(out, rank)``.
        bias: ``(out,)`` or ``None``.

    Returns:
        ``(..., out)``.
    """
    if _can_fuse(x, down):
        from peft_jactus.parse.fused import fused_low_rank_product  # imports Triton

        return fused_low_rank_product(x, down, up, bias)
    return functional.linear(functional.linear(x, down), up, bias)


def _can_fuse(x: Tensor, down: Tensor) -> bool:
    """Whether a GPU decodes: a few vectors, no gradients, the dtypes of the kernel."""
    return (
        x.is_cuda
        and x.numel() <= MAX_FUSED_ROWS * x.shape[-1]
        and down.dtype == x.dtype
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and not torch.is_autocast_enabled("cuda")
        and not (torch.is_grad_enabled() and x.requires_grad)
        and importlib.util.find_spec("triton") is not None
    )
