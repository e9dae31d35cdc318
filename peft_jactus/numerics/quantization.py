"""Weights in 8 or 4 bits a number: groups of 64 numbers, row after row, with one scale each.

8 bits are integers from -127 to 127. 4 bits are those of NF4 (Dettmers et al., arXiv:2305.14314): 16 levels at the
quantiles of a normal distribution (their appendix E). bitsandbytes has kernels that multiply them out.

A scale takes 16 bits in a 16-bit model: 8.25 and 4.25 bits a number in all. Shapes need not divide: a group may go
from one row to the next, and the last one may be shorter.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from peft_jactus.numerics.linalg import to_decomposition_dtype
from peft_jactus.numerics.rounding import fit_to_inputs, nearest_levels, round_with_feedback

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZE = 64
BITS = (8, 4)
_LARGEST = 127  # of 8 bits
# Of 4 bits; in float32, as bitsandbytes has them.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def bitsandbytes_functional() -> Any:
    """Return ``bitsandbytes.functional``; an `ImportError` says how to get it."""
    try:
        from bitsandbytes import functional as bnb  # optional, and slow to import
    except ImportError as error:
        raise ImportError("4 bits need bitsandbytes: `pip install bitsandbytes`.") from error
    return bnb


def code_shape(shape: tuple[int, int], bits: int) -> tuple[int, ...]:
    """Return the shape of the codes of a weight ``(out, in)``: as it is with 8 bits; with 4, two numbers a byte."""
    return shape if bits == 8 else (-(-math.prod(shape) // 2),)


def num_groups(shape: tuple[int, int]) -> int:
    """Return how many scales a weight ``(out, in)`` has."""
    return -(-math.prod(shape) // GROUP_SIZE)


def code_dtype(bits: int) -> torch.dtype:
    """Return the dtype of the codes: int8, or uint8 with the first of two numbers in the upper half."""
    return torch.int8 if bits == 8 else torch.uint8


def quantize(
    weight: Tensor, bits: int, *, dtype: torch.dtype, second_moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a weight.

    Args:
        weight: ``(out, in)``, finite.
        bits: 8 or 4.
        dtype: Of the scales, and of what `dequantize` returns.
        second_moment: ``(in, in)`` of the inputs, for rounding with feedback. Default: each number by itself.

    Returns:
        Codes of `code_shape`, and scales ``(num_groups,)``.
    """
    weight = to_decomposition_dtype(weight)
    groups = _grouped(weight)  # (groups, 64)
    largest = groups.abs().amax(1)
    scales = (largest if bits == 4 else largest / _LARGEST).to(dtype)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    levels = torch.tensor(_NF4 if bits == 4 else range(-_LARGEST, _LARGEST + 1), dtype=torch.float64).to(weight)
    of_numbers = _of_each_number(scales.to(weight), weight.shape)
    if second_moment is None:
        chosen = nearest_levels(weight / of_numbers, levels)
    else:
        chosen = round_with_feedback(weight, of_numbers, levels, second_moment)
    if bits == 8:
        return (chosen - _LARGEST).to(torch.int8), scales
    pairs = functional.pad(chosen.flatten(), (0, chosen.numel() % 2)).to(torch.uint8).view(-1, 2)
    return pairs[:, 0] * 16 + pairs[:, 1], scales


def quantize_pair(
    first: Tensor,
    second: Tensor,
    bits: int,
    *,
    dtype: torch.dtype,
    second_moment: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return codes and scales of two matrices that multiply inputs one after the other: ``second @ first``.

    Rounded number by number they would hurt, most of all 4 bits: the first sums up correlated inputs, and the second
    sees little else than a few directions of what comes out. So the first is rounded with feedback by the inputs, and
    the second, fitted anew to what the first has become, by what it then sees.

    Args:
        first: ``(rank, in)``; with ``order`` ``(rank, in - rank)``: beside an identity, ``second @ [I, first]``.
        second: ``(out, rank)``.
        bits: 8 or 4.
        dtype: As for `quantize`.
        second_moment: ``(in, in)`` of the inputs. Default: all inputs alike; 8 bits are then rounded one by one.
        order: ``(in,)``: of which inputs the columns of ``[I, first]`` are.

    Returns:
        Those of the first, those of the second.
    """
    if bits == 8 and second_moment is None:
        return quantize(first, bits, dtype=dtype), quantize(second, bits, dtype=dtype)
    first, second = to_decomposition_dtype(first), to_decomposition_dtype(second)
    num_inputs = first.shape[1] if order is None else len(order)
    moment = torch.eye(num_inputs).to(first) if second_moment is None else to_decomposition_dtype(second_moment)
    if order is not None:
        moment = moment[order][:, order]
    weight = second @ _beside_identity(first, num_inputs)
    seen = moment[-first.shape[1] :, -first.shape[1] :]
    codes, scales = quantize(first, bits, dtype=dtype, second_moment=seen)
    rounded = to_decomposition_dtype(dequantize(codes, scales, (first.shape[0], first.shape[1])))
    rounded = _beside_identity(rounded, num_inputs)
    fitted = fit_to_inputs(weight, rounded, moment)
    return (codes, scales), quantize(fitted, bits, dtype=dtype, second_moment=rounded @ moment @ rounded.mT)


def _beside_identity(matrix: Tensor, num_columns: int) -> Tensor:
    """Return ``[I, matrix]`` if that has ``num_columns``; ``matrix`` if it has them itself."""
    rank, has = matrix.shape
    return matrix if has == num_columns else torch.cat([torch.eye(rank).to(matrix), matrix], dim=1)


def dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the weight ``(out, in)`` that codes and scales stand for, in the dtype of the scales."""
    if codes.dtype == torch.int8:
        if codes.numel() % GROUP_SIZE:
            return codes.to(scales.dtype) * _of_each_number(scales, shape)
        return (codes.view(-1, GROUP_SIZE).to(scales.dtype) * scales.unsqueeze(1)).view(shape)
    if codes.is_meta:
        return scales.new_empty(shape)
    if torch.onnx.is_in_onnx_export():  # which has no translation of their operator
        return _looked_up(codes, scales, shape)
    bitsandbytes_functional()  # registers the operator
    # Of whole groups: on CPUs, bitsandbytes 0.50 gets rows wrong that are shorter than one.
    codes = functional.pad(codes, (0, len(scales) * GROUP_SIZE // 2 - len(codes)))
    # Of float64 it makes something else.
    dtype = torch.float32 if scales.dtype == torch.float64 else scales.dtype
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes.unsqueeze(1), scales.float(), GROUP_SIZE, "nf4", (len(scales), GROUP_SIZE), dtype
    )
    return values.flatten()[: math.prod(shape)].view(shape).to(scales.dtype)


def _looked_up(codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the weight of 4-bit codes, by torch's own operators."""
    halves = torch.stack([codes.long() // 16, codes.long() % 16], dim=1).flatten()[: math.prod(shape)]
    levels = torch.tensor(_NF4, dtype=scales.dtype, device=scales.device)
    return levels[halves].view(shape) * _of_each_number(scales, shape)


def _of_each_number(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the scale of each number of a weight."""
    return scales.repeat_interleave(GROUP_SIZE)[: math.prod(shape)].view(shape)


def _grouped(values: Tensor) -> Tensor:
    """Return values row after row in groups ``(groups, 64)``, the last one filled up with zeros."""
    return functional.pad(values.flatten(), (0, -values.numel() % GROUP_SIZE)).view(-1, GROUP_SIZE)


class _QuantizedProduct(torch.autograd.Function):
    """`torch.nn.functional.linear` that keeps the codes for its gradient, and not the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int], bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        return functional.linear(x, dequantize(codes, scales, shape).to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        of_x = gradient @ dequantize(codes, scales, ctx.shape).to(gradient.dtype)
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None
        return of_x, None, None, None, of_bias


def quantized_product(x: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    """Return ``x W^T + bias`` ``(..., out)``; ``x`` and ``bias`` get gradients.

    Args:
        x: ``(..., in)``.
        codes: As `quantize` returns them.
        scales: As `quantize` returns them.
        shape: Of ``W``, ``(out, in)``.
        bias: ``(out,)`` or ``None``.
    """
    trains = torch.is_grad_enabled() and x.requires_grad
    if not trains or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, dequantize(codes, scales, shape), bias)
    output: Tensor = _QuantizedProduct.apply(  # type: ignore[no-untyped-call]  # torch has no annotation here
        x, codes, scales, shape, bias
    )
    return output
