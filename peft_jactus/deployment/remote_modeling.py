"""Low-rank linear layers for a checkpoint that carries its own code, written by peft-jactus.

A copy of this file goes into the checkpoint, with the classes of its model at the end. So it needs torch alone, and
nothing of the package that it comes from. `low_rank_layers` in config.json describes the layers, by their name in the
base model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def _check_whole(linear: nn.Module) -> None:
    if getattr(linear, "tp_size", 1) > 1:  # set by vLLM's linear layers
        raise RuntimeError("Low-rank layers cannot be split between devices; use `tensor_parallel_size=1`.")


def _take_columns(x: Tensor, index: Tensor) -> Tensor:
    # On CPUs torch takes numbers of 16 bits one by one, in three to six times as long as those of float32.
    if x.device.type == "cpu" and x.element_size() == 2 and x.shape[0] > 1 and not torch.compiler.is_compiling():
        return x.float().index_select(1, index).to(x.dtype)
    return x.index_select(1, index)


class LowRankLinear(nn.Module):
    """``y = up(down(x))``; ``weight`` makes loaders that ignore this file stop at its shape."""

    def __init__(self, in_features: int, rank: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        _check_whole(self.down)
        output: Tensor = self.up(self.down(x))
        return output


class RowPivotedLinear(nn.Module):
    """Some outputs from the input, the others from those: ``z = rows(x)``, ``y = [z, others(z)]`` in their order."""

    row_index: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, rank: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.rows = nn.Linear(in_features, rank, bias=False)
        self.others = nn.Linear(rank, out_features - rank, bias=False)
        self.register_buffer("row_index", torch.arange(out_features, dtype=torch.int32))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        _check_whole(self.rows)
        chosen = self.rows(x.reshape(-1, x.shape[-1]))
        output = _take_columns(torch.cat([chosen, self.others(chosen)], dim=1), self.row_index)
        output = output if self.bias is None else output + self.bias
        return output.view(*x.shape[:-1], -1)


class ColumnPivotedLinear(nn.Module):
    """Inputs that count for others are added to these first: ``y = columns(x[chosen] + others(x[rest]))``."""

    column_index: Tensor

    def __init__(self, in_features: int, rank: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.rank = rank
        self.others = nn.Linear(in_features - rank, rank, bias=False)
        self.columns = nn.Linear(rank, out_features, bias=bias)
        self.register_buffer("column_index", torch.arange(in_features, dtype=torch.int32))
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        _check_whole(self.columns)
        ordered = _take_columns(x.reshape(-1, x.shape[-1]), self.column_index)
        combined = self.others(ordered[:, self.rank :]) + ordered[:, : self.rank]
        output: Tensor = self.columns(combined)
        return output.view(*x.shape[:-1], -1)


_FORMS: dict[str, type[nn.Module]] = {
    form.__name__: form for form in (LowRankLinear, RowPivotedLinear, ColumnPivotedLinear)
}


@cache
def _own_class(parent_class: type[nn.Module], low_rank_children: tuple[str, ...]) -> type[nn.Module]:
    del low_rank_children  # one class for each set of them
    return type(parent_class.__name__, (parent_class,), {"__module__": parent_class.__module__})


def put_low_rank_layers(base_model: nn.Module, layers: dict[str, dict[str, Any]]) -> None:
    """Replace linear layers of ``base_model``, in place, by low-rank ones as ``config.low_rank_layers`` has them."""
    children: dict[str, list[str]] = {}
    for name, layer in layers.items():
        options = dict(layer)
        low_rank = _FORMS[options.pop("form")](**options)
        for part in low_rank.modules():
            # `_init_weights` of the model's class would take it for what it knows.
            part._is_hf_initialized = True  # type: ignore[assignment]  # nn.Module declares tensors and modules only
        base_model.set_submodule(name, low_rank)
        parent_name, _, child_name = name.rpartition(".")
        children.setdefault(parent_name, []).append(child_name)
    children.pop("", None)
    # vLLM decides once for a class whether it merges projections (q, k, v; gate, up), and would also merge those that
    # are low-rank here if they are dense in another block.
    for parent_name, child_names in children.items():
        parent = base_model.get_submodule(parent_name)
        own_class = _own_class(type(parent), tuple(sorted(child_names)))  # type: ignore[arg-type]  # mypy: no hash
        parent.__class__ = own_class
