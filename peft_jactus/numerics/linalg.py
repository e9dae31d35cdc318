"""Matrix factorizations with one precision and robustness policy.

Statistics arrive in float32 or better; every decomposition runs in float64 and its result is cast once, by
the caller. Nothing degrades silently: where a Cholesky factorization needs more damping than it was
given, a `NumericalWarning` says how much was added.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from peft_jactus.errors import NumericalWarning

if TYPE_CHECKING:
    from torch import Tensor

# A jitter beyond this share of the mean diagonal would change the metric, not repair its rounding.
_MAX_RELATIVE_JITTER = 1e-4
# Of the columns of a Gram matrix; smaller blocks than these multiply more slowly than they save.
_NUM_GRAM_BLOCKS, _MIN_GRAM_BLOCK = 4, 96


def to_decomposition_dtype(matrix: Tensor) -> Tensor:
    """Return ``matrix`` detached, in float64, on a device that can compute in float64."""
    matrix = matrix.detach()
    if matrix.device.type == "mps":  # Apple's GPU backend has no float64
        matrix = matrix.cpu()
    return matrix.to(torch.float64)


def eigh_descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a positive semi-definite matrix, largest eigenvalue first.

    Args:
        matrix: ``(dim, dim)``, symmetric up to rounding.

    Returns:
        Eigenvalues ``(dim,)``, non-increasing and clamped at zero, and eigenvectors ``(dim, dim)`` in
        columns; both in the dtype of ``matrix``.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return eigenvalues.flip(0).clamp(min=0), eigenvectors.flip(1)


def add_gram_(matrix: Tensor, vectors: Tensor) -> None:
    """Add ``vectors^T vectors`` to a symmetric ``matrix`` in place; of blocks that mirror each other, one is computed.

    Args:
        matrix: ``(dim, dim)``, symmetric; stays so up to rounding.
        vectors: ``(num_vectors, dim)``.
    """
    dim = matrix.shape[0]
    size = max(_MIN_GRAM_BLOCK, -(-dim // _NUM_GRAM_BLOCKS))
    for start in range(0, dim, size):
        end = start + size
        matrix[start:end, start:].addmm_(vectors[:, start:end].mT, vectors[:, start:])
        matrix[end:, start:end] = matrix[start:end, end:].mT


def singular_spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared singular values and the singular vectors of the shorter side, from its Gram matrix.

    Several times as fast as a singular value decomposition. Energies are accurate to rounding of the largest one, and
    so is the energy that the leading vectors hold; single vectors whose energies are closer than that are mixed.

    Args:
        matrix: ``(out, in)``, float64.

    Returns:
        Energies ``(dim,)``, non-increasing, ``dim = min(out, in)``, and orthonormal columns ``(dim, dim)``: the left
        singular vectors if ``out <= in``, the right ones otherwise.
    """
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    return eigh_descending(short @ short.mT)


def balanced_factors(left: Tensor, core: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a core into two factors of equal norm: ``left core right^T = up down``.

    Args:
        left: ``(out, rank)``.
        core: ``(rank, rank)``.
        right: ``(in, rank)``.

    Returns:
        ``up`` ``(out, rank)`` and ``down`` ``(rank, in)``, float64: the singular vectors, each scaled by the root of
        its singular value.
    """
    left, core, right = (to_decomposition_dtype(tensor) for tensor in (left, core, right))
    left_basis, left_triangle = torch.linalg.qr(left)
    right_basis, right_triangle = torch.linalg.qr(right)
    vectors, singular_values, covectors = torch.linalg.svd(left_triangle @ core @ right_triangle.mT)
    roots = singular_values.sqrt()
    return left_basis @ (vectors * roots), (roots.unsqueeze(1) * covectors) @ right_basis.mT


def cholesky_root(matrix: Tensor) -> Tensor:
    """Return a lower-triangular ``K`` with ``K K^T = matrix``.

    Args:
        matrix: ``(dim, dim)``, positive definite up to rounding.

    Returns:
        ``(dim, dim)``, float64.

    Raises:
        ValueError: If the matrix is not positive definite even with a jitter of 1e-4 of its mean diagonal.
    """
    matrix = to_decomposition_dtype(matrix)  # of which only the lower triangle is read
    scale = float(matrix.diagonal().mean())
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    needed, relative_jitter = 0.0, torch.finfo(torch.float64).eps * matrix.shape[0]
    while int(info) != 0:
        if not (scale > 0 and relative_jitter <= _MAX_RELATIVE_JITTER):
            raise ValueError(
                f"`matrix` must be positive definite; got one with {tuple(matrix.shape)=} and mean diagonal "
                f"{scale:.3g}. Raise `damping` or `shrinkage`."
            )
        jittered = matrix.clone()
        jittered.diagonal().add_(relative_jitter * scale)
        factor, info = torch.linalg.cholesky_ex(jittered)
        needed, relative_jitter = relative_jitter, 10 * relative_jitter
    if needed > 0:
        warnings.warn(
            f"Cholesky factorization needed a jitter of {needed:.1e} of the mean diagonal.",
            NumericalWarning,
            stacklevel=2,
        )
    return factor


def leading_count(energies: Tensor, ratio: float) -> int:
    """Return the least ``k`` such that the first ``k`` energies reach ``ratio`` of their sum.

    Args:
        energies: ``(dim,)``, non-negative and non-increasing.
        ratio: In [0, 1]. 0 gives 0; 1 gives the count of energies above rounding error.
    """
    total = energies.sum()
    if ratio <= 0 or not total > 0:  # not >=: an all-zero matrix has no range
        return 0
    # At ratio 1 the cumulated sum reaches the total only up to rounding: count what is numerically there.
    tolerance = torch.finfo(energies.dtype).eps * energies.numel()
    numerical_rank = int((energies > tolerance * energies[0]).sum())
    if ratio >= 1:
        return numerical_rank
    reached = int((energies.cumsum(0) < ratio * total).sum()) + 1
    return min(reached, numerical_rank)
