"""Models that were loaded quantized: what can be done with them, and making them forget it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from peft_jactus.tuner.base_weights import (
    READABLE,
    dense_dtype,
    float_weight,
    is_conv1d,
    quantization_of,
    quantization_of_tensor,
)
from peft_jactus.tuner.dense_layers import make_dense_layer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# A model from a GGUF file is one of numbers, where transformers has unpacked it; else it has layers of these classes.
_GGUF = "gguf"
_PACKED_GGUF = ("GgufLinear", "GgufExperts", "GgufEmbedding")
_METHODS = (*READABLE, _GGUF)
# What the configs of bitsandbytes and torchao call the modules that are not quantized.
_LISTS_OF_PLAIN_MODULES = ("llm_int8_skip_modules", "modules_to_not_convert")
_ATTRIBUTES = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def check_method(model: nn.Module) -> None:
    """Check that a model is not quantized, or by a method whose weights can be read.

    Raises:
        TypeError: If not; says what to do.
    """
    for part, quantizer in _quantized_models(model):
        method = _method_of(quantizer)
        packed = method == _GGUF and any(type(module).__name__ in _PACKED_GGUF for module in part.modules())
        if packed:
            raise TypeError(
                f"{type(part).__name__} has its weights in GGUF blocks, which can't be factorized. Load it with "
                "`quantization_config=GgufConfig(dequantize=True)`."
            )
        if method not in _METHODS:
            raise TypeError(
                f"{type(part).__name__} is quantized with {method}, whose weights can't be read back. Load the model "
                "it was made from in bf16, fp16 or fp32, or in 8 or 4 bits with bitsandbytes or torchao; or load this "
                "one with `dequantize=True` in its quantization config, if that has it."
            )


def check_not_extended(model: nn.Module) -> None:
    """Raise `TypeError` for a compressed model that has more than compressed layers, which go by these layers."""
    for part in model.modules():
        config = getattr(vars(part).get("hf_quantizer"), "quantization_config", None)
        if extensions := getattr(config, "extensions", None):
            raise TypeError(
                f"{type(part).__name__} is a compressed model with {', '.join(extensions)}, which was made for the "
                "layers that are compressed now. Compress more layers first, and then make it for all of them."
            )


def check_readable(model: nn.Module) -> None:
    """Check that all weights of a model can be had in floating-point numbers.

    Raises:
        TypeError: If not; names them.
    """
    check_method(model)
    unreadable = [
        name
        for name, parameter in model.named_parameters()
        if quantization_of_tensor(parameter) not in {None, *READABLE}
    ]
    if unreadable:
        raise TypeError(
            "A checkpoint holds floating-point numbers, but these weights are quantized and can't be read back: "
            f"{unreadable[:5]}. Load the model without quantization, and load the adapter onto it."
        )


def dequantize_(model: nn.Module) -> None:
    """Put plain weights in the place of quantized ones, one layer at a time; change no tensor."""
    dense: dict[nn.Module, nn.Module] = {}  # a module can stand in several places
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and quantization_of(module) is not None and isinstance(module, nn.Linear):
            if module not in dense:
                weight = float_weight(module).to(dense_dtype(module, model))
                dense[module] = make_dense_layer(weight, module.bias, is_conv1d=is_conv1d(module))
            model.set_submodule(name, dense[module])
            continue
        for key, parameter in module._parameters.items():  # torchao's, of embeddings and experts
            if parameter is not None and quantization_of_tensor(parameter) is not None:
                module._parameters[key] = nn.Parameter(_dequantized(parameter), requires_grad=False)
    forget_quantization_(model)


def _dequantized(parameter: Tensor) -> Tensor:
    weight: Tensor = parameter.detach().dequantize()
    return weight.to(parameter.dtype)


def forget_quantization_(model: nn.Module) -> None:
    """Make a model, all of whose weights are plain ones now, what it would be had it been loaded so."""
    for part, quantizer in list(_quantized_models(model)):
        if _method_of(quantizer) not in _METHODS:
            continue
        for name in _ATTRIBUTES:
            vars(part).pop(name, None)
        if hasattr(part.config, "quantization_config"):
            del part.config.quantization_config
        part.is_quantized = False  # type: ignore[assignment]  # transformers sets it so, too
        for module in part.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        conversions = vars(part).get("_weight_conversions")
        if conversions is not None:  # those of the quantizer would be reverted by saving
            vars(part)["_weight_conversions"] = [entry for entry in conversions if not _quantizes(entry)]


def note_plain_layers_(model: nn.Module) -> None:
    """Make a model, some of whose quantized layers are plain ones now, say so in the config that it is saved with."""
    for part, quantizer in list(_quantized_models(model)):
        if not is_quantized(part):
            forget_quantization_(part)
            continue
        config: Any = quantizer.quantization_config
        field = next((name for name in _LISTS_OF_PLAIN_MODULES if hasattr(config, name)), None)
        if field is not None:
            plain = [
                name
                for name, module in part.named_modules()
                if isinstance(module, (nn.Linear, Conv1D)) and quantization_of(module) is None
            ]
            setattr(config, field, sorted({*(getattr(config, field) or ()), *plain}))


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of a model is quantized."""
    return any(quantization_of_tensor(parameter) is not None for parameter in model.parameters())


def _quantizes(conversion: object) -> bool:
    return isinstance(conversion, WeightConverter) and any(
        getattr(operation, "hf_quantizer", None) is not None for operation in conversion.operations
    )


def _quantized_models(model: nn.Module) -> Iterator[tuple[PreTrainedModel, Any]]:
    """Yield the models of transformers in ``model`` that were loaded quantized, not those that are compressed."""
    for module in model.modules():
        quantizer = vars(module).get("hf_quantizer")
        if isinstance(module, PreTrainedModel) and quantizer is not None and _method_of(quantizer) != "jactus":
            yield module, quantizer


def _method_of(quantizer: Any) -> str:
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))
