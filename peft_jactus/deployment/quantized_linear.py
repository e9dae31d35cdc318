"""Parts of deployed layers, and layers that stay dense, with a weight in 8 or 4 bits a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from peft_jactus.deployment.hidden_weight import HiddenWeight
from peft_jactus.numerics.quantization import code_dtype, code_shape, dequantize, num_groups, quantized_product

if TYPE_CHECKING:
    from torch import Tensor


class QuantizedLinear(HiddenWeight, nn.Linear):
    """A linear layer whose weight does not train, in 8 or 4 bits a number (`numerics.quantization`).

    Attributes:
        bits: Of a number.
        codes: As `quantize` returns them.
        scale: ``(groups,)``, one for 64 numbers, in the dtype of the model.
        weight: See `HiddenWeight`.
    """

    codes: Tensor
    scale: Tensor
    weight: Tensor
    weight_is_hidden = (
        "has its weight in 8 or 4 bits: nothing outside of the layer can read it, and nothing can be merged into it. "
        "Keep the adapter unmerged, or load the model under `loading_options(dense=True)`."
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        shape = (out_features, in_features)
        self.register_buffer("codes", torch.zeros(code_shape(shape, bits), device=device, dtype=code_dtype(bits)))
        self.register_buffer("scale", torch.ones(num_groups(shape), device=device, dtype=dtype))
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, shape: tuple[int, int], bias: Tensor | None) -> QuantizedLinear:
        """Return the layer for what `quantize` returned of a weight of this shape; the bias is copied."""
        out_features, in_features = shape
        bits = 8 if codes.dtype == code_dtype(8) else 4
        layer = cls(in_features, out_features, bits, bias=bias is not None, device="meta", dtype=scales.dtype)
        layer.codes, layer.scale, layer.weight = codes, scales, scales.new_zeros(1)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(codes.device, scales.dtype, copy=True))
        return layer

    def dense_weight(self) -> Tensor:
        """Return the weight ``(out, in)``, in the dtype of the model."""
        return dequantize(self.codes, self.scale, (self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        self._check_weight()
        return quantized_product(input, self.codes, self.scale, (self.out_features, self.in_features), self.bias)

    def extra_repr(self) -> str:
        """Show features and bits."""
        return f"{super().extra_repr()}, bits={self.bits}"
