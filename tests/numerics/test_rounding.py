"""Rounding with feedback, against the procedure in its plainest form, and against rounding number by number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_jactus.numerics.rounding import damped, fit_to_inputs, nearest_levels, round_with_feedback
from tests.support.strategies import dims, randn, seeds

LEVELS = torch.tensor([-1.0, -0.4, -0.1, 0.0, 0.2, 0.5, 1.0], dtype=torch.float64)


def problem(seed, out_features, in_features, num_vectors=40):
    """Return a weight, scales, and the second moment of inputs with a common direction, as activations have one."""
    weight = randn(seed, out_features, in_features)
    inputs = randn(seed + 1, num_vectors, in_features) + 3 * randn(seed + 2, 1, in_features)
    scales = weight.abs().amax(1, keepdim=True).expand_as(weight)
    return weight, scales, inputs.mT @ inputs / num_vectors


def change(weight, rounded, second_moment):
    error = weight - rounded
    return float((error @ second_moment * error).sum())


def rounded_column_by_column(weight, scales, second_moment):
    """Round as Frantar et al. (2023) define it: after each column the best change of all that are left is made."""
    covariance = damped(second_moment)
    left = covariance.diagonal().argsort(descending=True).tolist()
    weight, chosen = weight.clone(), torch.zeros_like(weight)
    while left:
        inverse = torch.linalg.inv(covariance[left][:, left])
        column = left[0]
        chosen[:, column] = LEVELS[nearest_levels(weight[:, column] / scales[:, column], LEVELS)] * scales[:, column]
        error = weight[:, column] - chosen[:, column]
        weight[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return chosen


@given(seed=seeds, size=st.integers(1, 30))
def test_the_nearest_level_is_found(seed, size):
    values = randn(seed, 3, size)
    expected = (values.unsqueeze(-1) - LEVELS).abs().argmin(-1)
    assert torch.equal(nearest_levels(values, LEVELS), expected)


@given(seed=seeds, out_features=dims, in_features=dims)
def test_each_column_is_rounded_after_what_the_ones_before_it_did(seed, out_features, in_features):
    weight, scales, moment = problem(seed, out_features, in_features)
    chosen = round_with_feedback(weight, scales, LEVELS, moment)
    torch.testing.assert_close(LEVELS[chosen] * scales, rounded_column_by_column(weight, scales, moment))


@pytest.mark.parametrize("in_features", [63, 64, 65, 200])
def test_blocks_of_columns_make_no_difference(in_features):
    weight, scales, moment = problem(3, 5, in_features, num_vectors=2 * in_features)
    chosen = round_with_feedback(weight, scales, LEVELS, moment)
    torch.testing.assert_close(LEVELS[chosen] * scales, rounded_column_by_column(weight, scales, moment))


@pytest.mark.parametrize("seed", range(5))
def test_outputs_change_several_times_less_than_by_rounding_each_number(seed):
    weight, scales, moment = problem(10 * seed, 30, 100, num_vectors=400)
    feedback = LEVELS[round_with_feedback(weight, scales, LEVELS, moment)] * scales
    nearest = LEVELS[nearest_levels(weight / scales, LEVELS)] * scales
    assert change(weight, feedback, moment) < 0.3 * change(weight, nearest, moment)


def test_inputs_that_know_nothing_of_each_other_are_rounded_by_themselves():
    weight, scales, _ = problem(0, 6, 9)
    moment = torch.diag(torch.arange(9.0, 0.0, -1.0, dtype=torch.float64))
    assert torch.equal(round_with_feedback(weight, scales, LEVELS, moment), nearest_levels(weight / scales, LEVELS))


def test_inputs_of_zero_are_no_trouble():
    weight, scales, moment = problem(0, 6, 9)
    moment[:, 4] = moment[4] = 0
    for second_moment in (moment, torch.zeros(9, 9)):
        chosen = round_with_feedback(weight, scales, LEVELS, second_moment)
        assert chosen.min() >= 0
        assert chosen.max() < len(LEVELS)


@given(seed=seeds, out_features=dims, in_features=st.integers(2, 8))
def test_a_fitted_part_has_the_least_squared_error_over_the_inputs(seed, out_features, in_features):
    weight, first = randn(seed, out_features, in_features), randn(seed + 1, in_features - 1, in_features)
    inputs = randn(seed + 2, 50, in_features)
    fitted = fit_to_inputs(weight, first, inputs.mT @ inputs)
    expected = torch.linalg.lstsq(inputs @ first.mT, inputs @ weight.mT).solution.mT
    torch.testing.assert_close(fitted @ first, expected @ first, rtol=1e-3, atol=1e-4)
