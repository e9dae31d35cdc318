"""Layers that are loaded in 8 or 4 bits: which these are, and what their weights are, one layer at a time."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

BITSANDBYTES, TORCHAO = "bitsandbytes", "torchao"
READABLE = (BITSANDBYTES, TORCHAO)  # the libraries whose weights can be read back
# What a product may be computed in; not what quantizers store, of which float8 is a floating-point dtype, too.
_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# How far the gradient of a quantized layer may be from that of its weight, which libraries compute exactly or not at
# all: activations in float8 change outputs by 4 %.
_GRADIENT_TOLERANCE = 0.1


def quantization_of_tensor(tensor: Tensor) -> str | None:
    """Return the library that ``tensor`` is quantized by, ``"another"`` if it is not known, ``None`` for numbers."""
    library = type(tensor).__module__.partition(".")[0]
    if library in READABLE:
        return library
    is_plain = tensor.dtype in _COMPUTED and type(tensor).dequantize is Tensor.dequantize
    return None if is_plain else "another"


def quantization_of(layer: nn.Module) -> str | None:
    """Return the library that the weight of ``layer`` is quantized by, as `quantization_of_tensor` does."""
    weight = layer._parameters.get("weight")
    return None if weight is None else quantization_of_tensor(weight)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the model's class has a Conv1D here: quantized by bitsandbytes it becomes a Linear, ``(out, in)``."""
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D


def float_weight(layer: nn.Module) -> Tensor:
    """Return the weight of ``layer`` in floating-point numbers, as the layer stores it, detached.

    That of a quantized layer is computed at each call.
    """
    weight = cast("Tensor", layer.weight).detach()
    library = quantization_of(layer)
    if library == TORCHAO:
        return weight.dequantize()
    is_packed = library == BITSANDBYTES and not getattr(layer.weight, "has_fp16_weights", False)
    if is_packed and not weight.is_meta:
        unpack_(layer)
        # What `detach` returns has not the scales.
        return dequantize_bnb_weight(cast("nn.Parameter", layer.weight), state=getattr(layer, "state", None)).detach()
    return weight


def layer_features(layer: nn.Module) -> tuple[int, int]:
    """Return ``(out, in)`` of a Linear or Conv1D; the weight of a quantized one may have another shape."""
    if quantization_of(layer) is not None:
        return cast("int", layer.out_features), cast("int", layer.in_features)
    shape = cast("Tensor", layer.weight).shape
    return (shape[1], shape[0]) if isinstance(layer, Conv1D) else (shape[0], shape[1])


def dense_dtype(layer: nn.Module, model: nn.Module | None = None) -> torch.dtype:
    """Return the dtype that ``layer`` has, or will have once it is dense.

    bitsandbytes does not say what a weight in 8 bits was: its layer gets the dtype of its bias, or else of ``model``.
    """
    weight = cast("Tensor", layer.weight)
    if quantization_of(layer) != BITSANDBYTES:
        return weight.dtype
    candidates = [] if model is None else model.named_parameters()
    of_model = (
        parameter.dtype
        for name, parameter in candidates
        if quantization_of_tensor(parameter) is None and "jactus_" not in name
    )
    bias = getattr(layer, "bias", None)
    of_weight = getattr(getattr(weight, "quant_state", None), "dtype", torch.float32)
    return cast("torch.dtype", next(of_model, of_weight) if bias is None else bias.dtype)


def unpack_(layer: nn.Module) -> None:
    """Undo the layout that bitsandbytes gives a weight in 4 bits when it first runs, for inference, on some CPUs.

    In it a layer has no gradient, and the weight cannot be dequantized: it would come out shuffled.
    """
    state: Any = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # does so, in place
    # bitsandbytes 0.50 forgets the scales, whoever calls that: they stay as `(blocks of a row, rows)`, in bfloat16.
    if state is not None and state.absmax.dim() == 2:
        state.absmax = state.absmax.mT.reshape(-1).float()


def let_gradients_through_(layer: nn.Module) -> None:
    """Make a layer of bitsandbytes, which it packs for inference in evaluation mode, run as it does in training."""
    if quantization_of(layer) == BITSANDBYTES:
        unpack_(layer)
        layer.training = True


def passes_gradients(layer: nn.Module) -> bool:
    """Whether the gradient of a quantized layer's input is that of the product with its weight."""
    weight, dtype = float_weight(layer), dense_dtype(layer)
    generator = torch.Generator().manual_seed(0)

    def sample(features: int) -> Tensor:
        return torch.randn(2, features, generator=generator).to(device=weight.device, dtype=dtype)

    x, gradient = sample(layer_features(layer)[1]).requires_grad_(True), sample(layer_features(layer)[0])
    with torch.enable_grad():
        output = layer.forward(x)
    if not output.requires_grad:
        return False
    (found,) = torch.autograd.grad(output, x, gradient.to(output.dtype))
    expected = gradient.float() @ weight.float()
    return bool(torch.linalg.norm(found.float() - expected) <= _GRADIENT_TOLERANCE * torch.linalg.norm(expected))


def let_go_of_weight_(layer: nn.Module) -> None:
    """Free the weight of a layer that is not used any more, whoever still holds the layer."""
    layer.register_parameter("weight", None)
    state: Any = getattr(layer, "state", None)  # of bitsandbytes: it holds a weight in 8 bits, too
    if state is not None:
        layer.state = type(state)()
