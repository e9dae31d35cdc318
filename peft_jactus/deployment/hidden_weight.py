"""Linear layers whose weight is held in another form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from peft_jactus._placeholders import WeightPlaceholder

if TYPE_CHECKING:
    from torch import Tensor


class HiddenWeight(nn.Module):
    """A linear layer without a dense weight.

    Attributes:
        weight: One number, not used. A loader that does not know this package stops at its shape, instead of filling
            a dense layer with random numbers. A model may read its ``dtype``, ``device`` and ``shape``, that of the
            dense weight, as some do; its numbers raise `RuntimeError`.
    """

    weight: Tensor
    in_features: int
    out_features: int
    # What is said where its numbers are read or changed.
    weight_is_hidden = (
        "has no dense weight, but the model uses one without calling the layer. Compress the dense model again, with "
        "the layer in `exclude_modules`."
    )

    def __getattr__(self, name: str) -> Any:
        """Return a placeholder for the weight."""
        value = super().__getattr__(name)
        if name != "weight" or not isinstance(value, torch.Tensor):
            return value
        # What has no values yet shows the shape that a file is compared with.
        shape = value.shape if value.is_meta else (self.out_features, self.in_features)
        return WeightPlaceholder.of(value, shape, f"{self._kind()} {self.weight_is_hidden}", buffer=True)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but no dense weight, which would not be used. One number is what loaders set."""
        if name == "weight" and isinstance(value, torch.Tensor) and value.numel() != 1:
            self._refuse_weight()
        super().__setattr__(name, value)

    def _refuse_weight(self) -> NoReturn:
        """Raise `RuntimeError`, which names the layer."""
        raise RuntimeError(f"{self._kind()} {self.weight_is_hidden}")

    def _check_weight(self) -> None:
        """Raise `RuntimeError` if a dense weight was put in place, as `torch.func.functional_call` does."""
        weight = self._buffers.get("weight")
        if weight is not None and weight.numel() != 1:
            self._refuse_weight()

    def _kind(self) -> str:
        return f"A {type(self).__name__} ({self.out_features} x {self.in_features})"
