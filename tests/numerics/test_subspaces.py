"""Leading subspaces and their union, against the subspaces of dense matrices in float64."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_jactus.numerics.linalg import leading_count
from peft_jactus.numerics.subspaces import (
    Subspace,
    few_leading_eigenvectors,
    leading_singular_subspaces,
    subspace_union,
    union_with_leading_eigenvectors,
)
from tests.support import oracles
from tests.support.strategies import (
    covariances,
    dims,
    orthonormal,
    overlapping_bases,
    randn,
    random_orthonormal,
    seeds,
)

ORTHONORMAL = 1e-12  # rounding of float64, times the dimension
CONTAINED = 1e-7  # directions below sqrt(eps) = 1.5e-8 may be dropped, from each of several columns
# Eigenvectors are computed in float32 (eps 1.2e-7); across the gap of 10 that the tests leave at the cut
# they turn by little more.
FLOAT32_EIGENVECTORS = 1e-5


def projector(basis):
    return basis @ basis.mT


def assert_orthonormal(basis):
    eye = torch.eye(basis.shape[1], dtype=basis.dtype)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=ORTHONORMAL)


# -- subspace_union ---------------------------------------------------------------------------------------


@given(data=st.data(), dim=dims)
def test_union_is_orthonormal_and_contains_every_part(data, dim):
    bases = data.draw(overlapping_bases(dim))
    union = subspace_union(bases)
    assert_orthonormal(union)
    for basis in bases:
        torch.testing.assert_close(projector(union) @ basis, basis, rtol=0, atol=CONTAINED)


@given(data=st.data(), dim=dims)
def test_union_is_the_span_of_the_stack(data, dim):
    bases = data.draw(overlapping_bases(dim))
    union, expected = subspace_union(bases), oracles.span_projector(torch.cat(bases, dim=1))
    assert union.shape[1] == round(float(expected.trace()))
    torch.testing.assert_close(projector(union), expected, rtol=0, atol=CONTAINED)


@given(data=st.data(), dim=dims)
def test_union_does_not_depend_on_the_order_of_its_parts(data, dim):
    bases = data.draw(overlapping_bases(dim))
    one, other = subspace_union(bases), subspace_union(data.draw(st.permutations(bases)))
    torch.testing.assert_close(projector(one), projector(other), rtol=0, atol=CONTAINED)


@given(data=st.data(), dim=dims)
def test_union_starts_with_its_first_part(data, dim):
    bases = data.draw(overlapping_bases(dim))
    first = bases[0]
    assert torch.equal(subspace_union(bases)[:, : first.shape[1]], first)


@given(seed=seeds, exponent=st.integers(-7, 0))
def test_union_stays_orthonormal_for_nearly_parallel_parts(seed, exponent):
    """Beside generic ones: what rounding leaves of these is large for those."""
    basis = random_orthonormal(seed, 8, 3)
    tilts = torch.tensor([1.0, 10.0**exponent, 10.0**exponent], dtype=torch.float64)
    tilted = torch.linalg.qr(basis + tilts * randn(seed + 1, 8, 3)).Q
    sines = torch.linalg.svdvals(tilted - basis @ (basis.mT @ tilted))
    assume(sines.min() > 2 * torch.finfo(torch.float64).eps ** 0.5)  # else the direction counts as contained
    union = subspace_union([basis, tilted])
    assert union.shape == (8, 6)
    assert_orthonormal(union)


def test_rtol_is_the_sine_from_which_a_direction_counts():
    tilt = 1e-3
    basis = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    tilted = torch.tensor([[math.cos(tilt)], [math.sin(tilt)]], dtype=torch.float64)
    assert subspace_union([basis, tilted], rtol=0.9 * tilt).shape == (2, 2)
    assert subspace_union([basis, tilted], rtol=1.1 * tilt).shape == (2, 1)


def test_union_refuses_no_bases_and_bases_of_different_spaces():
    with pytest.raises(ValueError, match="`bases` must hold at least one basis"):
        subspace_union([])
    with pytest.raises(ValueError, match=r"first dimension; got \[2, 3\]"):
        subspace_union([torch.eye(3), torch.eye(2)])


# -- union_with_leading_eigenvectors ----------------------------------------------------------------------


@given(data=st.data(), dim=st.integers(2, 12))
def test_union_with_eigenvectors_is_the_union_of_the_same_parts(data, dim):
    basis = data.draw(orthonormal(dim))
    C, energy, leading = data.draw(covariances_with_a_gap(dim))
    union = union_with_leading_eigenvectors(basis, C, energy)
    assert_same_subspace(union, projector(subspace_union([basis, leading])))


@given(data=st.data(), dim=st.integers(2, 12))
def test_union_with_eigenvectors_drops_directions_that_the_basis_contains(data, dim):
    C, energy, leading = data.draw(covariances_with_a_gap(dim))
    union = union_with_leading_eigenvectors(leading, C, energy)
    assert_same_subspace(union, projector(leading))


@st.composite
def covariances_with_a_gap(draw, dim):
    """A covariance, an energy, and the leading eigenvectors that hold it; below and above dim / 2."""
    count = draw(st.integers(1, dim - 1))
    eigenvalues = torch.where(torch.arange(dim) < count, 1.0, 0.1).double()
    V = random_orthonormal(draw(seeds), dim, dim)
    energy = (count - 0.5) / float(eigenvalues.sum())  # between count - 1 and count
    return V @ torch.diag(eigenvalues) @ V.mT, energy, V[:, :count]


def assert_same_subspace(subspace, expected):
    dim, dimension = len(expected), round(float(expected.trace()))
    if dimension == dim:
        assert subspace is None
        return
    assert subspace.dimension == dimension
    assert (subspace.basis is None) != (subspace.complement is None)
    held = subspace.complement if subspace.basis is None else subspace.basis
    assert_orthonormal(held)
    actual = torch.eye(dim) - projector(held) if subspace.basis is None else projector(held)
    torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT32_EIGENVECTORS)


@given(data=st.data(), dim=dims)
def test_no_energy_adds_no_direction(data, dim):
    basis, C = data.draw(orthonormal(dim)), data.draw(covariances(dim, min_rank=1))
    union = union_with_leading_eigenvectors(basis, C, 0.0)
    if basis.shape[1] == dim:
        assert union is None
    else:
        assert torch.equal(union.basis, basis)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e20, 1e40])
def test_union_with_eigenvectors_does_not_depend_on_the_scale_of_the_covariance(scale):
    basis = random_orthonormal(0, 6, 1)
    C = torch.diag(torch.tensor([4.0, 3.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64))
    one, other = (union_with_leading_eigenvectors(basis, c * C, 0.9) for c in (1.0, scale))
    torch.testing.assert_close(one.basis, other.basis, rtol=0, atol=FLOAT32_EIGENVECTORS)


def test_subspace_knows_its_dimension_from_basis_or_complement():
    assert Subspace(basis=torch.eye(5)[:, :2]).dimension == 2
    assert Subspace(complement=torch.eye(5)[:, :2]).dimension == 3


# -- few_leading_eigenvectors -----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [512, 700])
@pytest.mark.parametrize(
    ("spectrum", "energy"),
    [
        (lambda i: 0.9**i, 0.99),
        (lambda i: 1.0 / (1 + i) ** 2, 0.95),
        (lambda i: 100.0 * (i < 3) + 0.9**i, 0.99),
        (lambda i: 1.0 * (i < 5), 0.9),
    ],
)
def test_few_eigenvectors_hold_the_energy_and_are_hardly_more_than_needed(dim, spectrum, energy):
    C, eigenvalues = covariance_with(spectrum, dim)
    found = few_leading_eigenvectors(C.float(), energy).double()
    torch.testing.assert_close(found.mT @ found, torch.eye(found.shape[1]).double(), rtol=0, atol=FLOAT32_EIGENVECTORS)
    assert float((found.mT @ C @ found).trace() / C.trace()) >= energy - FLOAT32_EIGENVECTORS
    needed = leading_count(eigenvalues, energy)
    assert needed <= found.shape[1] <= 1.1 * needed + 1


@pytest.mark.parametrize("dim", [512, 700])
def test_many_eigenvectors_are_left_to_an_eigendecomposition(dim):
    C, _ = covariance_with(lambda i: 1.0 / (1 + i), dim)
    assert few_leading_eigenvectors(C.float(), 0.99) is None
    small, _ = covariance_with(lambda i: 0.5**i, 100)
    assert few_leading_eigenvectors(small.float(), 0.9) is None


@pytest.mark.parametrize("energy", [0.0, 1.0])
def test_none_and_all_of_the_energy_are_left_to_an_eigendecomposition(energy):
    C, _ = covariance_with(lambda i: 0.5**i, 512)
    assert few_leading_eigenvectors(C.float(), energy) is None


def test_the_union_is_the_same_with_few_eigenvectors():
    C, _ = covariance_with(lambda i: 0.01 ** (i // 4), 512)  # gaps after every fourth
    basis = random_orthonormal(1, 512, 20)
    union = union_with_leading_eigenvectors(basis, C, 0.999)
    leading = torch.linalg.eigh(C).eigenvectors[:, -8:]
    expected = oracles.span_projector(torch.cat([basis, leading], dim=1))
    torch.testing.assert_close(projector(union.basis), expected, rtol=0, atol=FLOAT32_EIGENVECTORS)


def covariance_with(spectrum, dim):
    """A covariance of random eigenvectors, and its eigenvalues ``spectrum(i)``."""
    eigenvalues = spectrum(torch.arange(dim, dtype=torch.float64))
    V = random_orthonormal(0, dim, dim)
    return (V * eigenvalues) @ V.mT, eigenvalues


# -- leading_singular_subspaces --------------------------------------------------------------------------


@given(out_features=dims, in_features=dims, seed=seeds, energy=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_leading_subspaces_are_orthonormal_and_hold_the_energy_on_both_sides(out_features, in_features, seed, energy):
    W = randn(seed, out_features, in_features)
    left, right = leading_singular_subspaces(W, energy)
    sigma = torch.linalg.svdvals(W)
    assert left.shape[1] == right.shape[1] == max(1, leading_count(sigma.square(), energy))
    assert_orthonormal(left)
    assert_orthonormal(right)
    expected = float(sigma[: left.shape[1]].square().sum())
    for held in (left.mT @ W, W @ right, left.mT @ W @ right):
        assert float(held.square().sum()) == pytest.approx(expected, rel=1e-9)
