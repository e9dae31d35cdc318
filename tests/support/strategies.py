"""Hypothesis strategies for matrices: seeds and spectra are drawn, entries never.

Spectra cover what goes wrong: zero, rank-deficient, repeated (all of them, or in pairs), and condition numbers up to
1e8. They shrink to the identity.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_jactus.numerics.moments import LayerStatistics, SecondMoment

MAX_CONDITION_EXPONENT = 8

seeds = st.integers(0, 2**32 - 1)
dims = st.integers(1, 12)


def randn(seed: int, *shape: int) -> Tensor:
    """Normal entries in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_orthonormal(seed: int, dim: int, num: int) -> Tensor:
    """``(dim, num)`` with orthonormal columns."""
    return torch.linalg.qr(randn(seed, dim, num)).Q


@st.composite
def spectra(draw, size: int, *, min_rank: int = 0, max_exponent: int = MAX_CONDITION_EXPONENT) -> Tensor:
    """``(size,)``, non-negative and non-increasing, the largest value 1 unless all are 0."""
    values = torch.logspace(0, -draw(st.integers(0, max_exponent)), size, dtype=torch.float64)
    if draw(st.booleans()):  # in pairs
        values = values[torch.arange(size) // 2 * 2]
    rank = size - draw(st.integers(0, size - min_rank))
    return torch.where(torch.arange(size) < rank, values, 0.0)


@st.composite
def orthonormal(draw, dim: int, *, min_columns: int = 1) -> Tensor:
    """``(dim, k)`` with orthonormal columns, ``min_columns <= k <= dim``."""
    return random_orthonormal(draw(seeds), dim, draw(st.integers(min_columns, dim)))


@st.composite
def weights(draw, out_features: int, in_features: int, **spectrum: int) -> Tensor:
    """``(out, in)`` with a drawn spectrum."""
    size = min(out_features, in_features)
    U = random_orthonormal(draw(seeds), out_features, size)
    V = random_orthonormal(draw(seeds), in_features, size)
    return U @ torch.diag(draw(spectra(size, **spectrum))) @ V.mT


@st.composite
def covariances(draw, dim: int, **spectrum: int) -> Tensor:
    """``(dim, dim)``, positive semi-definite with a drawn spectrum."""
    V = random_orthonormal(draw(seeds), dim, dim)
    C = V @ torch.diag(draw(spectra(dim, **spectrum))) @ V.mT
    return (C + C.mT) / 2


def regular_covariances(dim: int) -> st.SearchStrategy[Tensor]:
    """Positive definite, and far enough from singular to be inverted in an oracle."""
    return covariances(dim, min_rank=dim, max_exponent=4)


@st.composite
def overlapping_bases(draw, dim: int, *, num_bases: int = 3) -> list[Tensor]:
    """Orthonormal bases whose spans share directions exactly, are tilted by little, or have nothing in common."""
    frame = random_orthonormal(draw(seeds), dim, dim)
    bases = []
    for _ in range(num_bases):
        size = draw(st.integers(1, dim))
        chosen = draw(st.permutations(range(dim)))[:size]
        tilt = draw(st.sampled_from([0.0, 1e-3, 1.0]))
        rotation = random_orthonormal(draw(seeds), size, size)
        bases.append(torch.linalg.qr(frame[:, chosen] @ rotation + tilt * randn(draw(seeds), dim, size)).Q)
    return bases


def moment_of(covariance: Tensor, *, num_tokens: int = 100) -> SecondMoment:
    """A moment with exactly this covariance; only for fixed shrinkage, and its mean is zero."""
    return SecondMoment(
        scatter=num_tokens * covariance,
        mean=covariance.new_zeros(len(covariance)),
        quartic_sum=covariance.new_zeros(()),
        absolute_sum=covariance.new_zeros(covariance.shape[0]),
        num_tokens=num_tokens,
    )


def statistics_of(gradient_covariance: Tensor, input_covariance: Tensor) -> LayerStatistics:
    """Statistics with exactly these covariances; only for fixed shrinkage."""
    return LayerStatistics(moment_of(input_covariance), moment_of(gradient_covariance))


def moment_from(vectors: Tensor, *, dtype: torch.dtype = torch.float64) -> SecondMoment:
    """The moment of the rows of ``vectors``."""
    moment = SecondMoment.zeros(vectors.shape[1], dtype=dtype)
    moment.update_(vectors)
    return moment
