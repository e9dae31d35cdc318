"""Low-rank approximations of one weight, in the metric of its calibration statistics.

Replacing ``W`` by ``W'`` changes the loss, to second order and with K-FAC's Kronecker-factored Fisher
matrix, by ``1/2 tr(C_g (W - W') C_x (W - W')^T)``. With roots ``C_g = K_g K_g^T``, ``C_x = K_x K_x^T`` that is half of
``|K_g^T (W - W') K_x|_F^2``, and its minimiser over rank-r matrices inside a pair of subspaces is a
truncated singular value decomposition (generalised inverses and Eckart & Young, Psychometrika 1, 1936).

JACTUS (Ge et al., arXiv:2605.02829) takes as subspaces the union of the weight's own leading singular
directions with the leading input directions on the right, and with the leading gradient directions on the left. With
all of the weight's own directions (``weight_energy=1``, the default: fewer cost accuracy and time) they restrict
nothing.

Where a bias takes up the mean error, what is left is ``(W - W') (x - mean(x))``: the best metric is then that of the
inputs around their mean. JACTUS takes that one (`project_weight`, ``centred``).

Its peers are the same problem in the whole space and in another metric:

    ============  ===========================================  ========================================================
    name          metric                                       source
    ============  ===========================================  ========================================================
    ``svd``       ``K_g = I``, ``K_x = I``                     Eckart & Young, Psychometrika 1, 1936
    ``fwsvd``     ``K_g = diag(row Fisher sums)^1/2``          Hsu et al., arXiv:2207.00112
    ``asvd``      ``K_x = diag(mean |x|)^1/2``                 Yuan et al., arXiv:2312.05821
    ``svd-llm``   ``K_x K_x^T = C_x``                          Wang et al., arXiv:2403.07378
    ``kfac``      ``K_g K_g^T = C_g``, ``K_x K_x^T = C_x``     Martens & Grosse, arXiv:1503.05671 (the metric)
    ============  ===========================================  ========================================================
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from peft_jactus.numerics.linalg import cholesky_root, eigh_descending, singular_spectrum, to_decomposition_dtype
from peft_jactus.numerics.metrics import activation_scales, fisher_row_scales, regularized_covariance
from peft_jactus.numerics.subspaces import leading_singular_subspaces, union_with_leading_eigenvectors

if TYPE_CHECKING:
    from torch import Tensor

    from peft_jactus.numerics.moments import LayerStatistics
    from peft_jactus.numerics.subspaces import Subspace

Decomposition = Literal["jactus", "kfac", "svd-llm", "asvd", "fwsvd", "svd"]


@dataclass(frozen=True)
class DecompositionOptions:
    """How one weight is approximated; `JactusConfig` documents each field and has the defaults."""

    decomposition: Decomposition
    weight_energy: float
    input_energy: float
    gradient_energy: float
    shrinkage: float | Literal["ledoit-wolf"]
    damping: float

    @property
    def estimates_loss(self) -> bool:
        """Whether the error that is minimised is an estimate of the loss: it weighs both sides."""
        return self.decomposition in ("jactus", "kfac")

    @property
    def needs_statistics(self) -> bool:
        """Whether the approximation depends on calibration data."""
        return self.decomposition != "svd"

    @property
    def averages_positions(self) -> bool:
        """Whether the error that is minimised is a mean over positions: times their number, layers compare.

        Covariances are such means. So is the metric of ``asvd``: what weighs a squared error is its scale squared,
        ``mean |x|``. The Fisher information of ``fwsvd`` is a sum already, and ``svd`` counts nothing.
        """
        return self.decomposition not in ("fwsvd", "svd")

    @property
    def needs_row_fisher(self) -> bool:
        """Whether the calibration must sum the squared gradients of each row."""
        return self.decomposition == "fwsvd"


@dataclass(frozen=True)
class LowRankFactors:
    """A matrix ``left @ core @ right.T``.

    Attributes:
        left: ``(out, rank)``, orthonormal columns.
        core: ``(rank, rank)``.
        right: ``(in, rank)``, orthonormal columns.
    """

    left: Tensor
    core: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Return the product ``(out, in)``."""
        return self.left @ self.core @ self.right.mT


@dataclass(frozen=True)
class _Side:
    """One side of the projected problem: a subspace ``span(Q)`` in the metric ``K K^T``.

    In whitened coordinates ``z = K^T q`` the metric is the identity and the subspace is ``span(K^T Q)``. A small
    subspace is held by a basis of that, a large one by a basis of its complement ``span(K^-1 Q_perp)``, so that the
    factorization here has few columns.

    Attributes:
        root: ``K`` ``(dim, dim)``, lower triangular, or ``None`` for the identity metric.
        inside: ``(dim, k)`` with orthonormal columns that span the subspace, or ``None``.
        outside: ``(dim, dim - k)`` with orthonormal columns that span its complement, or ``None``.
    """

    root: Tensor | None
    inside: Tensor | None
    outside: Tensor | None

    @classmethod
    def build(cls, root: Tensor | None, subspace: Subspace | None) -> _Side:
        inside = None if subspace is None else subspace.basis
        outside = None if subspace is None else subspace.complement
        if root is not None and inside is not None:
            inside = torch.linalg.qr(root.mT @ inside).Q
        if root is not None and outside is not None:
            outside = torch.linalg.qr(torch.linalg.solve_triangular(root, outside, upper=False)).Q
        return cls(root, inside, outside)

    def whiten(self, weight: Tensor) -> Tensor:
        """Return ``K^T weight`` ``(dim, ...)``."""
        return weight if self.root is None else self.root.mT @ weight

    def restrict(self, whitened: Tensor) -> Tensor:
        """Project ``(dim, ...)`` onto the subspace; ``(k, ...)`` in the basis, or ``(dim, ...)`` in place."""
        if self.inside is not None:
            return self.inside.mT @ whitened
        if self.outside is not None:
            return whitened - self.outside @ (self.outside.mT @ whitened)
        return whitened

    def unwhiten(self, vectors: Tensor) -> Tensor:
        """Undo `restrict` and `whiten` for vectors of the subspace: ``(k or dim, r)`` to ``(dim, r)``."""
        if self.inside is not None:
            vectors = self.inside @ vectors
        if self.root is None:
            return vectors
        solution: Tensor = torch.linalg.solve_triangular(self.root.mT, vectors, upper=True)
        return solution


@dataclass(frozen=True)
class ProjectedWeight:
    """A weight seen in its metric and subspaces: all its best approximations, one for each rank.

    Attributes:
        core: The whitened weight ``K_g^T W K_x``, projected onto the whitened subspaces on both sides; in the whole
            space whitened on the shorter side only.
        total_energy: ``|K_g^T W K_x|_F^2``, of which `gains` are the reachable part.
        max_rank: The largest rank inside the subspaces.
        spectrum: Squared singular values of the projected, whitened weight, non-increasing.
        directions: Its singular vectors on the shorter side, in columns.
    """

    core: Tensor
    total_energy: float
    max_rank: int
    spectrum: Tensor
    directions: Tensor
    _left: _Side
    _right: _Side

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        left, right = self._left, self._right
        sides = (left.root, left.inside, left.outside, right.root, right.inside, right.outside)
        held = (self.core, self.directions, *sides)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def gains(self) -> Tensor:
        """Return ``(max_rank,)``: drop of the squared weighted error by each further rank, non-increasing."""
        return self.spectrum[: self.max_rank]

    def terms(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return rank-one terms in order: the sum of the first k is the best approximation of rank k, for every k.

        Args:
            rank: Number of terms, at most; there are `max_rank`.

        Returns:
            ``left`` ``(out, rank)`` and ``right`` ``(in, rank)``; term i is ``left[:, i] right[:, i]^T``. Their
            columns are orthogonal in the metric, not as they stand.
        """
        left, right = self._whitened_terms(rank)
        # One side has unit length, the other one the singular value: the root of it for both. Energies below the
        # rounding error of the first one are noise.
        limits = torch.finfo(self.spectrum.dtype)
        energies = self.spectrum[: left.shape[1]].clamp(min=limits.eps * float(self.spectrum[0]))
        scale = energies.pow(0.25).clamp(min=limits.tiny)
        left_scale, right_scale = (scale, 1 / scale) if self._short_side_is_left else (1 / scale, scale)
        return self._left.unwhiten(left * left_scale), self._right.unwhiten(right * right_scale)

    def truncate(self, rank: int) -> LowRankFactors:
        """Return the best approximation of at most ``rank``, between orthonormal bases.

        The squared weighted error is ``total_energy`` less the first ``rank`` gains.
        """
        left, right = self._whitened_terms(rank)
        left_basis, left_triangle = torch.linalg.qr(self._left.unwhiten(left))
        right_basis, right_triangle = torch.linalg.qr(self._right.unwhiten(right))
        return LowRankFactors(left_basis, left_triangle @ right_triangle.mT, right_basis)

    @property
    def _short_side_is_left(self) -> bool:
        return self.core.shape[0] <= self.core.shape[1]

    def _whitened_terms(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the leading directions of the shorter side, and the core in them: their product is ``core_r``."""
        directions = self.directions[:, : min(rank, self.max_rank)]
        if self._short_side_is_left:
            return directions, self.core.mT @ directions
        return self.core @ directions, directions


def project(
    weight: Tensor,
    *,
    gradient_metric: Tensor | None = None,
    input_metric: Tensor | None = None,
    left: Subspace | None = None,
    right: Subspace | None = None,
) -> ProjectedWeight:
    """Set up ``min over rank(M) <= r of tr(C_g (W - Q_L M Q_R^T) C_x (W - Q_L M Q_R^T)^T)``.

    Args:
        weight: ``W`` ``(out, in)``.
        gradient_metric: ``C_g`` ``(out, out)``, positive definite; ``None`` for the identity.
        input_metric: ``C_x`` ``(in, in)``, positive definite; ``None`` for the identity.
        left: ``span(Q_L)``, a subspace of dimension ``k_left`` of the output space; ``None`` for all of it.
        right: ``span(Q_R)``, a subspace of dimension ``k_right`` of the input space; ``None`` for all of it.

    Returns:
        The solutions for every rank.
    """
    weight = to_decomposition_dtype(weight)
    if left is None and right is None:
        return _project_onto_whole_space(weight, gradient_metric, input_metric)
    left_side, right_side = _Side.build(_root(gradient_metric), left), _Side.build(_root(input_metric), right)
    whitened = right_side.whiten(left_side.whiten(weight).mT).mT  # (out, in)
    core = right_side.restrict(left_side.restrict(whitened).mT).mT
    max_rank = min(
        weight.shape[0] if left is None else left.dimension,
        weight.shape[1] if right is None else right.dimension,
    )
    energies, directions = singular_spectrum(core)
    total_energy = float(whitened.square().sum())
    return ProjectedWeight(core, total_energy, max_rank, energies, directions, left_side, right_side)


def _project_onto_whole_space(
    weight: Tensor, gradient_metric: Tensor | None, input_metric: Tensor | None
) -> ProjectedWeight:
    """Return the solutions without subspaces, found without a root of the longer side's metric.

    With ``out <= in`` and the eigenvectors ``P`` of ``K_g^T W C_x W^T K_g``, the best approximation of rank r is
    ``K_g^-T P_r P_r^T K_g^T W``: of ``C_x`` only a product is needed. Otherwise the same of ``W^T``.
    """
    wide = weight.shape[0] <= weight.shape[1]
    short_metric, long_metric = (gradient_metric, input_metric) if wide else (input_metric, gradient_metric)
    short_side, long_side = _Side.build(_root(short_metric), None), _Side.build(None, None)
    half = short_side.whiten(weight if wide else weight.mT)  # (short, long)
    gram = half @ (half.mT if long_metric is None else long_metric @ half.mT)
    energies, directions = eigh_descending(gram)
    left_side, right_side = (short_side, long_side) if wide else (long_side, short_side)
    return ProjectedWeight(
        half if wide else half.mT,
        float(gram.trace()),
        min(weight.shape),
        energies,
        directions,
        left_side,
        right_side,
    )


def _root(metric: Tensor | None) -> Tensor | None:
    return None if metric is None else cholesky_root(metric)


def project_weight(
    weight: Tensor, statistics: LayerStatistics | None, options: DecompositionOptions, *, centred: bool = False
) -> ProjectedWeight:
    """Project a weight as the chosen decomposition does.

    Args:
        weight: ``(out, in)``.
        statistics: Its calibration statistics; not read by the data-free ``"svd"``.
        options: Decomposition and its settings.
        centred: Whether a bias will take up the mean error; read by JACTUS only, peers are as published.

    Returns:
        The best approximations of every rank.

    Raises:
        ValueError: If ``statistics`` is missing where the decomposition needs it.
    """
    if options.decomposition == "svd":
        return project(weight)
    if statistics is None:
        raise ValueError(f"`statistics` must be given for decomposition={options.decomposition!r}; got None.")
    weight = to_decomposition_dtype(weight)
    statistics = statistics.to(weight.device)
    gradient_metric, input_metric = _metrics(statistics, options, centred=centred)
    # The optimum in the whole space is made of the weight's rows and columns: with all of its own directions in them,
    # the subspaces restrict nothing.
    if options.decomposition != "jactus" or options.weight_energy >= 1:
        return project(weight, gradient_metric=gradient_metric, input_metric=input_metric)
    own_left, own_right = leading_singular_subspaces(weight, options.weight_energy)
    left = union_with_leading_eigenvectors(own_left, statistics.gradient.covariance, options.gradient_energy)
    right = union_with_leading_eigenvectors(own_right, statistics.input.covariance, options.input_energy)
    return project(weight, gradient_metric=gradient_metric, input_metric=input_metric, left=left, right=right)


def _metrics(
    statistics: LayerStatistics, options: DecompositionOptions, *, centred: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``C_g`` and ``C_x`` of a decomposition; ``None`` is the identity."""
    regularized = functools.partial(regularized_covariance, damping=options.damping)
    if options.decomposition == "fwsvd":
        return torch.diag(fisher_row_scales(statistics, options.damping).square()), None
    if options.decomposition == "asvd":
        return None, torch.diag(activation_scales(statistics.input).square())
    if options.decomposition == "svd-llm":
        return None, regularized(statistics.input, shrinkage=0.0)  # shrinkage is not part of the method
    around_mean = centred and options.decomposition == "jactus"
    return (
        regularized(statistics.gradient, shrinkage=options.shrinkage),
        regularized(statistics.input, shrinkage=options.shrinkage, centred=around_mean),
    )
