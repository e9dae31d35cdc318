"""Matrix factorizations, against PyTorch's own in float64."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_jactus.errors import NumericalWarning
from peft_jactus.numerics.linalg import add_gram_, cholesky_root, leading_count, singular_spectrum
from tests.support.strategies import (
    covariances,
    dims,
    randn,
    seeds,
    spectra,
)

ORTHONORMAL = 1e-12  # rounding of float64, times the dimension


def assert_orthonormal(basis):
    eye = torch.eye(basis.shape[1], dtype=basis.dtype)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=ORTHONORMAL)


# -- add_gram_ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 95, 96, 97, 384, 386, 1000])
def test_a_gram_matrix_is_added_block_by_block(dim):
    vectors, start = randn(0, 5, dim), randn(1, dim, dim)
    start = start + start.mT
    matrix = start.clone()
    add_gram_(matrix, vectors)
    torch.testing.assert_close(matrix, start + vectors.mT @ vectors, rtol=0, atol=ORTHONORMAL)
    torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=ORTHONORMAL)


# -- singular_spectrum ------------------------------------------------------------------------------------


@given(out_features=dims, in_features=dims, seed=seeds)
def test_the_spectrum_is_that_of_a_singular_value_decomposition(out_features, in_features, seed):
    W = randn(seed, out_features, in_features)
    energies, vectors = singular_spectrum(W)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    tolerance = ORTHONORMAL * float(sigma[0] ** 2)
    torch.testing.assert_close(energies, sigma.square(), rtol=0, atol=tolerance)
    short = U if out_features <= in_features else Vh.mT
    assert_orthonormal(vectors)
    torch.testing.assert_close(
        (vectors * energies) @ vectors.mT, (short * sigma**2) @ short.mT, rtol=0, atol=tolerance
    )


# -- cholesky_root ----------------------------------------------------------------------------------------


@given(data=st.data(), dim=dims)
def test_cholesky_root_reproduces_the_matrix(data, dim):
    C = data.draw(covariances(dim, min_rank=dim))
    K = cholesky_root(C)
    assert torch.equal(K, K.tril())
    torch.testing.assert_close(K @ K.mT, C, rtol=0, atol=1e-14 * dim)  # the largest eigenvalue is 1


def test_cholesky_root_is_float64_for_a_float32_matrix():
    assert cholesky_root(torch.eye(2)).dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cholesky_root_says_how_much_jitter_it_added(scale):
    slightly_indefinite = scale * torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-7]], dtype=torch.float64)
    with pytest.warns(NumericalWarning, match=r"needed a jitter of \d\.\de-\d\d of the mean diag"):
        K = cholesky_root(slightly_indefinite)
    torch.testing.assert_close(K @ K.mT, slightly_indefinite, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::peft_jactus.numerics.linalg.NumericalWarning")  # attempts before it gives up
@pytest.mark.parametrize("diagonal", [[1.0, -1.0], [1.0, -0.1], [0.0, 0.0], [1.0, math.nan]], ids=str)
def test_cholesky_root_refuses_what_jitter_cannot_repair(diagonal):
    with pytest.raises(ValueError, match=r"positive definite.*mean diagonal.*`damping`"):
        cholesky_root(torch.diag(torch.tensor(diagonal)))


# -- leading_count ----------------------------------------------------------------------------------------


@given(data=st.data(), size=dims, ratio=st.sampled_from([0.25, 0.5, 0.9, 0.99]))
def test_leading_count_is_the_least_that_reaches_the_ratio(data, size, ratio):
    energies = data.draw(spectra(size, min_rank=1))
    total = float(energies.sum())
    shares = [float(energies[:k].sum()) / total for k in range(size + 1)]
    assume(all(abs(share - ratio) > 1e-12 for share in shares))  # where rounding does not decide
    assert leading_count(energies, ratio) == next(k for k in range(size + 1) if shares[k] > ratio)


@given(data=st.data(), size=dims)
def test_leading_count_at_one_is_the_numerical_rank(data, size):
    energies = data.draw(spectra(size))
    rounding = 1e-18 * energies[0]
    assert leading_count(energies + rounding, 1.0) == int(energies.count_nonzero())


def test_leading_count_never_counts_rounding_errors():
    energies = torch.cat([torch.ones(1), torch.full((999,), 1e-13)]).double()
    assert leading_count(energies, 1 - 1e-12) == 1


def test_leading_count_at_the_edges():
    energies = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert leading_count(energies, 0.0) == 0
    assert leading_count(energies, 0.5) == 2  # reached, not exceeded
    assert leading_count(energies, 0.5 + 1e-12) == 3
    assert leading_count(torch.zeros(4), 0.99) == 0
    assert leading_count(torch.tensor([5.0]), 1e-9) == 1
