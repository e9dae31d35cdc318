"""One Triton kernel for a low-rank product with few vectors, as in decoding.

Two products are two kernels, and the second waits for the last block of the first. Here each program takes a block of
ranks through both: it reads its rows of ``down`` and its columns of ``up`` once, and adds its part of the
result to what the others add (split-K). Nothing but the sum, in float32, is written to memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

# Tensor cores take 16 rows at once; rows that are missing cost no reads.
_MIN_ROWS = 16
_RANK_BLOCK = 16
# Of a block's row. The blocks in flight take at most 49 KiB of shared memory, and at most 12 bytes of registers spill
# (compiled for sm_80 and sm_90 by Triton 3.9, with 1 and 16 rows, float32 and bfloat16).
_FEATURE_BYTES = 512
# Blocks are loaded while others are multiplied: the programs are few and have to keep the memory busy.
_STAGES = 4


# Triton resolves annotations when it compiles for a GPU (its interpreter does not), and refuses any but its own.
@triton.jit  # type: ignore[untyped-decorator]  # mypy skips Triton: see pyproject.toml
def _kernel(
    x: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    bias: tl.tensor,
    sums: tl.tensor,
    num_rows: tl.tensor,
    in_features: tl.tensor,
    out_features: tl.tensor,
    rank: tl.tensor,
    up_out_stride: tl.tensor,
    up_rank_stride: tl.tensor,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    FEATURE_BLOCK: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    rows = tl.arange(0, ROWS)[:, None]
    ranks = block * RANK_BLOCK + tl.arange(0, RANK_BLOCK).to(tl.int64)
    features = tl.arange(0, FEATURE_BLOCK).to(tl.int64)  # `up` may have more elements than int32 counts
    # (ROWS, RANK_BLOCK): the block's part of `down x`
    hidden = tl.zeros((ROWS, RANK_BLOCK), dtype=tl.float32)
    for start in range(0, in_features, FEATURE_BLOCK):
        columns = start + features
        x_block = tl.load(
            x + rows * in_features + columns[None, :],
            mask=(rows < num_rows) & (columns[None, :] < in_features),
            other=0.0,
        )
        down_block = tl.load(
            down + ranks[None, :] * in_features + columns[:, None],
            mask=(ranks[None, :] < rank) & (columns[:, None] < in_features),
            other=0.0,
        )
        hidden = tl.dot(x_block, down_block, hidden, input_precision="ieee")
    # Its part of `up (down x) + bias`
    factor = hidden.to(up.dtype.element_ty)
    bias_features = tl.where(block == 0, out_features, 0)  # added once
    for start in range(0, out_features, FEATURE_BLOCK):
        columns = start + features
        up_block = tl.load(
            up + columns[None, :] * up_out_stride + ranks[:, None] * up_rank_stride,
            mask=(columns[None, :] < out_features) & (ranks[:, None] < rank),
            other=0.0,
        )
        part = tl.dot(factor, up_block, input_precision="ieee")  # (ROWS, FEATURE_BLOCK)
        if bias is not None:
            part += tl.load(bias + columns, mask=columns < bias_features, other=0.0)[None, :]
        tl.atomic_add(
            sums + rows * out_features + columns[None, :],
            part,
            mask=(rows < num_rows) & (columns[None, :] < out_features),
            sem="relaxed",  # nothing is read before all programs have ended
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
    num_blocks = max(1, triton.cdiv(rank, _RANK_BLOCK))  # the first adds the bias
    with torch.cuda.device(x.get_device()):  # Triton launches on the current device
        _kernel[(num_blocks,)](
            flat,
            down.contiguous(),
            up,
            bias,
            sums,
            len(flat),
            flat.shape[1],
            out_features,
            rank,
            up.stride(0),
            up.stride(1),
            ROWS=max(_MIN_ROWS, triton.next_power_of_2(len(flat))),
            RANK_BLOCK=_RANK_BLOCK,
            FEATURE_BLOCK=_FEATURE_BYTES // x.element_size(),
            num_stages=_STAGES,
        )
    return sums.to(x.dtype).reshape(*x.shape[:-1], out_features)
