"""Sketches of a weight's gradient, against the gradient itself in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_jactus.numerics.sketches import GradientSketch, sketching_matrix
from tests.support.strategies import randn, seeds

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64 sums and a least-squares problem of a few dozen unknowns


def sketch_of(inputs, gradients, num_directions):
    sketch = GradientSketch.zeros(gradients.shape[1], inputs.shape[1], num_directions, dtype=torch.float64)
    sketch.update_(inputs, gradients)
    return sketch


@given(seed=seeds, rank=st.integers(1, 6), out_features=st.integers(6, 40), in_features=st.integers(6, 40))
def test_the_leading_vectors_of_a_gradient_of_low_rank_are_its_singular_vectors(seed, rank, out_features, in_features):
    inputs, gradients = randn(seed, rank, in_features), randn(seed + 1, rank, out_features)
    G = gradients.mT @ inputs
    left, right, values = sketch_of(inputs, gradients, 6).leading(rank)
    torch.testing.assert_close(values, torch.linalg.svdvals(G)[:rank], **EXACT)
    torch.testing.assert_close((left * values) @ right.mT, G, **EXACT)
    for vectors in (left, right):
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(rank, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize(("decay", "share"), [(0.5, 0.8), (1.0, 0.98), (2.0, 0.9999)])
def test_the_leading_vectors_hold_nearly_as_much_of_a_gradient_as_its_singular_vectors(decay, share):
    out_features, in_features, count = 96, 128, 16
    scales = torch.arange(1, in_features + 1, dtype=torch.float64) ** -decay
    inputs, gradients = randn(0, 2000, in_features) * scales, randn(1, 2000, out_features)
    G = gradients.mT @ inputs
    left, right, _ = sketch_of(inputs, gradients, count).leading(count)
    best = torch.linalg.svdvals(G)[:count].square().sum()
    assert (G @ right).square().sum() > share * best
    assert (G.mT @ left).square().sum() > share * best
    random = torch.linalg.qr(randn(2, in_features, count)).Q
    assert (G @ random).square().sum() < 0.5 * best


@given(seed=seeds, cut=st.integers(0, 20))
def test_sketches_of_parts_add_up(seed, cut):
    inputs, gradients = randn(seed, 20, 7), randn(seed + 1, 20, 9)
    whole = sketch_of(inputs, gradients, 4)
    first, second = (sketch_of(inputs[part], gradients[part], 4) for part in (slice(cut), slice(cut, None)))
    first.merge_(second)
    torch.testing.assert_close(first.left, whole.left, **EXACT)
    torch.testing.assert_close(first.right, whole.right, **EXACT)


def test_sketches_of_different_sizes_are_refused():
    inputs, gradients = randn(0, 20, 30), randn(1, 20, 30)
    with pytest.raises(ValueError, match=r"`other` must be of the same size; got \(30, 20\) and \(30, 18\)"):
        sketch_of(inputs, gradients, 2).merge_(sketch_of(inputs, gradients, 4))


def test_the_signs_are_the_same_everywhere_and_independent():
    signs = sketching_matrix(200, 40, dtype=torch.float64, device=None)
    expected = [1.0 - 2.0 * (splitmix64(place + (200 << 32)) >> 31 & 1) for place in range(8000)]
    assert signs.flatten().tolist() == expected
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    gram = signs.mT @ signs / 200
    assert (gram - torch.eye(40)).abs().max() < 5 / 200**0.5  # five standard deviations
    assert abs(float(signs.mean())) < 5 / 8000**0.5
    assert not torch.equal(signs[:100], sketching_matrix(100, 40, dtype=torch.float64, device=None))


def splitmix64(state):
    """The mixing of a 64-bit state, in integers of any size."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    return (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64


def test_bytes_are_those_of_the_sums():
    sketch = GradientSketch.zeros(30, 40, 4, dtype=torch.float32)
    assert sketch.left.nbytes + sketch.right.nbytes == GradientSketch.num_bytes(30, 40, 4, torch.float32)
