"""The deployed layers: plain modules that hold a low-rank weight in one of two forms, and how to get there.

*Factored*: ``W = up @ down``, ``rank * (out + in)`` numbers. *Pivoted*: a matrix of rank r has r rows that span all
of them, so ``W[rows] = Z`` and ``W[others] = T Z``, ``rank * (out + in - rank)`` numbers for the same function; or the
same with columns (an interpolative decomposition: Cheng et al., SIAM J. Sci. Comput. 26, 2005).

Their parts are `torch.nn.Linear` modules, so that what works on a linear layer works on them: LoRA, quantisation,
tensor parallelism.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual

from peft_jactus.deployment.hidden_weight import HiddenWeight
from peft_jactus.deployment.parts import linear_part, wide_weight
from peft_jactus.numerics.interpolation import interpolate_rows, pairs_of, take_columns
from peft_jactus.numerics.linalg import balanced_factors, to_decomposition_dtype

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    _Device = torch.device | str | None

_FLOAT16_TRAINS = (
    "A compressed layer in float16 is in training mode, and its weights train. Adam's epsilon is zero in float16, so "
    "weights become NaN, as in a dense model. Load the model with dtype=torch.float32 and train with `fp16=True`, or "
    "with dtype=torch.bfloat16."
)


class FactorizedLinear(HiddenWeight, ABC):
    """A linear layer whose weight has low rank; ``forward`` maps ``(..., in)`` to ``(..., out)``.

    Attributes:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        rank: Its rank, in [1, min(out, in)).
        weight: See `HiddenWeight`.
    """

    storage: str
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        _check_rank(rank, in_features, out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FactorizedLinear:
        """Return a layer whose values mean nothing, for a checkpoint to fill."""
        _check_rank(rank, in_features, out_features)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        return cls._empty(in_features, out_features, rank, bias, device, dtype)

    @classmethod
    @abstractmethod
    def _empty(
        cls, in_features: int, out_features: int, rank: int, bias: bool, device: _Device, dtype: torch.dtype
    ) -> FactorizedLinear: ...

    @classmethod
    @abstractmethod
    def from_factors(
        cls, left: Tensor, core: Tensor, right: Tensor, bias: Tensor | None, *, dtype: torch.dtype, pairs: bool = True
    ) -> FactorizedLinear:
        """Return the layer for ``left @ core @ right.T``.

        Args:
            left: ``(out, rank)``, full column rank.
            core: ``(rank, rank)``.
            right: ``(in, rank)``, full column rank.
            bias: ``(out,)`` or ``None``.
            dtype: Of the model that the layer belongs to.
            pairs: Choose rows two by two; see `interpolate_rows`. Not used where no rows are chosen.
        """

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """Return the weight ``(out, in)``, in float32 at least."""

    # What flattens parameters or writes files wants them contiguous; these come before.

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training takes back what `arrange_parts_` did."""
        if mode:
            self._lay_out_by_rows_()
            if any(part.dtype == torch.float16 and part.requires_grad for part in self.parameters()):
                warnings.warn(_FLOAT16_TRAINS, stacklevel=2)
        return super().train(mode)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._lay_out_by_rows_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _lay_out_by_rows_(self) -> None:
        for part in self.modules():  # also in what adapters have wrapped
            if isinstance(part, nn.Linear) and type(part.weight) is nn.Parameter and not part.weight.is_contiguous():
                with torch.inference_mode(False), torch.no_grad():
                    part.weight.data = part.weight.data.contiguous()

    def extra_repr(self) -> str:
        """Show features and rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(FactorizedLinear):
    """Two thin layers, one after the other: ``y = up(down(x))``; the bias is that of ``up``.

    Args:
        down: ``in`` to ``rank`` features, no bias.
        up: ``rank`` to ``out`` features.
    """

    storage = "factored"

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__(down.in_features, up.out_features, down.out_features)
        self.down = down
        self.up = up
        self.register_buffer("weight", _one_number(up))

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]  # read-only here
        """The bias ``(out,)``, or ``None``."""
        return self.up.bias

    @classmethod
    def _empty(
        cls, in_features: int, out_features: int, rank: int, bias: bool, device: _Device, dtype: torch.dtype
    ) -> LowRankLinear:
        return cls(
            nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype),
        )

    @classmethod
    def from_factors(
        cls, left: Tensor, core: Tensor, right: Tensor, bias: Tensor | None, *, dtype: torch.dtype, pairs: bool = True
    ) -> LowRankLinear:
        """Return the layer for ``left @ core @ right.T``; see the base class."""
        up, down = balanced_factors(left, core, right)
        return cls.from_product(up, down, bias, dtype=dtype, device=left.device)

    @classmethod
    def from_product(
        cls, up: Tensor, down: Tensor, bias: Tensor | None, *, dtype: torch.dtype, device: torch.device
    ) -> LowRankLinear:
        """Return the layer for ``up @ down``, ``(out, rank)`` and ``(rank, in)``, with copies of the values."""
        return cls(linear_part(down, None, dtype, device), linear_part(up, bias, dtype, device))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        self._check_weight()
        output: Tensor = self.up(self.down(x))
        return output

    def dense_weight(self) -> Tensor:
        """Return the weight ``(out, in)``, in float32 at least."""
        return wide_weight(self.up) @ wide_weight(self.down)


class PivotedLinear(FactorizedLinear):
    """A weight of rank r, stored as r of its rows or columns, and coefficients that give the other ones.

    `RowPivotedLinear` if there are fewer rows, `ColumnPivotedLinear` otherwise: each call reorders this side, so the
    shorter one costs less.

    The coefficients combine rows that are nearly dependent, which magnifies rounding errors two- to sixfold. In
    bfloat16, this is still far less than the gain from the higher rank (``benchmarks.compression.sixteen_bits``).
    """

    storage = "pivoted"
    _pairs: tuple[Tensor, int, tuple[Tensor, ...] | None] | None = None  # of an index at a version

    def _in_order(self, x: Tensor, index: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return columns ``x[:, index]`` of ``(rows, dim)`` in parts of these sizes.

        Numbers of 16 bits are taken two by two, in a third of the time, where `interpolate_rows` chose pairs.
        """
        is_traced = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
        # No derivative passes through a view as another dtype, neither backward nor forward.
        tangent = unpack_dual(x).tangent  # type: ignore[no-untyped-call]
        is_constant = not x.requires_grad and tangent is None
        if not is_traced and is_constant and x.element_size() == 2 and not x.is_meta:
            pairs = self._pairs_of(index, sizes)
            if pairs is not None and x.is_contiguous() and x.storage_offset() % 2 == 0:
                wide = x.view(torch.float32)
                return tuple(wide.index_select(1, part).view(x.dtype) for part in pairs)
        ordered = take_columns(x, index)
        return (ordered,) if len(sizes) == 1 else torch.split(ordered, list(sizes), dim=1)

    def _pairs_of(self, index: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        version = 0 if index.is_inference() else index._version
        if self._pairs is None or self._pairs[0] is not index or self._pairs[1] != version:
            pairs = None if any(size % 2 for size in sizes) else pairs_of(index)
            parts = None if pairs is None else torch.split(pairs, [size // 2 for size in sizes])
            self._pairs = (index, version, parts)
        return self._pairs[2]

    @classmethod
    def _empty(
        cls, in_features: int, out_features: int, rank: int, bias: bool, device: _Device, dtype: torch.dtype
    ) -> PivotedLinear:
        form = RowPivotedLinear if out_features < in_features else ColumnPivotedLinear
        return form._empty(in_features, out_features, rank, bias, device, dtype)

    @classmethod
    def from_factors(
        cls, left: Tensor, core: Tensor, right: Tensor, bias: Tensor | None, *, dtype: torch.dtype, pairs: bool = True
    ) -> PivotedLinear:
        """Return the layer for ``left @ core @ right.T``; see the base class."""
        form = RowPivotedLinear if left.shape[0] < right.shape[0] else ColumnPivotedLinear
        return form.from_factors(left, core, right, bias, dtype=dtype, pairs=pairs)


class RowPivotedLinear(PivotedLinear):
    """Some outputs from the input, the others from those: ``z = rows(x)``, ``y = [z, others(z)]`` in their order.

    Args:
        rows: ``in`` to ``rank`` features, no bias.
        others: ``rank`` to ``out - rank`` features, no bias.
        row_index: ``(out,)``, int32: where output ``i`` stands in ``[z, others(z)]``.
        bias: ``(out,)`` or ``None``.
    """

    row_index: Tensor

    def __init__(self, rows: nn.Linear, others: nn.Linear, row_index: Tensor, bias: Tensor | None) -> None:
        super().__init__(rows.in_features, rows.out_features + others.out_features, rows.out_features)
        self.rows = rows
        self.others = others
        self.register_buffer("row_index", row_index)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.register_buffer("weight", _one_number(rows))

    @classmethod
    def _empty(
        cls, in_features: int, out_features: int, rank: int, bias: bool, device: _Device, dtype: torch.dtype
    ) -> RowPivotedLinear:
        return cls(
            nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype),
            torch.zeros(out_features, device=device, dtype=torch.int32),
            torch.zeros(out_features, device=device, dtype=dtype) if bias else None,
        )

    @classmethod
    def from_factors(
        cls, left: Tensor, core: Tensor, right: Tensor, bias: Tensor | None, *, dtype: torch.dtype, pairs: bool = True
    ) -> RowPivotedLinear:
        """Return the layer for ``left @ core @ right.T``; see the base class."""
        basis = interpolate_rows(left, pairs=pairs)
        wide_left, wide_core, wide_right = (to_decomposition_dtype(tensor) for tensor in (left, core, right))
        rows = (wide_left[basis.rows] @ wide_core) @ wide_right.mT  # (rank, in)
        return cls(
            linear_part(rows, None, dtype, left.device),
            linear_part(basis.coefficients, None, dtype, left.device),
            basis.order.argsort().to(left.device, torch.int32),
            None if bias is None else bias.detach().to(dtype, copy=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        self._check_weight()
        chosen = self.rows(x.reshape(-1, self.in_features))  # (rows, rank)
        outputs = torch.cat([chosen, self.others(chosen)], dim=1)
        (output,) = self._in_order(outputs, self.row_index, (self.out_features,))
        if self.bias is not None:
            output = output.add_(self.bias)  # in place: one large allocation less
        return output.view(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> Tensor:
        """Return the weight ``(out, in)``, in float32 at least."""
        rows = wide_weight(self.rows)
        weight: Tensor = torch.cat([rows, wide_weight(self.others) @ rows])[self.row_index]
        return weight


class ColumnPivotedLinear(PivotedLinear):
    """Inputs that count for others are added to these first: ``y = columns(x[chosen] + others(x[rest]))``.

    Args:
        others: ``in - rank`` to ``rank`` features, no bias.
        columns: ``rank`` to ``out`` features; its bias is the layer's.
        column_index: ``(in,)``, int32: the chosen inputs, then the rest.
    """

    column_index: Tensor

    def __init__(self, others: nn.Linear, columns: nn.Linear, column_index: Tensor) -> None:
        super().__init__(others.in_features + others.out_features, columns.out_features, columns.in_features)
        self.others = others
        self.columns = columns
        self.register_buffer("column_index", column_index)
        self.register_buffer("weight", _one_number(columns))

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]  # read-only here
        """The bias ``(out,)``, or ``None``."""
        return self.columns.bias

    @classmethod
    def _empty(
        cls, in_features: int, out_features: int, rank: int, bias: bool, device: _Device, dtype: torch.dtype
    ) -> ColumnPivotedLinear:
        return cls(
            nn.Linear(in_features - rank, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype),
            torch.zeros(in_features, device=device, dtype=torch.int32),
        )

    @classmethod
    def from_factors(
        cls, left: Tensor, core: Tensor, right: Tensor, bias: Tensor | None, *, dtype: torch.dtype, pairs: bool = True
    ) -> ColumnPivotedLinear:
        """Return the layer for ``left @ core @ right.T``; see the base class."""
        basis = interpolate_rows(right, pairs=pairs)
        wide_left, wide_core, wide_right = (to_decomposition_dtype(tensor) for tensor in (left, core, right))
        columns = wide_left @ (wide_core @ wide_right[basis.rows].mT)  # (out, rank)
        return cls(
            linear_part(basis.coefficients.mT, None, dtype, left.device),
            linear_part(columns, bias, dtype, left.device),
            basis.order.to(left.device, torch.int32),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        self._check_weight()
        sizes = (self.rank, self.in_features - self.rank)
        chosen, rest = self._in_order(x.reshape(-1, self.in_features), self.column_index, sizes)
        output: Tensor = self.columns(self.others(rest).add_(chosen))
        return output.view(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> Tensor:
        """Return the weight ``(out, in)``, in float32 at least."""
        columns = wide_weight(self.columns)
        weight = torch.cat([columns, columns @ wide_weight(self.others)], dim=1)
        order: Tensor = self.column_index.argsort()
        return weight[:, order]


def _one_number(part: nn.Linear) -> Tensor:
    """Return what stands in a file for the weight of the layer that a part belongs to."""
    return torch.zeros(1, dtype=part.weight.dtype, device=part.weight.device)


def _check_rank(rank: int, in_features: int, out_features: int) -> None:
    if not 1 <= rank < min(in_features, out_features):
        raise ValueError(
            f"`rank` must be at least 1 and less than both features; got {rank} for {out_features} x {in_features}."
        )


FORMS: dict[str, type[FactorizedLinear]] = {form.storage: form for form in (LowRankLinear, PivotedLinear)}


@torch.no_grad()
def arrange_parts_(layer: FactorizedLinear) -> None:
    """Lay out the float32 weights of parts with more rows than columns column by column, in CPU memory.

    The product with one vector then reads them in long runs: 4096 x 1640 takes 0.73 of the time on one thread, and
    1.07 of it with 32 vectors. In bfloat16 it would take 20 times as long. A GPU's libraries do not care, and files
    know one layout only.

    It lasts until the layer is used otherwise: `train` and `state_dict` lay the parts out by rows again, for other
    tools. The parameters stay the same objects, and ``state_dict`` refers to them.
    """
    for part in layer.children():
        weight = part.weight
        if type(part) is not nn.Linear or part.out_features <= part.in_features:
            continue
        if weight.dtype == torch.float32 and weight.device.type == "cpu":
            weight.data = weight.data.mT.contiguous().mT
