"""The linear layers that a deployed layer is made of, as they were made or as other tools have changed them.

Quantisers, LoRA and parametrisations put modules of their own in a part's place. Their ``weight`` may be integers, or
a method, so nothing here takes it for a matrix of numbers without looking.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_jactus.deployment.quantized_linear import QuantizedLinear
from peft_jactus.tuner.base_weights import quantization_of_tensor


def linear_part(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """Return a linear layer with copies of these values."""
    out_features, in_features = weight.shape
    part = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    part.weight = nn.Parameter(weight.to(device=device, dtype=dtype).contiguous())
    if bias is not None:
        part.bias = nn.Parameter(bias.detach().to(device=device, dtype=dtype, copy=True))
    return part


def unreadable_parts(layer: nn.Module) -> list[str]:
    """Return the parts of a deployed layer whose weight is not a matrix of numbers, each with what it is."""
    return [f"{name} ({type(part).__name__})" for name, part in layer.named_children() if not _is_readable(part)]


def wide_weight(part: nn.Module) -> Tensor:
    """Return the weight of a part, in float32 at least.

    Raises:
        ValueError: If another tool has replaced the part, and there is no such weight.
    """
    if not _is_readable(part):
        raise ValueError(
            f"a part of a compressed layer has become a {type(part).__name__}, whose weight cannot be read. Undo "
            "that first, or load the model anew."
        )
    weight = part.dense_weight() if isinstance(part, QuantizedLinear) else part.weight
    assert isinstance(weight, Tensor)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _is_readable(part: nn.Module) -> bool:
    if isinstance(part, QuantizedLinear):
        return True
    weight = getattr(part, "weight", None)
    if not isinstance(part, nn.Linear) or not isinstance(weight, Tensor):
        return False
    return quantization_of_tensor(weight) is None
