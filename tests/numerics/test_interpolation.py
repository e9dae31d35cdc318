"""Interpolative decompositions, against the rows that they stand for."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from peft_jactus.numerics.interpolation import interpolate_rows, pairs_of
from tests.support.strategies import dims, randn, random_orthonormal, seeds

LARGEST_COEFFICIENT = 1.05
LARGEST_OF_PAIRS = 16.0
# Exchanges stop on coefficients that rounding has touched; they are then computed once more.
ROUNDING = 1e-9
FLOAT64 = 1e-12


@st.composite
def tall_bases(draw):
    """Orthonormal columns, rows of any size, repeated rows; and the same without orthonormal columns."""
    dim = draw(dims)
    rank = draw(st.integers(1, dim))
    spread = draw(st.integers(0, 6))
    scales = torch.logspace(0, -spread, dim, dtype=torch.float64)[draw(st.permutations(range(dim)))]
    basis = scales[:, None] * randn(draw(seeds), dim, rank)
    if dim > rank and draw(st.booleans()):
        basis[draw(st.integers(0, dim - 1))] = basis[draw(st.integers(0, dim - 1))]
    orthonormal_columns = torch.linalg.qr(basis).Q
    return orthonormal_columns if draw(st.booleans()) else basis


@given(basis=tall_bases())
def test_chosen_rows_give_the_others_with_small_coefficients(basis):
    try:
        found = interpolate_rows(basis)
    except ValueError:
        assert torch.linalg.matrix_rank(basis, rtol=1e-9) < basis.shape[1]
        return
    dim, rank = basis.shape
    assert sorted(torch.cat([found.rows, found.others]).tolist()) == list(range(dim))
    assert found.others.tolist() == sorted(found.others.tolist())
    assert found.rows.shape == (rank,)
    assert found.coefficients.shape == (dim - rank, rank)
    assert found.coefficients.dtype == torch.float64
    assert bool((found.coefficients.abs() <= LARGEST_COEFFICIENT + ROUNDING).all())
    torch.testing.assert_close(
        found.coefficients @ basis[found.rows], basis[found.others], rtol=0, atol=FLOAT64 * float(basis.abs().max())
    )


@given(seed=seeds, rank=st.integers(1, 4), num_others=st.integers(1, 4))
def test_no_exchange_of_two_rows_spans_a_larger_volume_by_more_than_the_tolerance(seed, rank, num_others):
    basis = random_orthonormal(seed, rank + num_others, rank)
    found = interpolate_rows(basis)
    volume = torch.linalg.det(basis[found.rows]).abs()
    for position, other in itertools.product(range(rank), found.others):
        exchanged = found.rows.clone()
        exchanged[position] = other
        assert torch.linalg.det(basis[exchanged]).abs() <= (LARGEST_COEFFICIENT + ROUNDING) * volume


def test_volume_is_close_to_the_largest_of_all_choices():
    basis = random_orthonormal(0, 9, 4)
    volumes = [torch.linalg.det(basis[list(rows)]).abs() for rows in itertools.combinations(range(9), 4)]
    chosen = torch.linalg.det(basis[interpolate_rows(basis).rows]).abs()
    assert chosen >= 0.5 * max(volumes)


def test_exchanges_bring_a_large_basis_below_the_tolerance():
    basis = random_orthonormal(1, 400, 150)
    pivots = torch.linalg.lu(basis)[0].mT @ basis
    without = torch.linalg.solve(pivots[:150], pivots[150:], left=False)
    assert without.abs().max() > 1.2 * LARGEST_COEFFICIENT
    assert interpolate_rows(basis).coefficients.abs().max() <= LARGEST_COEFFICIENT + ROUNDING


@given(seed=seeds, dim=dims)
def test_a_square_basis_has_no_others(seed, dim):
    found = interpolate_rows(random_orthonormal(seed, dim, dim))
    assert sorted(found.rows.tolist()) == list(range(dim))
    assert found.coefficients.shape == (0, dim)


def test_one_column_is_spanned_by_its_largest_entry():
    column = torch.tensor([[1.0], [-4.0], [0.0], [2.0]])
    found = interpolate_rows(column)
    assert found.rows.tolist() == [1]
    assert found.coefficients.flatten().tolist() == [-0.25, 0.0, -0.5]


# -- rows in pairs ----------------------------------------------------------------------------------------


def largest_coefficients_of_pairs(basis):
    """Return that of each choice of pairs that no exchange of two of them makes much larger, by trying them all."""
    dim, rank = basis.shape
    volumes = {
        chosen: float(torch.linalg.det(basis.view(dim // 2, 2, rank)[list(chosen)].flatten(0, 1)).abs())
        for chosen in itertools.combinations(range(dim // 2), rank // 2)
    }
    for chosen, volume in volumes.items():
        near = (other for other in volumes if len(set(other) & set(chosen)) >= len(chosen) - 1)
        if all(volumes[other] <= (LARGEST_COEFFICIENT + ROUNDING) * volume for other in near):
            rows = basis.view(dim // 2, 2, rank)[list(chosen)].flatten(0, 1)
            yield float(torch.linalg.solve(rows, basis, left=False).abs().max())


@given(seed=seeds, rank=st.integers(1, 5), num_others=st.integers(1, 5))
@example(seed=7325, rank=1, num_others=1)  # either pair needs coefficients that are too large
def test_no_exchange_of_two_pairs_spans_a_larger_volume_by_more_than_the_tolerance(seed, rank, num_others):
    basis = random_orthonormal(seed, 2 * (rank + num_others), 2 * rank)
    found = interpolate_rows(basis, pairs=True)
    pairs = pairs_of(found.order)
    if pairs is None:
        assert max(largest_coefficients_of_pairs(basis)) > LARGEST_OF_PAIRS
        assert torch.equal(found.order, interpolate_rows(basis).order)
        return
    assert sorted(pairs.tolist()) == list(range(rank + num_others))
    assert found.others.tolist() == sorted(found.others.tolist())
    torch.testing.assert_close(found.dense() @ basis[found.rows], basis, rtol=0, atol=FLOAT64)
    volume = torch.linalg.det(basis[found.rows]).abs()
    for position, other in itertools.product(range(rank), pairs[rank:]):
        exchanged = found.rows.clone()
        exchanged[2 * position : 2 * position + 2] = torch.stack([2 * other, 2 * other + 1])
        assert torch.linalg.det(basis[exchanged]).abs() <= (LARGEST_COEFFICIENT + ROUNDING) * volume


@pytest.mark.parametrize(("dim", "rank"), [(576, 312), (576, 128), (192, 152)])
def test_coefficients_of_pairs_stay_small(dim, rank):
    basis = random_orthonormal(0, dim, rank)
    one_by_one, pairs = (interpolate_rows(basis, pairs=choice).coefficients for choice in (False, True))
    assert pairs.abs().max() < 4
    assert pairs.norm() < 2 * one_by_one.norm()


@pytest.mark.parametrize(("dim", "rank"), [(9, 4), (8, 3)])
def test_rows_of_which_there_are_no_pairs_are_chosen_one_by_one(dim, rank):
    basis = random_orthonormal(0, dim, rank)
    assert torch.equal(interpolate_rows(basis, pairs=True).order, interpolate_rows(basis).order)


@pytest.mark.parametrize("difference", [0.0, 1e-9])
def test_pairs_of_nearly_equal_rows_are_not_chosen(difference):
    rows = random_orthonormal(0, 4, 4)
    basis = torch.stack([rows, rows + difference * randn(1, 4, 4)], dim=1).flatten(0, 1)  # two of each
    found = interpolate_rows(basis, pairs=True)
    assert pairs_of(found.order) is None
    assert found.coefficients.abs().max() <= LARGEST_COEFFICIENT + ROUNDING


@pytest.mark.parametrize(
    ("index", "pairs"),
    [([4, 5, 0, 1, 2, 3], [2, 0, 1]), ([5, 4, 0, 1], None), ([1, 2, 3, 4], None), ([0, 1, 2], None), ([0, 2], None)],
)
def test_an_index_is_counted_in_pairs_if_none_is_torn_apart(index, pairs):
    found = pairs_of(torch.tensor(index, dtype=torch.int32))
    assert (found if found is None else found.tolist()) == pairs


# -- what is refused --------------------------------------------------------------------------------------


def test_a_wide_basis_is_refused():
    with pytest.raises(ValueError, match="at least as many rows as columns"):
        interpolate_rows(torch.ones(2, 3))


@pytest.mark.parametrize(
    "basis",
    [
        torch.zeros(4, 2),
        torch.ones(4, 2),
        torch.eye(5, 3) @ torch.diag(torch.tensor([1.0, 1.0, 0.0])),
        torch.full((4, 2), torch.nan),
    ],
    ids=["zero", "equal columns", "zero column", "nan"],
)
def test_a_basis_without_full_column_rank_is_refused(basis):
    with pytest.raises(ValueError, match="full column rank"):
        interpolate_rows(basis)
