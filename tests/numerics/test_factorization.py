import pytest
import torch

from peft_jactus.numerics.approximation import project_weight
from peft_jactus.numerics.factorization import factorize
from peft_jactus.numerics.moments import LayerStatistics
from tests.support import oracles
from tests.support.options import decomposition_options, factorization_options
from tests.support.strategies import moment_from, randn
from tests.support.weighted_layers import (
    EXACT,
    NUM_TOKENS,
    OPTIONS,
    some_weights,
    their_statistics,
    vectors_and_statistics,
)

# Float64 rounding: all entries are of order 1, and covariances of 40 Gaussian vectors well conditioned.
ROUNDING = 1e-10


@pytest.fixture
def weights():
    return some_weights()


@pytest.fixture
def statistics():
    return their_statistics()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_factors_are_the_best_approximation_with_bases_that_are_the_identity_in_some_rows(weights, statistics, rank):
    factors = factorize(weights["query"], None, statistics["query"], rank, OPTIONS)
    assert factors.rank == rank
    left, right = factors.left.dense(), factors.right.dense()
    assert (left.shape, right.shape) == ((6, rank), (8, rank))
    outputs, inputs = factors.left.order[:rank], factors.right.order[:rank]
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(left[outputs], eye, rtol=0, atol=0)
    torch.testing.assert_close(right[inputs], eye, rtol=0, atol=0)
    torch.testing.assert_close(factors.weight().dense()[outputs][:, inputs], factors.core, rtol=0, atol=ROUNDING)
    best = project_weight(weights["query"], statistics["query"], OPTIONS.decomposition).truncate(rank).dense()
    torch.testing.assert_close(factors.weight().dense(), best, rtol=0, atol=ROUNDING)


def test_full_rank_reproduces_a_weight_that_the_union_does_not_hold(weights, statistics):
    narrow = decomposition_options(weight_energy=0.5, input_energy=0, gradient_energy=0)
    factors = factorize(weights["query"], None, statistics["query"], 6, factorization_options(narrow))
    torch.testing.assert_close(factors.weight().dense(), weights["query"], rtol=0, atol=ROUNDING)
    capped = factorize(weights["query"], None, statistics["query"], 5, factorization_options(narrow))
    assert capped.rank < 5


def test_rank_is_capped_at_full_rank(weights):
    factors = factorize(weights["query"], None, None, 99, factorization_options(decomposition_options("svd")))
    assert factors.rank == 6
    torch.testing.assert_close(factors.weight().dense(), weights["query"], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rank", [1, 4])
def test_bias_correction_removes_the_mean_output_error_on_the_calibration_data(rank):
    W, bias = randn(0, 6, 8), randn(1, 6)
    inputs, _, statistics = vectors_and_statistics(2, W.shape)
    factors = factorize(W, bias, statistics, rank, OPTIONS)
    error = (inputs @ W.mT + bias) - (inputs @ factors.weight().dense().mT + factors.bias)
    assert float(error.norm()) > 1.0  # there is an error,
    torch.testing.assert_close(error.mean(0), torch.zeros(6).double(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rank", [1, 3])
def test_with_a_bias_to_correct_the_error_around_the_mean_is_least(rank):
    W, bias = randn(0, 6, 8), randn(1, 6)
    inputs, gradients, statistics = vectors_and_statistics(2, W.shape)
    inputs = inputs + 3.0  # far from zero: around it, the best direction is the mean
    statistics = LayerStatistics(moment_from(inputs), statistics.gradient)
    C_g, mean = oracles.covariance(gradients), oracles.mean(inputs)
    deviations = oracles.covariance(inputs - mean) + torch.outer(mean, mean) / NUM_TOKENS
    factors = factorize(W, bias, statistics, rank, OPTIONS)
    expected = oracles.weighted_truncation(W, C_g, deviations, rank)
    torch.testing.assert_close(factors.weight().dense(), expected, rtol=0, atol=ROUNDING)

    def weighted_output_error(dense, new_bias):
        error = inputs @ (W - dense).mT + bias - new_bias
        return float((error @ C_g * error).sum())

    by_kfac = factorization_options(decomposition_options("kfac", shrinkage=0.0, damping=0.0))
    around_zero = factorize(W, bias, statistics, rank, by_kfac)
    torch.testing.assert_close(
        around_zero.weight().dense(),
        oracles.weighted_truncation(W, C_g, oracles.covariance(inputs), rank),
        rtol=0,
        atol=ROUNDING,
    )
    error_around_zero = weighted_output_error(around_zero.weight().dense(), around_zero.bias)
    assert weighted_output_error(factors.weight().dense(), factors.bias) < 0.98 * error_around_zero


def test_bias_stays_without_correction_without_statistics_and_without_bias():
    W, bias = randn(0, 6, 8), randn(1, 6)
    _, _, statistics = vectors_and_statistics(2, W.shape)
    uncorrected = factorization_options(decomposition=EXACT, bias_correction=False)
    data_free = factorization_options(decomposition_options("svd"))
    assert torch.equal(factorize(W, bias, statistics, 2, uncorrected).bias, bias)
    assert torch.equal(factorize(W, bias, None, 2, data_free).bias, bias)
    assert factorize(W, None, statistics, 2, OPTIONS).bias is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_are_float64_whatever_the_weight(statistics, dtype):
    W, bias = randn(0, 6, 8).to(dtype), randn(1, 6).to(dtype)
    factors = factorize(W, bias, statistics["query"], 2, OPTIONS)
    for tensor in (factors.left.coefficients, factors.core, factors.right.coefficients, factors.bias):
        assert tensor.dtype == torch.float64
