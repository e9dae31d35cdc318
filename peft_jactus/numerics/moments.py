"""Sums over the vectors that a linear layer sees, in training: what calibration collects of one layer.

Over the calibration positions (tokens, patches) that the attention mask keeps:

    input covariance     C_x = 1/N sum_t x_t x_t^T   (in, in)
    gradient covariance  C_g = 1/N sum_t g_t g_t^T   (out, out),  g_t = d loss / d (W x_t + b)

both uncentred second moments, as in K-FAC (Martens & Grosse, arXiv:1503.05671). What is stored are sums
and counts, so that statistics of parts of the data add up to those of the whole.

The sum of outer products is kept around the running mean: around zero, the variance of an entry that hardly varies
would be the small difference of two large numbers (Chan, Golub & LeVeque, "Algorithms for computing the sample
variance", The American Statistician 37, 1983).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from peft_jactus.numerics.linalg import add_gram_, to_decomposition_dtype
from peft_jactus.numerics.sketches import GradientSketch

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = ("scatter", "mean", "quartic_sum", "absolute_sum")


@dataclass
class SecondMoment:
    """Running sums of one vector variable of dimension ``dim``.

    Attributes:
        scatter: ``(dim, dim)``, sum of ``(x - mean) (x - mean)^T``.
        mean: ``(dim,)``, float64, mean of ``x``; zero without any.
        quartic_sum: ``()``, float64, sum of ``|x|^4``; what the Ledoit-Wolf estimator needs beyond the covariance.
        absolute_sum: ``(dim,)``, sum of the absolute values of ``x``, entry by entry; what ASVD scales with.
        num_tokens: How many vectors were added.
        identity: Equal for what is one variable: of this very object, or of those that a file gives for one entry of
            it. Used as a key in place of the sums, which need not be kept for that.
    """

    scatter: Tensor
    mean: Tensor
    quartic_sum: Tensor
    absolute_sum: Tensor
    num_tokens: int = 0
    identity: object = field(default_factory=object, repr=False, compare=False)

    @classmethod
    def zeros(
        cls,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> SecondMoment:
        """Return the statistics of no vector at all; sums are kept in ``dtype`` on ``device``."""
        wide_dtype = dtype if torch.device(device or "cpu").type == "mps" else torch.float64
        return cls(
            scatter=torch.zeros(dim, dim, dtype=dtype, device=device),
            mean=torch.zeros(dim, dtype=wide_dtype, device=device),
            quartic_sum=torch.zeros((), dtype=wide_dtype, device=device),
            absolute_sum=torch.zeros(dim, dtype=dtype, device=device),
        )

    @staticmethod
    def num_bytes(dim: int, dtype: torch.dtype) -> int:
        """Return what the matrix and the vectors of `zeros` take."""
        return dim * ((dim + 1) * dtype.itemsize + torch.float64.itemsize)

    @property
    def dim(self) -> int:
        """The dimension of the vectors."""
        return self.mean.shape[0]

    @property
    def covariance(self) -> Tensor:
        """The uncentred covariance ``(dim, dim)``, float64."""
        return self._covariance(mean_weight=1.0)

    @property
    def centred_covariance(self) -> Tensor:
        """The covariance ``(dim, dim)`` around the mean, ``C - (1 - 1 / N) mean mean^T``, float64.

        One ``N``-th of the mean's square stays, for the mean of N vectors is known to so much only; of one, all.
        """
        return self._covariance(mean_weight=1 / self.num_tokens)

    def _covariance(self, *, mean_weight: float) -> Tensor:
        mean = to_decomposition_dtype(self.mean)
        return (to_decomposition_dtype(self.scatter) / self.num_tokens).addr_(mean, mean, alpha=mean_weight)

    @property
    def mean_absolute(self) -> Tensor:
        """The mean of the absolute values ``(dim,)``, float64."""
        return to_decomposition_dtype(self.absolute_sum) / self.num_tokens

    def update_(self, vectors: Tensor) -> None:
        """Add ``vectors`` ``(num_vectors, dim)``, in the precision of the sums."""
        num_vectors = vectors.shape[0]
        if num_vectors == 0:  # they have no mean
            return
        vectors = vectors.detach().to(self.scatter.dtype)
        mean = vectors.mean(0)
        around_mean = vectors - mean
        add_gram_(self.scatter, around_mean)
        self.quartic_sum.add_(torch.linalg.vector_norm(vectors, dim=1).to(self.quartic_sum).pow(4).sum())
        self.absolute_sum.add_(vectors.abs().sum(0))
        # What rounding took from the mean is what is left around it.
        self._join_(num_vectors, mean.to(self.mean) + around_mean.mean(0))

    def merge_(self, other: SecondMoment) -> None:
        """Add the sums of ``other``, taken over other vectors of the same variable."""
        if other.dim != self.dim:
            raise ValueError(f"`other` must have dimension {self.dim}; got {other.dim}.")
        if other.num_tokens == 0:
            return
        self.scatter.add_(other.scatter.to(self.scatter))
        self.quartic_sum.add_(other.quartic_sum.to(self.quartic_sum))
        self.absolute_sum.add_(other.absolute_sum.to(self.absolute_sum))
        self._join_(other.num_tokens, other.mean.to(self.mean))

    def _join_(self, num_others: int, mean_of_others: Tensor) -> None:
        """Count other vectors whose sums, and whose scatter around their own mean, have been added."""
        total = self.num_tokens + num_others
        shift = mean_of_others - self.mean
        rounded = shift.to(self.scatter.dtype)
        self.scatter.addr_(rounded, rounded, alpha=self.num_tokens * num_others / total)
        self.mean.add_(shift, alpha=num_others / total)
        self.num_tokens = total

    def scatter_around(self, point: Tensor) -> Tensor:
        """Return the sum of ``(x - point) (x - point)^T``, ``(dim, dim)``, for a ``point`` ``(dim,)``."""
        shift = (self.mean - point).to(self.scatter.dtype)
        return torch.addr(self.scatter, shift, shift, alpha=self.num_tokens)

    def to(self, device: torch.device) -> SecondMoment:
        """Return the sums on ``device``; these very ones if they are there already."""
        if self.scatter.device == device:
            return self
        tensors = {name: getattr(self, name).to(device) for name in TENSORS}
        return SecondMoment(**tensors, num_tokens=self.num_tokens)

    def clone(self) -> SecondMoment:
        """Return an independent copy."""
        tensors = {name: getattr(self, name).clone() for name in TENSORS}
        return SecondMoment(**tensors, num_tokens=self.num_tokens)

    def is_finite(self) -> bool:
        """Whether no sum has overflowed or met a NaN."""
        return all(bool(torch.isfinite(getattr(self, name)).all()) for name in TENSORS)

    def ledoit_wolf_shrinkage(self) -> float:
        """Return the shrinkage intensity towards a scaled identity, in [0, 1].

        For the uncentred covariance ``C`` of ``N`` vectors and ``mu = tr(C) / dim``:
        ``min(1, (sum_t |x_t|^4 / N - |C|_F^2) / (N |C - mu I|_F^2))``.

        References:
            Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
            J. Multivariate Analysis 88, 2004, with the mean taken as known (zero).
        """
        covariance = self.covariance
        mu = covariance.diagonal().mean()
        squared_norm = torch.linalg.vector_norm(covariance).square()
        spread = squared_norm - self.dim * mu.square()  # = |C - mu I|_F^2
        if not spread > 0:  # a multiple of the identity is its own target
            return 1.0
        noise = float(self.quartic_sum) / self.num_tokens - float(squared_norm)
        return min(1.0, max(0.0, noise / (self.num_tokens * float(spread))))


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one linear layer.

    Attributes:
        input: Sums of the layer's input vectors. Layers fed by the same tensor share this object.
        gradient: Sums of the gradient of the summed loss with respect to the layer's output vectors.
        row_fisher: ``(out,)``, sum over examples and over a row's entries of the squared gradient of the weight; only
            FWSVD asks for it, ``None`` otherwise. Where a model flattens examples and positions into one dimension,
            as in front of experts, each position is taken for an example.
        weight_gradient: Sketch of the gradient of the summed loss with respect to the weight; ``None`` where no
            adaptation ranks start along it.
    """

    input: SecondMoment
    gradient: SecondMoment
    row_fisher: Tensor | None = None
    weight_gradient: GradientSketch | None = None

    @property
    def num_tokens(self) -> int:
        """How many positions (not calls, not batches) were counted."""
        return self.gradient.num_tokens

    def to(self, device: torch.device) -> LayerStatistics:
        """Return the statistics on ``device``."""
        row_fisher = None if self.row_fisher is None else self.row_fisher.to(device)
        sketch = None if self.weight_gradient is None else self.weight_gradient.to(device)
        return LayerStatistics(self.input.to(device), self.gradient.to(device), row_fisher, sketch)


@dataclass(frozen=True)
class StatisticsNeeds:
    """What a calibration collects beside the two covariances.

    Attributes:
        row_fisher: The Fisher information of each layer's rows.
        num_directions: How many leading directions of each weight's gradient; 0 for no sketch of it.
    """

    row_fisher: bool = False
    num_directions: int = 0

    def num_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Return what all sums of one layer take, the covariances among them."""
        moments = SecondMoment.num_bytes(out_features, dtype) + SecondMoment.num_bytes(in_features, dtype)
        fisher = out_features * dtype.itemsize if self.row_fisher else 0
        if not self.num_directions:
            return moments + fisher
        return moments + fisher + GradientSketch.num_bytes(out_features, in_features, self.num_directions, dtype)
