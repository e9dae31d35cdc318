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

# Rows are exchanged as long as that makes the spanned volume this much larger; more exchanges bring little.
_MAXVOL_TOLERANCE = 1.05
# Of pairs of rows, whose volume alone is bounded: 3 is usual. With larger ones rows are chosen one by one.
_LARGEST_OF_PAIRS = 16.0
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
        coefficients: ``T`` ``(dim - rank, rank)``, absolute values up to 1.05; up to 16 where rows are pairs.
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

    def to(self, dtype: torch.dtype) -> InterpolativeBasis:
        """Return the basis in another dtype."""
        return InterpolativeBasis(self.order, self.coefficients.to(dtype))

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


def pairs_of(index: Tensor) -> Tensor | None:
    """Return an index counted in pairs, if it has ``2k + 1`` after each ``2k``.

    Args:
        index: ``(columns,)``, an integer type.

    Returns:
        ``(columns / 2,)``, or ``None``.
    """
    if index.shape[0] % 2:
        return None
    first, second = index[::2], index[1::2]
    is_paired = (first % 2 == 0) & (second == first + 1)
    return first // 2 if bool(is_paired.all()) else None


def interpolate_rows(basis: Tensor, *, pairs: bool = False) -> InterpolativeBasis:
    """Choose rows of a tall matrix that span all rows well: ``basis = found.dense() @ basis[found.rows]``.

    LU with partial pivoting chooses rows, then rows are exchanged while that makes the determinant of the chosen ones
    at least 1.05 times as large (maxvol), which bounds the coefficients by 1.05.

    Args:
        basis: ``(dim, rank)``, ``rank <= dim``, full column rank; best conditioned with orthonormal columns.
        pairs: Choose rows ``2k`` and ``2k + 1`` together, if ``dim`` and ``rank`` are even, so that numbers
            of 16 bits can be put in their places two by two. Coefficients are then half as large again.

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
    if pairs and dim % 2 == 0 and rank % 2 == 0:
        found = _exchanged(basis, _with_partners(order), group=2)
        if bool((found.coefficients.abs() <= _LARGEST_OF_PAIRS).all()):
            return found
    return _exchanged(basis, order, group=1)


def _with_partners(order: Tensor) -> Tensor:
    """Put rows ``2k`` and ``2k + 1`` beside each other, where the first of them stood."""
    firsts = torch.tensor(list(dict.fromkeys((order // 2).tolist())), device=order.device)
    return torch.stack([2 * firsts, 2 * firsts + 1], dim=1).flatten()


def _exchanged(basis: Tensor, order: Tensor, group: int) -> InterpolativeBasis:
    """Exchange ``group`` of the first ``rank`` rows for others while that spans a larger volume."""
    rank = basis.shape[1]
    order = order.clone()
    coefficients = torch.linalg.solve_ex(basis[order[:rank]], basis[order[rank:]], left=False).result
    _exchange_rows_(order, coefficients, group)
    rows, others = order[:rank], order[rank:].sort().values
    # Once more from the matrix itself: exchanges accumulate rounding.
    coefficients = torch.linalg.solve_ex(basis[rows], basis[others], left=False).result
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


def _exchange_rows_(order: Tensor, coefficients: Tensor, group: int) -> None:
    """Exchange ``group`` chosen rows for others in place, while that volume is larger than the tolerance."""
    rank = coefficients.shape[1]
    identity = torch.eye(group, dtype=coefficients.dtype, device=coefficients.device)
    for _ in range(2 * rank if coefficients.numel() else 0):  # a bound; a few dozen are usual
        volumes = _volumes(coefficients, group)
        other, chosen = _largest_entry(volumes)
        if not abs(float(volumes[other, chosen])) > _MAXVOL_TOLERANCE:
            return
        leave, enter = slice(group * chosen, group * (chosen + 1)), slice(group * other, group * (other + 1))
        order[:rank][leave], order[rank:][enter] = order[rank:][enter].clone(), order[:rank][leave].clone()
        columns, rows = coefficients[:, leave].clone(), coefficients[enter].clone()
        exchanged = rows[:, leave].clone()
        rows[:, leave] -= identity
        columns[enter] += identity  # rows that leave become others: those of the identity, in the old rows
        coefficients.addmm_(columns, torch.linalg.solve(exchanged, rows), alpha=-1)


def _volumes(coefficients: Tensor, group: int) -> Tensor:
    """Return by how much an exchange multiplies the volume: the determinant of each block ``(group, group)``."""
    if group == 1:
        return coefficients
    upper, lower = coefficients[::2], coefficients[1::2]
    return upper[:, ::2] * lower[:, 1::2] - upper[:, 1::2] * lower[:, ::2]


def _largest_entry(matrix: Tensor) -> tuple[int, int]:
    """Return row and column of the largest absolute value."""
    # On CPUs aminmax takes a tenth of the time of argmax: first the block of rows, then the place in it.
    blocks = torch.split(matrix, -(-matrix.shape[0] // _NUM_BLOCKS))
    extremes = torch.stack([torch.stack(torch.aminmax(block)) for block in blocks])  # (blocks, 2)
    number = int(extremes.abs().amax(1).argmax())
    row, column = divmod(int(blocks[number].abs().argmax()), matrix.shape[1])
    first_row: int = number * blocks[0].shape[0]
    return first_row + row, column
