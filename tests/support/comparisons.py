"""Compare calibration statistics: of two runs, or with single tokens."""

import pytest

from tests.support import oracles
from tests.support.tiny_models import FLOAT64


def assert_close(actual, expected, *, scale, rtol, what=""):
    difference = float((actual.double() - expected.double()).norm())
    assert difference <= rtol * scale, f"{what}: off by {difference / scale:.1e}"


def assert_moments_close(moment, covariance, mean, *, rtol, what):
    """Compare in norm, and means with the size of a vector: that of a key's gradients is zero."""
    assert_close(moment.covariance, covariance, scale=covariance.norm(), rtol=rtol, what=f"{what} covariance")
    assert_close(moment.mean, mean, scale=covariance.trace().sqrt(), rtol=rtol, what=f"{what} mean")


def assert_same_statistics(actual, expected, *, rtol=FLOAT64):
    assert set(actual) == set(expected)
    for name, layer in expected.items():
        for side in ("input", "gradient"):
            one, other = getattr(actual[name], side), getattr(layer, side)
            assert one.num_tokens == other.num_tokens, f"{name} {side}"
            assert_moments_close(one, other.covariance, other.mean, rtol=rtol, what=f"{name} {side}")
            # Fourth powers: four times the relative error of a vector.
            assert float(one.quartic_sum) == pytest.approx(float(other.quartic_sum), rel=4 * rtol)


def assert_statistics_of(actual, tokens, *, rtol=FLOAT64):
    """Compare with the outer products of single tokens."""
    assert set(actual) == set(tokens)
    for name, expected in tokens.items():
        layer = actual[name]
        assert layer.num_tokens == layer.input.num_tokens == len(expected.inputs), name
        for moment, vectors in ((layer.input, expected.inputs), (layer.gradient, expected.gradients)):
            covariance, mean = oracles.covariance(vectors), oracles.mean(vectors)
            assert_moments_close(moment, covariance, mean, rtol=rtol, what=name)
