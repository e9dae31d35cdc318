"""Low-rank approximations of one weight, in the metric of its calibration statistics.

Replacing ``W`` by ``W'`` changes the loss, to second order and with K-FAC's Kronecker-factored Fisher
matrix, by ``1/2 tr(C_g (W - W') C_x (W - W')^T)``. With roots ``C_g = K_g K_g^T``, ``C_x = K_x K_x^T`` that is half of
``|K_g^T (W - W') K_x|_F^2``, and its minimiser over rank-r matrices inside a pair of subspaces is a
truncated singular value decomposition (generalised inverses and Eckart & Young, Psychometrika 1, 1936).

JACTUS (Ge et al., arXiv:2605.02829) takes as subspaces the union of the weight's own leading singular
directions with the leading input directions on the right, and with the leading gradient directions on the left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from peft_jactus.linalg import (
    cholesky_root,
    eigh_descending,
    leading_count,
    subspace_union,
    to_decomposition_dtype,
)

if TYPE_CHECKING:
    from torch import Tensor

    from peft_jactus.statistics import LayerStatistics, SecondMoment

Decomposition = Literal["jactus", "svd"]


@dataclass(frozen=True)
class DecompositionOptions:
    """How one weight is approximated; `JactusConfig` documents each field."""

    decomposition: Decomposition = "jactus"
    weight_energy: float = 0.99
    input_energy: float = 0.99
    gradient_energy: float = 0.99
    shrinkage: float | Literal["ledoit-wolf"] = "ledoit-wolf"
    damping: float = 1e-6

    @property
    def needs_statistics(self) -> bool:
        """Whether the approximation depends on calibration data."""
        return self.decomposition != "svd"


@dataclass(frozen=True)
class LowRankFactors:
    """A matrix ``left @ diag(singular_values) @ right.T`` in singular value form.

    Attributes:
        left: ``(out, rank)``, orthonormal columns.
        singular_values: ``(rank,)``, non-increasing.
        right: ``(in, rank)``, orthonormal columns.
    """

    left: Tensor
    singular_values: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Return the product ``(out, in)``."""
        return (self.left * self.singular_values) @ self.right.mT


@dataclass(frozen=True)
class _Side:
    """One side of the projected problem: a basis ``Q`` of the allowed subspace in the metric ``K K^T``.

    With ``A = K^T Q = whitened_basis @ triangle``: ``None`` stands for the identity, so that the whole space
    costs no factorization, and a missing metric costs no product.

    Attributes:
        root: ``K`` ``(dim, dim)``, or ``None`` for the identity metric.
        basis: ``Q`` ``(dim, k)`` with orthonormal columns, or ``None`` for the whole space.
        whitened_basis: ``(dim, k)`` with orthonormal columns, or ``None`` for the identity.
        triangle: ``(k, k)``, or ``None`` for the identity.
    """

    root: Tensor | None
    basis: Tensor | None
    whitened_basis: Tensor | None
    triangle: Tensor | None

    @classmethod
    def build(cls, root: Tensor | None, basis: Tensor | None) -> _Side:
        if basis is not None and basis.shape[0] == basis.shape[1]:
            basis = None
        if basis is None:
            return cls(root, None, None, None if root is None else root.mT)
        if root is None:
            return cls(None, basis, basis, None)
        whitened_basis, triangle = torch.linalg.qr(root.mT @ basis)  # (dim, k), (k, k)
        return cls(root, basis, whitened_basis, triangle)

    def unwhiten(self, vectors: Tensor) -> Tensor:
        """Return ``Q triangle^-1 vectors`` ``(dim, r)`` for ``vectors`` ``(k, r)``."""
        if self.triangle is not None:
            # The whole space has the triangle K^T, upper triangular like that of the QR factorization.
            vectors = torch.linalg.solve_triangular(self.triangle, vectors, upper=True)
        return vectors if self.basis is None else self.basis @ vectors


@dataclass(frozen=True)
class ProjectedWeight:
    """A weight seen in its metric and subspaces: all its best approximations, one for each rank.

    Attributes:
        core: ``T`` ``(k_left, k_right)``, the whitened weight in the whitened bases.
        total_energy: ``|K_g^T W K_x|_F^2``, of which singular values of ``core`` are the reachable part.
    """

    core: Tensor
    total_energy: float
    _left: _Side
    _right: _Side

    @property
    def max_rank(self) -> int:
        """The largest rank inside the subspaces."""
        return min(self.core.shape)

    def gains(self) -> Tensor:
        """Return ``(max_rank,)``: drop of the squared weighted error by each further rank, non-increasing."""
        return torch.linalg.svdvals(self.core).square()

    def truncate(self, rank: int) -> LowRankFactors:
        """Return the best approximation of at most ``rank``, as a singular value decomposition of its own.

        The squared weighted error is ``total_energy`` less the first ``rank`` gains.
        """
        rank = min(rank, self.max_rank)
        p, sigma, zh = torch.linalg.svd(self.core, full_matrices=False)
        scale = sigma[:rank].sqrt()
        left = self._left.unwhiten(p[:, :rank] * scale)  # (out, rank)
        right = self._right.unwhiten(zh[:rank].mT * scale)  # (in, rank)
        left_basis, left_triangle = torch.linalg.qr(left)
        right_basis, right_triangle = torch.linalg.qr(right)
        u, singular_values, vh = torch.linalg.svd(left_triangle @ right_triangle.mT)  # (rank, rank)
        return LowRankFactors(left_basis @ u, singular_values, right_basis @ vh.mT)


def project(
    weight: Tensor,
    *,
    gradient_root: Tensor | None = None,
    input_root: Tensor | None = None,
    left_basis: Tensor | None = None,
    right_basis: Tensor | None = None,
) -> ProjectedWeight:
    """Set up ``min over rank(M) <= r of |K_g^T (W - Q_L M Q_R^T) K_x|_F^2``.

    Args:
        weight: ``W`` ``(out, in)``.
        gradient_root: ``K_g`` ``(out, out)``, lower triangular; ``None`` for the identity.
        input_root: ``K_x`` ``(in, in)``, lower triangular; ``None`` for the identity.
        left_basis: ``Q_L`` ``(out, k_left)``, orthonormal columns; ``None`` for the whole space.
        right_basis: ``Q_R`` ``(in, k_right)``, orthonormal columns; ``None`` for the whole space.

    Returns:
        The solutions for every rank.
    """
    weight = to_decomposition_dtype(weight)
    left = _Side.build(gradient_root, left_basis)
    right = _Side.build(input_root, right_basis)
    whitened = weight if left.root is None else left.root.mT @ weight
    whitened = whitened if right.root is None else whitened @ right.root  # (out, in)
    core = whitened if left.whitened_basis is None else left.whitened_basis.mT @ whitened
    core = core if right.whitened_basis is None else core @ right.whitened_basis
    return ProjectedWeight(core, float(whitened.square().sum()), left, right)


def regularized_covariance(moment: SecondMoment, *, shrinkage: float | str, damping: float) -> Tensor:
    """Return ``(1 - rho) C + (rho + damping) tr(C) / dim I``.

    Args:
        moment: Sums of the vectors.
        shrinkage: ``rho`` in [0, 1], or ``"ledoit-wolf"`` for the estimate of that name.
        damping: Least share of the mean eigenvalue in every direction, dimensionless, >= 0.

    Returns:
        ``(dim, dim)``, float64, positive definite if ``rho + damping > 0``.

    Raises:
        ValueError: If all vectors were zero, which leaves no scale to regularize with.
    """
    rho = moment.ledoit_wolf_shrinkage() if isinstance(shrinkage, str) else shrinkage
    covariance = moment.covariance
    mean_eigenvalue = float(covariance.diagonal().mean())
    if not mean_eigenvalue > 0:
        raise ValueError("`moment` must hold at least one non-zero vector; all that were counted are zero.")
    covariance = covariance * (1 - rho)
    covariance.diagonal().add_((rho + damping) * mean_eigenvalue)
    return covariance


def leading_subspace(moment: SecondMoment, energy: float) -> Tensor:
    """Return the leading eigenvectors ``(dim, k)`` that hold the share ``energy`` of the trace."""
    eigenvalues, eigenvectors = eigh_descending(moment.covariance)
    return eigenvectors[:, : leading_count(eigenvalues, energy)]


def project_weight(
    weight: Tensor, statistics: LayerStatistics | None, options: DecompositionOptions
) -> ProjectedWeight:
    """Project ``weight`` ``(out, in)`` as the chosen decomposition does.

    Args:
        weight: The dense weight.
        statistics: Its calibration statistics; not read by the data-free ``"svd"``.
        options: Decomposition and its settings.

    Raises:
        ValueError: If ``statistics`` is missing where the decomposition needs it.
    """
    if options.decomposition == "svd":
        return project(weight)
    if statistics is None:
        raise ValueError(f"`statistics` must be given for decomposition={options.decomposition!r}; got None.")
    gradient_root, input_root = (
        cholesky_root(regularized_covariance(moment, shrinkage=options.shrinkage, damping=options.damping))
        for moment in (statistics.gradient, statistics.input)
    )
    u, sigma, vh = torch.linalg.svd(to_decomposition_dtype(weight), full_matrices=False)
    k_weight = max(1, leading_count(sigma.square(), options.weight_energy))  # a zero weight has rank one, too
    left_basis = subspace_union(
        [u[:, :k_weight], leading_subspace(statistics.gradient, options.gradient_energy)]
    )
    right_basis = subspace_union(
        [vh[:k_weight].mT, leading_subspace(statistics.input, options.input_energy)]
    )
    return project(
        weight,
        gradient_root=gradient_root,
        input_root=input_root,
        left_basis=left_basis,
        right_basis=right_basis,
    )
