"""Rounding a weight to a few levels so that what the layer computes changes little.

Rounding each number by itself loses most where inputs are correlated, as activations are: errors of a row add up along
their common direction. With feedback, the error of one number is made up for by the numbers after it, by least
squares over the inputs (GPTQ: Frantar et al., arXiv:2210.17323).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft_jactus.numerics.linalg import to_decomposition_dtype

if TYPE_CHECKING:
    from torch import Tensor

# Share of the mean variance that is added to each input's, as GPTQ does: the sums are of a sample.
_DAMPING = 0.01
# Columns after which the errors of a block go to all the columns that are left.
_BLOCK = 64


def nearest_levels(values: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest level to each value.

    Args:
        values: Any shape.
        levels: ``(num_levels,)``, ascending.
    """
    return torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2)


def round_with_feedback(weight: Tensor, scales: Tensor, levels: Tensor, second_moment: Tensor) -> Tensor:
    """Choose levels so that ``tr (W - Q) C (W - Q)^T`` is small, for ``Q = scales * levels[chosen]``.

    Columns are rounded one after another, those of the largest variance first; the error of each is taken out of the
    columns that are left.

    Args:
        weight: ``W`` ``(out, in)``.
        scales: ``(out, in)``, positive: the unit of the levels for each number.
        levels: ``(num_levels,)``, ascending.
        second_moment: ``C`` ``(in, in)`` of the inputs, positive semi-definite.

    Returns:
        Indices of levels ``(out, in)``, int64.
    """
    covariance = damped(second_moment)
    order = covariance.diagonal().argsort(descending=True)
    weight, scales = to_decomposition_dtype(weight)[:, order], to_decomposition_dtype(scales)[:, order]
    levels = levels.to(weight)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance[order][:, order]))
    factor = torch.linalg.cholesky(precision, upper=True)
    chosen = torch.empty_like(weight, dtype=torch.int64)
    for start in range(0, weight.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[1])
        errors = weight.new_empty(weight.shape[0], stop - start)
        for j in range(start, stop):
            chosen[:, j] = nearest_levels(weight[:, j] / scales[:, j], levels)
            error = (weight[:, j] - scales[:, j] * levels[chosen[:, j]]) / factor[j, j]
            weight[:, j:stop].addr_(error, factor[j, j:stop], alpha=-1)
            errors[:, j - start] = error
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return chosen[:, order.argsort()]


def fit_to_inputs(weight: Tensor, first: Tensor, second_moment: Tensor) -> Tensor:
    """Return the ``X`` ``(out, rank)`` for which ``X first`` is nearest to the weight, over the inputs.

    Args:
        weight: ``W`` ``(out, in)``.
        first: ``(rank, in)``.
        second_moment: ``C`` ``(in, in)`` of the inputs: what is least is ``tr (W - X first) C (W - X first)^T``.
    """
    weight, first = to_decomposition_dtype(weight), to_decomposition_dtype(first)
    seen = to_decomposition_dtype(second_moment) @ first.mT  # (in, rank)
    gram = first @ seen
    mean = gram.diagonal().mean()
    gram.diagonal().add_(1e-8 * mean if mean > 0 else 1.0)
    fitted: Tensor = torch.linalg.solve(gram, (weight @ seen).mT).mT
    return fitted


def damped(second_moment: Tensor) -> Tensor:
    """Return the second moment ``(dim, dim)`` in float64 with a little of its mean variance on the diagonal."""
    covariance = to_decomposition_dtype(second_moment).clone()
    mean = covariance.diagonal().mean()
    covariance.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    return covariance
