"""The dense layer that an adapted one wraps, or what stands in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_jactus._placeholders import WeightPlaceholder
from peft_jactus.errors import BaseWeightsFreedError
from peft_jactus.tuner.base_weights import float_weight, is_conv1d, quantization_of

if TYPE_CHECKING:
    from torch import Tensor


class FreedBase(nn.Module):
    """Stands where a dense layer was: remembers its features, device and dtype, holds no weight.

    Attributes:
        lost_name: Of the layer, where it stands in the model itself, because an adapter was begun and not finished.
    """

    lost_name: str | None = None

    def __init__(
        self, base_layer: nn.Linear | Conv1D, in_features: int, out_features: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.is_conv1d = is_conv1d(base_layer)
        self.has_bias = base_layer.bias is not None
        # PEFT and some models (T5) read `.weight.dtype` and `.weight.device`; `.to()` must move it.
        weight = torch.empty(0, dtype=dtype, device=base_layer.weight.device)
        self.register_buffer("weight", weight, persistent=False)
        self.bias = None

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `ValueError`, or `RuntimeError` for one that is lost: there is no dense layer any more."""
        del args, kwargs
        if self.lost_name is not None:
            raise RuntimeError(_lost([self.lost_name]))
        raise BaseWeightsFreedError("run the base layer")

    def filled(self, weight: Tensor, bias: Tensor | None) -> nn.Linear | Conv1D:
        """Return a plain layer with a weight as it stores it."""
        return make_dense_layer(weight.mT if self.is_conv1d else weight, bias, is_conv1d=self.is_conv1d)

    def extra_repr(self) -> str:
        """Show the features."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def check_not_lost(model: nn.Module) -> None:
    """Raise `RuntimeError` if dense weights are gone and no adapter is in their place."""
    lost = [name for name, module in model.named_modules() if getattr(module, "lost_name", None) is not None]
    if lost:
        raise RuntimeError(_lost(lost))


def _lost(names: list[str]) -> str:
    return (
        f"{', '.join(names)}: the dense weights are gone, because a call that made or loaded an adapter failed in the "
        "middle. Load the model again."
    )


def unreadable_weight(name: str, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """Return what stands for the weight of a compressed layer."""
    return WeightPlaceholder.of(torch.empty(0, dtype=dtype, device=device), shape, _complaint(name))


def _complaint(name: str) -> str:
    return (
        f"{name}: the model uses its weight without calling the layer. This weight lacks what the adapter learned, "
        "and anything written into it is lost. Add the name to `exclude_modules`, and compress the dense model again."
    )


class AdaptedWeight(ABC):
    """What a model gets that reads or sets the weight of an adapted layer.

    Attributes:
        module_name: Of the layer, for error messages.
    """

    module_name: str

    @property
    def weight(self) -> Tensor:
        """What a model sees that reads the layer's weight: a placeholder, unless the dense one is what counts.

        Its dtype, device and shape can be read, as some models do. Its numbers would be old ones, or none, and what a
        model writes into it, or puts in its place, would be lost: all of these raise `RuntimeError`.
        """
        return self._weight()

    @weight.setter
    def weight(self, value: object) -> None:
        self._refuse_weight()

    @weight.deleter
    def weight(self) -> None:
        self._refuse_weight()

    def _refuse_weight(self) -> NoReturn:
        """Raise `RuntimeError`, which names the layer."""
        raise RuntimeError(_complaint(self.module_name))

    @abstractmethod
    def _weight(self) -> Tensor:
        """Return what stands for the weight."""


def check_merged(weight: Tensor, adapter_name: str, *, safe_merge: bool) -> None:
    """Raise `ValueError` if ``weight`` is not finite and that was asked for, as PEFT says it."""
    if safe_merge and not torch.isfinite(weight).all():
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


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


class SetAside:
    """A dense layer's parameters while others are merged into it: the very same objects, so that ties stay ties."""

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        self._layer, self._weight, self._bias = layer, layer.weight, layer.bias
        self._is_quantized = quantization_of(layer) is not None

    def dense_parameters(self) -> tuple[Tensor, nn.Parameter | None]:
        """Return the weight in floating-point numbers, as a plain layer stores it, and the bias."""
        if not self._is_quantized:
            return self._weight, self._bias
        weight = float_weight(self._layer)
        return weight.mT if is_conv1d(self._layer) else weight, self._bias

    def put_back(self, merged: nn.Module) -> nn.Module:
        """Return the layer as it was, on the device (and, if it is not quantized, in the dtype) of ``merged``."""
        weight = cast("Tensor", merged.weight)
        if self._is_quantized:
            return self._layer.to(weight.device)
        self._weight.data = self._weight.data.to(weight)
        merged.weight = self._weight
        if self._bias is not None:
            self._bias.data = self._bias.data.to(weight)
            merged.bias = self._bias
        return merged

    def shared(self) -> list[object]:
        """Return what copies of the layer have in common with it."""
        return [self._layer] if self._is_quantized else [self._weight, self._bias]


def with_parameters(layer: nn.Linear | Conv1D, weight: Tensor, bias: Tensor | None) -> nn.Linear | Conv1D:
    """Return ``layer`` with new parameters, or in the place of a quantized one a plain layer that has them.

    A weight that was rounded to 8 or 4 bits again would not be the one that was trained.

    Args:
        layer: To change.
        weight: As a plain layer stores it.
        bias: If there is one.
    """
    if quantization_of(layer) is not None:
        return make_dense_layer(weight.mT if is_conv1d(layer) else weight, bias, is_conv1d=is_conv1d(layer))
    # A new parameter: writing into the old one would change a tied embedding.
    assign_parameters_(layer, weight, bias)
    return layer


def assign_parameters_(layer: nn.Linear | Conv1D, weight: Tensor, bias: Tensor | None) -> None:
    """Give ``layer`` new frozen parameters; ``weight`` as the layer stores it."""
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
