"""Copies of an adapted model that share its tensors, freed of what PEFT has put around its modules."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from accelerate.hooks import remove_hook_from_module
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_jactus.deployment.layers import FactorizedLinear
from peft_jactus.tuner.base_weights import quantization_of
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.target_checks import ties_to_break

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch
    from torch import Tensor


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


def unwrap_trained_modules_(model: PreTrainedModel) -> list[str]:
    """Put what `modules_to_save` trained in the place of its wrappers; return their names."""
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    for name, wrapper in wrappers.items():
        trained = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        model.set_submodule(name, trained)
    return list(wrappers)


def untie_(model: PreTrainedModel, names: Collection[str]) -> None:
    """Make a model no longer tie the weights of the modules ``names`` that have become their own.

    Raises:
        ValueError: If it ties others, too: its config has one switch for all.
    """
    broken, kept = ties_to_break(model, names)
    own = {key: broken[key] for key in broken if _plain_weight(model, key) is not _plain_weight(model, broken[key])}
    others = kept | {key: broken[key] for key in broken.keys() - own}
    if own and others:
        key, source = next(iter(own.items()))
        raise ValueError(
            f"{key} was tied to {source}, but now has its own weight, while other weights stay tied: {others}. A "
            "checkpoint cannot store both. Leave the layer out (`exclude_modules`, `modules_to_save`), or load the "
            "model with `tie_word_embeddings=False`."
        )
    if not own:
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _plain_weight(model: nn.Module, key: str) -> object:
    """Return the parameter of this name; of an adapted layer, which has its own, something equal to nothing else."""
    module_name, _, name = key.rpartition(".")
    module = model.get_submodule(module_name)
    return object() if isinstance(module, JactusLayer) else getattr(module, name)


def cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what is saved outside of deployed layers another dtype, without touching tensors that are shared."""
    casts: dict[Tensor, Tensor] = {}  # tied tensors stay tied

    def cast_to_dtype(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if tensor not in casts:
            casts[tensor] = tensor.detach().to(dtype)
        return casts[tensor]

    deployed = tuple(f"{name}." for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear))
    for name, module in model.named_modules():
        if f"{name}.".startswith(deployed):
            continue
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            value = cast_to_dtype(parameter)
            if value is not parameter:
                module._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if key not in module._non_persistent_buffers_set:
                module._buffers[key] = cast_to_dtype(buffer)
