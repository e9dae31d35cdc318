"""Interpolative decompositions, against the rows that they stand for."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_jactus.numerics.interpolation import interpolate_rows
from tests.support.strategies import dims, randn, random_orthonormal, seeds

LARGEST_COEFFICIENT = 1.05
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
