"""Copies of an adapted model that share its tensors, freed of what PEFT has put around its modules."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import remove_hook_from_module
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_jactus.errors import BaseWeightsFreedError
from peft_jactus.tuner.base_weights import quantization_of
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.target_checks import ties_to_break

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch import Tensor

    _Casts = dict[tuple[Tensor, torch.dtype], Tensor]  # what a tensor became: tied ones stay tied


def structural_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with modules and hooks of its own that shares all tensors."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for layer in model.modules():
        if isinstance(layer, JactusLayer) and layer._unmerged is not None:  # which is in no list of parameters
            shared |= {id(part): part for part in layer._unmerged.shared()}
        if quantization_of(layer) is not None and hasattr(layer, "state"):  # bitsandbytes': a weight in 8 bits
            shared[id(layer.state)] = layer.state
    return copy.deepcopy(model, shared)


def with_submodule(model: nn.Module, name: str, replacement: nn.Module) -> nn.Module:
    """Return ``model`` with another module of this name. It shares all else with ``model``, which stays as it is."""
    copied = copy.copy(model)
    first, _, rest = name.partition(".")
    part = with_submodule(model.get_submodule(first), rest, replacement) if rest else replacement
    copied._modules = {**model._modules, first: part}
    return copied


def forget_adapters_(model: PreTrainedModel) -> None:
    """Let go of what PEFT and accelerate have noted about layers that are going to be replaced."""
    remove_hook_from_module(model, recurse=True)
    if model._hf_peft_config_loaded:
        model._hf_peft_config_loaded = False
        vars(model).pop("_weight_conversions", None)  # renames what `load_adapter` has read, not the base model
    vars(model).pop("peft_config", None)


def take_layers_(model: PreTrainedModel, adapter_name: str) -> dict[str, JactusLayer]:
    """Return the layers that an adapter covers; put the dense ones back where only other adapters are.

    Raises:
        BaseWeightsFreedError: If such a dense layer is gone.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, JactusLayer)}
    for name, layer in layers.items():
        if adapter_name in layer.r:
            continue
        if layer.merged:
            layer.unmerge()
        if layer.base_weights_freed:
            raise BaseWeightsFreedError(f"export an adapter that leaves {name} as it was")
        model.set_submodule(name, layer.get_base_layer())
    return {name: layer for name, layer in layers.items() if adapter_name in layer.r}


def unwrap_trained_modules_(model: PreTrainedModel) -> list[str]:
    """Put what `modules_to_save` trained in the place of its wrappers, in the dtypes of what was there before.

    PEFT trains a copy in float32 of what has 16 bits.

    Returns:
        The names of those that were trained.
    """
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    names: list[str] = []
    casts: _Casts = {}
    for name, wrapper in wrappers.items():
        trained = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        if trained is not wrapper.original_module:
            _take_dtypes_(trained, wrapper.original_module, casts)
            names.append(name)
        model.set_submodule(name, trained)
    return names


def _take_dtypes_(module: nn.Module, original: nn.Module, casts: _Casts) -> None:
    dtypes = {key: tensor.dtype for key, tensor in (*original.named_parameters(), *original.named_buffers())}
    _cast_tensors_(module.named_modules(), lambda key, tensor: dtypes.get(key, tensor.dtype), casts)


def untie_(model: PreTrainedModel, names: Collection[str]) -> None:
    """Make a model no longer tie the weights of the modules ``names`` that have become their own.

    Raises:
        ValueError: If it ties others, too: its config has one switch for all.
    """
    broken, kept = ties_to_break(model, names)
    own = {key: broken[key] for key in broken if _plain_weight(model, key) is not _plain_weight(model, broken[key])}
    if own and kept:
        key, source = next(iter(own.items()))
        raise ValueError(
            f"{key} was tied to {source}, but now has its own weight, while other weights stay tied: {kept}. A "
            "checkpoint cannot store both. Leave the layer out (`exclude_modules`, `modules_to_save`), or load the "
            "model with `tie_word_embeddings=False`."
        )
    if not own:
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    _separate_(model, dict.fromkeys([*broken.values(), *broken]))


def _separate_(model: nn.Module, keys: Iterable[str]) -> None:
    """Copy a parameter that several of these keys still share: of the same tensors, `save_pretrained` writes one."""
    seen: set[Tensor] = set()
    for key in keys:
        module_name, _, name = key.rpartition(".")
        module = model.get_submodule(module_name)
        parameter = module._parameters.get(name)
        if parameter in seen:
            module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        elif parameter is not None:
            seen.add(parameter)


def _plain_weight(model: nn.Module, key: str) -> object:
    """Return the parameter of this name; of an adapted layer, which has its own, something equal to nothing else."""
    module_name, _, name = key.rpartition(".")
    module = model.get_submodule(module_name)
    return object() if isinstance(module, JactusLayer) else getattr(module, name)


def dtype_in_checkpoint(model: PreTrainedModel, key: str, dtype: torch.dtype) -> torch.dtype:
    """Return what ``from_pretrained(dtype=dtype)`` makes of a tensor: float32, where the model's class keeps that."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    kept = (kept for pattern, kept in plan.items() if re.search(pattern.replace("*", ".*"), key))
    return next(kept, dtype)


def cast_(model: PreTrainedModel, dtype: torch.dtype, *, beside: Collection[str]) -> None:
    """Give what is saved another dtype, as `dtype_in_checkpoint` does, without touching tensors that are shared.

    Args:
        model: With its deployed layers in place.
        dtype: Of the checkpoint.
        beside: Names of layers that stay as they are.
    """
    inside = tuple(f"{name}." for name in beside)
    others = ((name, module) for name, module in model.named_modules() if not f"{name}.".startswith(inside))
    _cast_tensors_(others, lambda key, _: dtype_in_checkpoint(model, key, dtype), {})


def _cast_tensors_(
    modules: Iterable[tuple[str, nn.Module]], dtype_of: Callable[[str, Tensor], torch.dtype], casts: _Casts
) -> None:
    def cast(key: str, tensor: Tensor) -> Tensor:
        dtype = dtype_of(key, tensor)
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if (tensor, dtype) not in casts:
            value = tensor.detach().to(dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            casts[tensor, dtype] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
        return casts[tensor, dtype]

    for name, module in modules:
        prefix = f"{name}." if name else ""
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            module._parameters[key] = cast(prefix + key, parameter)  # type: ignore[assignment]  # a parameter stays one
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if key not in module._non_persistent_buffers_set:
                module._buffers[key] = cast(prefix + key, buffer)
