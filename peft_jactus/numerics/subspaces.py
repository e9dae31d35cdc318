"""Leading directions of matrices, and the union of subspaces that the paper is named after.

By default `JactusConfig.weight_energy` is 1, and nothing here runs: a union that holds the whole weight restricts
nothing. With less it is the paper's narrow union (Ge et al., arXiv:2605.02829).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peft_jactus.numerics.linalg import eigh_descending, leading_count, singular_spectrum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Eigenvectors that were computed in float32 leave residuals of its rounding inside any subspace that holds them.
_FLOAT32_RTOL = torch.finfo(torch.float32).eps ** 0.5
# A sketch has an eighth of the dimension, 64 at least: its products cost a fraction of an eigendecomposition.
_SKETCH_SHARE = 8
_MIN_SKETCH = 64
# How much more than allowed the sketch may miss after each iteration, so that a hopeless one is given up early.
_SKETCH_MISSES = (4, 2, 1)


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
