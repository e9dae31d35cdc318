"""Matrix factorizations with one precision and robustness policy.

Statistics arrive in float32 or better; every decomposition runs in float64 and its result is cast once, by
the caller. Nothing degrades silently: where a Cholesky factorization needs more damping than it was
given, a `NumericalWarning` says how much was added.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# A jitter beyond this share of the mean diagonal would change the metric, not repair its rounding.
_MAX_RELATIVE_JITTER = 1e-4
# Eigenvectors that were computed in float32 leave residuals of its rounding inside any subspace that holds them.
_FLOAT32_RTOL = torch.finfo(torch.float32).eps ** 0.5
# A sketch has an eighth of the dimension, 64 at least: its products cost a fraction of an eigendecomposition.
_SKETCH_SHARE = 8
_MIN_SKETCH = 64
# How much more than allowed the sketch may miss after each iteration, so that a hopeless one is given up early.
_SKETCH_MISSES = (4, 2, 1)


class NumericalWarning(UserWarning):
    """A result is valid, but less accurate or smaller than what was asked for; the text says by how much."""


def to_decomposition_dtype(matrix: Tensor) -> Tensor:
    """Return ``matrix`` detached, in float64, on a device that can compute in float64."""
    matrix = matrix.detach()
    if matrix.device.type == "mps":  # Apple's GPU backend has no float64
        matrix = matrix.cpu()
    return matrix.to(torch.float64)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what autocast makes of ``x`` in a product; ``None`` where it is off, or leaves ``x`` alone."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # none for `meta`
    return torch.get_autocast_dtype(device) if casts and x.dtype != torch.float64 else None


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that `torch.nn.Linear` gives its output: autocast's where that is on, else that of ``x``."""
    return autocast_dtype(x) or x.dtype


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


def leading_singular_subspaces(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases ``(out, k)`` and ``(in, k)`` of the leading singular vectors that hold ``energy``.

    Args:
        matrix: ``(out, in)``, float64.
        energy: Share of the sum of squared singular values, in [0, 1]; one direction at least.
    """
    energies, vectors = singular_spectrum(matrix)
    count = max(1, leading_count(energies, energy))  # a zero matrix has rank one, too
    short = vectors[:, :count]
    if matrix.shape[0] <= matrix.shape[1]:
        return short, torch.linalg.qr(matrix.mT @ short).Q
    return torch.linalg.qr(matrix @ short).Q, short


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


def subspace_union(bases: Sequence[Tensor], *, rtol: float | None = None) -> Tensor:
    """Return an orthonormal basis of the sum of subspaces.

    Earlier bases win ties: the first ``bases[0].shape[1]`` columns are ``bases[0]`` itself. Directions of a
    later basis that the earlier ones contain already are dropped.

    Args:
        bases: Non-empty; each ``(dim, k_i)`` with orthonormal columns; same dtype and device.
        rtol: A direction counts as contained when its residual norm (dimensionless, [0, 1]) is at most
            this. Default: ``sqrt(eps)`` of the dtype.

    Returns:
        ``(dim, k)`` with orthonormal columns, ``k <= min(dim, sum(k_i))``.

    Raises:
        ValueError: If ``bases`` is empty or the first dimensions differ.

    References:
        Ge et al., arXiv:2605.02829. Projected out twice: Giraud et al., Numer. Math. 101, 2005.
    """
    if not bases:
        raise ValueError("`bases` must hold at least one basis; got none.")
    dims = {basis.shape[0] for basis in bases}
    if len(dims) > 1:
        raise ValueError(f"`bases` must share their first dimension; got {sorted(dims)}.")
    union = bases[0]
    if rtol is None:
        rtol = torch.finfo(union.dtype).eps ** 0.5
    for basis in bases[1:]:
        if union.shape[1] == union.shape[0]:
            return union
        residual = basis
        for _ in range(2):  # once leaves components of the order of eps / residual norm
            residual = residual - union @ (union.mT @ residual)  # (dim, k_i)
        directions, norms, _ = torch.linalg.svd(residual, full_matrices=False)
        num_new = min(int((norms > rtol).sum()), union.shape[0] - union.shape[1])
        fresh = directions[:, :num_new]
        # The SVD divides by the residual norm, which magnifies what rounding left inside the union.
        fresh = torch.linalg.qr(fresh - union @ (union.mT @ fresh)).Q
        union = torch.cat([union, fresh], dim=1)  # (dim, k)
    return union


@dataclass(frozen=True)
class Subspace:
    """A proper subspace, held by an orthonormal basis of itself or of its orthogonal complement.

    Attributes:
        basis: ``(dim, k)``, or ``None``.
        complement: ``(dim, dim - k)``, or ``None``.
    """

    basis: Tensor | None = None
    complement: Tensor | None = None

    @property
    def dimension(self) -> int:
        """The dimension ``k`` of the subspace."""
        if self.basis is not None:
            return self.basis.shape[1]
        assert self.complement is not None
        return self.complement.shape[0] - self.complement.shape[1]


def union_with_leading_eigenvectors(basis: Tensor, covariance: Tensor, energy: float) -> Subspace | None:
    """Return the union of ``span(basis)`` with the leading eigenvectors of ``covariance``.

    The eigenvectors are computed in float32: they only say which directions are added, and where the
    spectrum is dense enough for rounding to mix them, the cut is arbitrary. The union itself is
    orthonormal in float64.

    Args:
        basis: ``(dim, k)`` with orthonormal columns, float64.
        covariance: ``(dim, dim)``, positive semi-definite.
        energy: Share of the trace that the leading eigenvectors hold, in [0, 1].

    Returns:
        The union; ``None`` if it is the whole space.
    """
    dim = basis.shape[0]
    covariance = (covariance / covariance.diagonal().mean()).float()
    leading = few_leading_eigenvectors(covariance, energy)
    if leading is None:
        eigenvalues, eigenvectors = eigh_descending(covariance)
        count = leading_count(eigenvalues.double(), energy)
        if 2 * count > dim:
            return _union_with_all_but(basis, _orthonormalized(eigenvectors[:, count:]))
        leading = eigenvectors[:, :count]
    union = subspace_union([basis, _orthonormalized(leading)], rtol=_FLOAT32_RTOL)
    return None if union.shape[1] == dim else Subspace(basis=union)


def _union_with_all_but(basis: Tensor, trailing: Tensor) -> Subspace | None:
    """Return the union of ``span(basis)`` with all that is orthogonal to ``trailing``; ``None`` for the whole space.

    Orthogonal to the union is what ``trailing`` spans, orthogonal to the basis: a smaller problem.
    """
    overlaps = basis.mT @ trailing
    squared_overlaps, directions = eigh_descending(overlaps.mT @ overlaps)
    rank = int((squared_overlaps > _FLOAT32_RTOL**2).sum())
    complement = trailing @ directions[:, rank:]  # (dim, dim - k)
    return None if complement.shape[1] == 0 else Subspace(complement=complement)


def few_leading_eigenvectors(covariance: Tensor, energy: float) -> Tensor | None:
    """Return leading eigenvectors by randomised subspace iteration, if they are few against the dimension.

    What is returned holds ``energy`` of the trace; that is measured, not estimated. It may take a few more vectors
    than the eigenvectors themselves.

    Args:
        covariance: ``(dim, dim)``, positive semi-definite.
        energy: Share of the trace, in [0, 1].

    Returns:
        ``(dim, k)`` with orthonormal columns up to the rounding of ``covariance``'s dtype; ``None`` where an
        eigendecomposition costs less or is needed.

    References:
        Halko, Martinsson & Tropp, SIAM Review 53, 2011, algorithms 4.4 and 5.3.
    """
    dim = covariance.shape[0]
    size = dim // _SKETCH_SHARE
    if size < _MIN_SKETCH or not 0 < energy < 1:
        return None
    trace = covariance.diagonal().sum()
    generator = torch.Generator().manual_seed(0)  # the same in every process
    basis = torch.randn(dim, size, generator=generator, dtype=covariance.dtype).to(covariance.device)
    for allowed in _SKETCH_MISSES:
        basis = torch.linalg.qr(covariance @ basis).Q
        product = covariance @ basis
        if trace - (basis * product).sum() > allowed * (1 - energy) * trace:
            return None
    ritz_values, rotation = eigh_descending(basis.mT @ product)
    count = int((ritz_values.cumsum(0) < energy * trace).sum()) + 1
    return basis @ rotation[:, :count]


def _orthonormalized(vectors: Tensor) -> Tensor:
    """Bring float32 eigenvectors, orthonormal to 1e-6, to the rounding level of float64."""
    basis: Tensor = torch.linalg.qr(vectors.double()).Q
    return basis
