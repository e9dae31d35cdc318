"""Interpolative decomposition: a matrix from some of its rows (Cheng et al., SIAM J. Sci. Comput. 26, 2005).

A subspace of dimension r has a basis that is the identity in r of its rows. A product with it costs ``r (dim - r)``
multiplications instead of ``r dim``, and keeping it as many numbers; with such bases on both sides, a weight ``left
core right^T`` of rank r takes ``r (out + in - r)`` of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peft_jactus.numerics.linalg import to_decomposition_dtype

if TYPE_CHECKING:
    from torch import Tensor

# A row is exchanged as long as that makes the spanned volume this much larger; more exchanges bring little.
_MAXVOL_TOLERANCE = 1.05
# Parts in which the largest coefficient is searched.
_NUM_BLOCKS = 32
# Putting a number in its place takes as long as about so many multiplications in a matrix product.
_GATHER_COST = 100


@dataclass(frozen=True)
class InterpolativeBasis:
    """A basis ``[I; T]`` of a subspace, with its rows in another order: some of them are those of the identity.

    For a matrix ``A`` whose columns it spans, the rows of the identity are rows that span all others:
    ``A[others] = T A[rows]``.

    Attributes:
        order: ``(dim,)``, an integer type: where the ``rank`` rows of the identity belong, then where the others do;
            ascending if there are no others.
        coefficients: ``T`` ``(dim - rank, rank)``, absolute values up to 1.05.
    """

    order: Tensor
    coefficients: Tensor

    @property
    def rows(self) -> Tensor:
        """Which rows are those of the identity ``(rank,)``."""
        return self.order[: self.rank]

    @property
    def others(self) -> Tensor:
        """Which rows are combinations of those ``(dim - rank,)``."""
        return self.order[self.rank :]

    @property
    def dim(self) -> int:
        """Number of rows."""
        return self.order.shape[0]

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.coefficients.shape[1]

    def dense(self) -> Tensor:
        """Return the basis as a matrix ``(dim, rank)``."""
        identity = torch.eye(self.rank, dtype=self.coefficients.dtype, device=self.coefficients.device)
        return torch.cat([identity, self.coefficients])[self.order.argsort()]

    def column_norms(self) -> Tensor:
        """Return the lengths of the columns ``(rank,)``, at least 1; in float32 at least."""
        dtype = torch.promote_types(self.coefficients.dtype, torch.float32)
        squares = self.coefficients.to(dtype).square()
        # On CPUs a sum over rows takes several times as long as this product.
        sums: Tensor = (squares.new_ones(1, squares.shape[0]) @ squares).squeeze(0)
        return (1 + sums).sqrt()

    def project(self, x: Tensor) -> Tensor:
        """Multiply rows ``(rows, dim)`` with the basis: ``x @ basis``, ``(rows, rank)``."""
        if self.rank == self.dim:
            return x
        if self._gathering_costs_more():
            return x @ self.dense()
        ordered = take_columns(x, self.order)
        return torch.addmm(ordered[:, : self.rank], ordered[:, self.rank :], self.coefficients)

    def expand(self, z: Tensor) -> Tensor:
        """Multiply rows ``(rows, rank)`` with the transposed basis: ``z @ basis^T``, ``(rows, dim)``."""
        if self.rank == self.dim:
            return z
        if self._gathering_costs_more():
            return z @ self.dense().mT
        return take_columns(torch.cat([z, z @ self.coefficients.mT], dim=1), self.order.argsort())

    def _gathering_costs_more(self) -> bool:
        return self.rank * self.rank < _GATHER_COST * self.dim


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """Return columns ``x[:, index]`` of ``(rows, dim)``.

    On CPUs torch takes numbers of 16 bits one by one, in three to six times as long as those of float32.
    """
    if torch.onnx.is_in_onnx_export():
        return x.index_select(1, index.long())  # onnxruntime takes no others there
    is_slow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] > 1
    if is_slow and not torch.compiler.is_compiling():
        return x.float().index_select(1, index).to(x.dtype)
    return x.index_select(1, index)


def interpolate_rows(basis: Tensor) -> InterpolativeBasis:
    """Choose rows of a tall matrix that span all rows well: ``basis = found.dense() @ basis[found.rows]``.

    LU with partial pivoting chooses rows, then rows are exchanged while that makes the determinant of the chosen ones
    at least 1.05 times as large (maxvol), which bounds the coefficients by 1.05.

    Args:
        basis: ``(dim, rank)``, ``rank <= dim``, full column rank; best conditioned with orthonormal columns.

    Returns:
        The choice, on the device of ``basis``, with ascending `others`.

    Raises:
        ValueError: If ``basis`` has more columns than rows, or does not have full column rank.

    References:
        Goreinov et al., "How to find a good submatrix", 2010.
    """
    basis = to_decomposition_dtype(basis)
    dim, rank = basis.shape
    if rank > dim:
        raise ValueError(f"`basis` must have at least as many rows as columns; got {tuple(basis.shape)=}.")
    factors, pivots, _ = torch.linalg.lu_factor_ex(basis)  # a zero pivot is seen below
    diagonal = factors.diagonal().abs()
    if not bool(diagonal.min() > torch.finfo(torch.float64).eps * dim * diagonal.max()):
        raise ValueError(f"`basis` must have full column rank; got a singular one with {tuple(basis.shape)=}.")
    order = _permutation(pivots, dim)
    lower = factors.tril(-1)
    lower.diagonal().fill_(1.0)
    coefficients = torch.linalg.solve_triangular(  # (dim - rank, rank)
        lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
    )
    _exchange_rows_(order, coefficients, rank)
    rows, others = order[:rank], order[rank:].sort().values
    # Once more from the matrix itself: exchanges accumulate rounding.
    coefficients = torch.linalg.solve(basis[rows], basis[others], left=False)
    return InterpolativeBasis(torch.cat([rows, others]), coefficients)


def interpolative_basis(basis: Tensor) -> tuple[InterpolativeBasis, Tensor]:
    """Change to another basis of the same subspace.

    Args:
        basis: ``(dim, rank)``, ``rank <= dim``, full column rank; best conditioned with orthonormal columns.

    Returns:
        ``found`` and ``transform`` ``(rank, rank)`` in float64, with ``basis = found.dense() @ transform``. Where the
        rank is the dimension, ``found`` is the identity. A basis without full column rank is a `ValueError`.
    """
    basis = to_decomposition_dtype(basis)
    dim, rank = basis.shape
    if rank == dim:
        return InterpolativeBasis(torch.arange(dim, device=basis.device), basis.new_empty(0, rank)), basis
    found = interpolate_rows(basis)
    return found, basis[found.rows]


def _permutation(pivots: Tensor, dim: int) -> Tensor:
    """Return the order of rows that LAPACK's row exchanges lead to."""
    order = list(range(dim))
    for position, pivot in enumerate(pivots.tolist()):  # counted from 1
        order[position], order[pivot - 1] = order[pivot - 1], order[position]
    return torch.tensor(order, device=pivots.device)


def _exchange_rows_(order: Tensor, coefficients: Tensor, rank: int) -> None:
    """Exchange chosen rows for others in place, while a coefficient is larger than the tolerance."""
    for _ in range(2 * rank if coefficients.numel() else 0):  # a bound; a few dozen are usual
        other, chosen = _largest_entry(coefficients)
        pivot = coefficients[other, chosen].clone()
        if abs(float(pivot)) <= _MAXVOL_TOLERANCE:
            return
        order[chosen], order[rank + other] = order[rank + other].clone(), order[chosen].clone()
        column = coefficients[:, chosen].clone()
        row = coefficients[other].clone()
        row[chosen] -= 1
        column[other] += 1  # the row that leaves becomes an "other": e_chosen in the old rows
        coefficients.addr_(column, row, alpha=-1 / float(pivot))


def _largest_entry(matrix: Tensor) -> tuple[int, int]:
    """Return row and column of the largest absolute value."""
    # On CPUs aminmax takes a tenth of the time of argmax: first the block of rows, then the place in it.
    blocks = torch.split(matrix, -(-matrix.shape[0] // _NUM_BLOCKS))
    extremes = torch.stack([torch.stack(torch.aminmax(block)) for block in blocks])  # (blocks, 2)
    number = int(extremes.abs().amax(1).argmax())
    row, column = divmod(int(blocks[number].abs().argmax()), matrix.shape[1])
    first_row: int = number * blocks[0].shape[0]
    return first_row + row, column
