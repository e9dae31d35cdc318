"""The dense layer that an adapted one wraps, or what stands in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_jactus._placeholders import WeightPlaceholder
from peft_jactus.errors import BaseWeightsFreedError

if TYPE_CHECKING:
    from torch import Tensor


class FreedBase(nn.Module):
    """Stands where a dense layer was: remembers its features, device and dtype, holds no weight."""

    def __init__(self, base_layer: nn.Linear | Conv1D, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.is_conv1d = isinstance(base_layer, Conv1D)
        self.has_bias = base_layer.bias is not None
        # PEFT and some models (T5) read `.weight.dtype` and `.weight.device`; `.to()` must move it.
        self.register_buffer("weight", base_layer.weight.detach().new_empty(0), persistent=False)
        self.bias = None

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `ValueError`: there is no dense layer any more."""
        del args, kwargs
        raise BaseWeightsFreedError("run the base layer")

    def extra_repr(self) -> str:
        """Show the features."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def unreadable_weight(name: str, weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return what stands for the weight of a compressed layer, of the dtype and device of ``weight``."""
    return WeightPlaceholder.of(
        weight,
        shape,
        f"{name}: the model uses its weight without calling the layer. What the adapter learned is not in it, and "
        "what is written into it is lost. Add the name to `exclude_modules`, and compress the dense model again.",
    )


def make_dense_layer(weight: Tensor, bias: Tensor | None, *, is_conv1d: bool) -> nn.Linear | Conv1D:
    """Return a plain, frozen layer with a weight ``(out, in)``, which a Conv1D stores as ``(in, out)``."""
    out_features, in_features = weight.shape
    layer: nn.Linear | Conv1D
    with torch.device("meta"):
        if is_conv1d:
            layer = Conv1D(out_features, in_features)  # type: ignore[no-untyped-call]  # transformers: untyped
        else:
            layer = nn.Linear(in_features, out_features, bias=bias is not None)
    assign_parameters_(layer, weight.mT if is_conv1d else weight, bias)
    return layer


def assign_parameters_(layer: nn.Linear | Conv1D, weight: Tensor, bias: Tensor | None) -> None:
    """Give ``layer`` new frozen parameters; ``weight`` as the layer stores it."""
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
