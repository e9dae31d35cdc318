"""One Triton kernel for a low-rank product with few vectors, as in decoding.

Two products are two kernels, and the second waits for the last block of the first. Here each program takes a block of
ranks through both: it reads its rows of ``down`` and its columns of ``up`` once, and adds its part of the
result to what the others add (split-K). Nothing but the sum, in float32, is written to memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

_RANK_BLOCK = 16
_FEATURE_BLOCK = 256


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(
    x: Any,
    down: Any,
    up: Any,
    sums: Any,
    num_rows: Any,
    in_features: Any,
    out_features: Any,
    rank: Any,
    up_out_stride: Any,
    up_rank_stride: Any,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
) -> None:
    rows = tl.arange(0, ROWS)
    ranks = tl.program_id(0) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    features = tl.arange(0, FEATURE_BLOCK)
    # (ROWS, RANK_BLOCK): the block's part of `down x`
    hidden = tl.zeros((ROWS, RANK_BLOCK), dtype=tl.float32)
    for start in range(0, in_features, FEATURE_BLOCK):
        columns = start + features
        x_block = tl.load(
            x + rows[:, None] * in_features + columns[None, :],
            mask=(rows[:, None] < num_rows) & (columns[None, :] < in_features),
            other=0.0,
        ).to(tl.float32)
        down_block = tl.load(
            down + ranks[:, None] * in_features + columns[None, :],
            mask=(ranks[:, None] < rank) & (columns[None, :] < in_features),
            other=0.0,
        ).to(tl.float32)
        hidden += tl.sum(x_block[:, None, :] * down_block[None, :, :], axis=2)
    # Its part of `up (down x)`
    for start in range(0, out_features, FEATURE_BLOCK):
        columns = start + features
        up_block = tl.load(
            up + columns[:, None] * up_out_stride + ranks[None, :] * up_rank_stride,
            mask=(columns[:, None] < out_features) & (ranks[None, :] < rank),
            other=0.0,
        ).to(tl.float32)
        part = tl.sum(hidden[:, None, :] * up_block[None, :, :], axis=2)  # (ROWS, FEATURE_BLOCK)
        tl.atomic_add(
            sums + rows[:, None] * out_features + columns[None, :],
            part,
            mask=(rows[:, None] < num_rows) & (columns[None, :] < out_features),
        )


def fused_low_rank_product(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``up (down x) + bias``, as `low_rank_product`, summed in float32 in no fixed order.

    Args:
        x: ``(..., in)``, few vectors.
        down: ``(rank, in)``.
        up: ``(out, rank)``, in either layout.
        bias: ``(out,)`` or ``None``.

    Returns:
        ``(..., out)``, in the dtype of ``x``.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out_features, rank = up.shape
    sums = torch.zeros(len(flat), out_features, device=x.device, dtype=torch.float32)
    if bias is not None:
        sums += bias
    if rank:
        _kernel[(triton.cdiv(rank, _RANK_BLOCK),)](
            flat,
            down.contiguous(),
            up,
            sums,
            len(flat),
            flat.shape[1],
            out_features,
            rank,
            up.stride(0),
            up.stride(1),
            ROWS=triton.next_power_of_2(len(flat)),
            RANK_BLOCK=_RANK_BLOCK,
            FEATURE_BLOCK=_FEATURE_BLOCK,
        )
    return sums.to(x.dtype).reshape(*x.shape[:-1], out_features)
