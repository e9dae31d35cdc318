"""Checks of an adapter's tensors against its layers: what is loaded fits, what is saved is complete."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_jactus.tuner.adapter_format import FROZEN, TENSOR_NAMES
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.targeting import features_of, has_bias

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

    from peft_jactus.tuner.config import JactusConfig

# A key of a state dict: PEFT puts the adapter's name, which can be any, at the end.
_TENSOR_KEY = re.compile(rf"(?P<module>.+?)\.(?P<tensor>{'|'.join(TENSOR_NAMES)})(\..+)?")
ROOT = "base_model.model."
_FSDP = "_fsdp_wrapped_module."  # which the keys of a state dict do not have
# Two ranks may differ in the ones or the other.
_TELLING_RANKS = (*FROZEN, "jactus_adapt_down")


def fit_layers_to_checkpoint(
    model: nn.Module, config: JactusConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Give the layers of an adapter the ranks that its checkpoint has, and tensors that no other adapter shares.

    Tensors that the checkpoint does not change stay shared. A `ValueError` says if the checkpoint has other layers
    than the model, or tensors of other shapes, before anything is changed.
    """
    layers = {
        name.removeprefix(ROOT): module
        for name, module in model.named_modules()
        if isinstance(module, JactusLayer) and adapter_name in module.r
    }
    found = tensors_by_layer(state_dict, layers, adapter_name)
    ranks = {name: checked_rank(name, cast("nn.Module", layer), found[name], config) for name, layer in layers.items()}
    for name, layer in layers.items():
        shape = config.adapter_shape(ranks[name], layer.out_features, layer.in_features)
        layer.resize_adapter(adapter_name, ranks[name], shape)
        _unshare_(layer, adapter_name, found[name])
    config.layer_ranks.update(ranks)


def check_complete(
    model: nn.Module, config: JactusConfig, adapter_name: str, state_dict: Mapping[str, Tensor] | None, *, verb: str
) -> None:
    """Check that an adapter has all its tensors, of its layers and of what was trained whole.

    Args:
        model: What it is on.
        config: Its config, which says what it has, together with the layers and heads of ``model``.
        adapter_name: Its name.
        state_dict: What there is, with the names that ``model`` has for it. Default: what it holds.
        verb: What cannot be done with it otherwise: ``"saved"``.

    Raises:
        RuntimeError: If one is missing, has no elements, or still waits for a checkpoint.
    """
    modules = {name.replace(_FSDP, ""): module for name, module in model.named_modules()}
    layers = {name.removeprefix(ROOT): name for name, module in modules.items() if isinstance(module, JactusLayer)}
    gone = [name for name in sorted(config.layer_ranks) if name not in layers]
    if gone:
        raise RuntimeError(
            f"Adapter {adapter_name!r} cannot be {verb}: {len(gone)} of its {len(config.layer_ranks)} layers are no "
            f"longer in the model ({_named(gone)}). Save adapters before `merge_and_unload` or `unload`; afterwards, "
            "save the model that these return."
        )
    if state_dict is None:  # bitsandbytes changes 4-bit weights when it is asked for one
        state_dict = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
    expected = _tensors_of_layers(modules, layers, config, adapter_name)  # whether they have elements, by name
    expected |= dict.fromkeys(_tensors_of_heads(modules, config, adapter_name), False)
    missing = [
        key
        for key, has_elements in expected.items()
        if key not in state_dict or (has_elements and not state_dict[key].numel())
    ]
    if missing:
        names = [key.removeprefix(ROOT).removesuffix(f".{adapter_name}") for key in missing]
        raise RuntimeError(
            f"Adapter {adapter_name!r} cannot be {verb}: {len(missing)} of its {len(expected)} tensors are missing or "
            f"empty ({_named(names)}). Load it from its last checkpoint. If you pass a `state_dict`, or several "
            "processes share the tensors, gather all of them first, also those that do not train. Before a training "
            "under DeepSpeed ZeRO-3, call `make_shardable()` after the last adapter is added or loaded."
        )
    for name in layers.values():
        cast("JactusLayer", modules[name]).check_filled(adapter_name)


@torch.no_grad()
def _unshare_(layer: JactusLayer, adapter_name: str, loaded: Mapping[str, Tensor]) -> None:
    """Copy what another adapter has as well, where ``loaded``, which PEFT will write into it, differs from it."""
    others = [layer.adapter_tensors(name) for name in layer.r if name != adapter_name]
    for name, tensor in layer.adapter_tensors(adapter_name).items():
        sharing = any(_share_memory(tensor, other[name]) for other in others if name in other)
        if sharing and not _has_same_bits(tensor, loaded[name]):
            is_parameter = isinstance(tensor, nn.Parameter)  # see `hold_bases_as_parameters`
            own = nn.Parameter(tensor.clone(), requires_grad=tensor.requires_grad) if is_parameter else tensor.clone()
            getattr(layer, name)[adapter_name] = own


def _share_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are in the same place. Shards, and what is empty or `meta`, are in none."""
    return tensor is other or (tensor.data_ptr() == other.data_ptr() != 0)


def _has_same_bits(tensor: Tensor, loaded: Tensor) -> bool:
    if tensor.is_meta or loaded.is_meta or (tensor.dtype, tensor.shape) != (loaded.dtype, loaded.shape):
        return False
    mine, theirs = (part.contiguous().flatten().view(torch.uint8) for part in (tensor, loaded.to(tensor.device)))
    return torch.equal(mine, theirs)


def check_heads_in_file(model: nn.Module, config: JactusConfig, adapter_name: str, names: Collection[str]) -> None:
    """Raise `ValueError` if a file that holds the tensors ``names`` lacks some of the heads of an adapter."""
    wrapper = f".modules_to_save.{adapter_name}"
    heads = [key.replace(wrapper, "") for key in _tensors_of_heads(dict(model.named_modules()), config, adapter_name)]
    if missing := [key.removeprefix(ROOT) for key in heads if key not in names]:
        raise ValueError(
            f"The file of adapter {adapter_name!r} lacks {len(missing)} tensors of modules that were trained whole "
            f"({_named(missing)}). It is damaged: save the adapter again."
        )


def check_others_in_file(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` if a head, or embeddings, have another shape in a file than in the dense ``model``."""
    held = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for key, tensor in tensors.items():
        name = key.removeprefix(ROOT)
        if name in held and not _TENSOR_KEY.fullmatch(key):
            shape = tuple(getattr(held[name], "ds_shape", held[name].shape))  # of DeepSpeed: that of all shards
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"`{name}` has shape {shape} in the model, and {tuple(tensor.shape)} in the adapter's file. Load "
                    "the model with as many labels (`num_labels`) and tokens as it had when the adapter was saved."
                )


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _tensors_of_layers(
    modules: Mapping[str, nn.Module], layers: Mapping[str, str], config: JactusConfig, adapter_name: str
) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for name, rank in config.layer_ranks.items():
        layer = cast("JactusLayer", modules[layers[name]])
        features = (layer.out_features, layer.in_features)
        shapes = config.adapter_shape(rank, *features).tensors(*features, bias=layer.has_bias)
        found |= {f"{layers[name]}.{key}.{adapter_name}": math.prod(size) > 0 for key, size in shapes.items()}
    return found


def _tensors_of_heads(modules: Mapping[str, nn.Module], config: JactusConfig, adapter_name: str) -> Iterator[str]:
    """Yield the names of the tensors of all that is trained whole, whether or not PEFT's wrapper is still there."""
    heads = config.modules_to_save or ()
    inside: tuple[str, ...] = ()
    for name, module in modules.items():
        if name.startswith(inside):
            continue
        is_asked_for = any(name.endswith(head) for head in heads)
        trained: nn.Module | None = module if is_asked_for else None
        if isinstance(module, ModulesToSaveWrapper):
            inside += (f"{name}.",)
            is_head = is_asked_for or adapter_name in module._adapters
            trained = module.original_module if is_head else None  # which has the same tensors
        elif isinstance(module, JactusLayer):
            inside += (f"{name}.",)
            trained = None
        if trained is not None:
            yield from (f"{name}.modules_to_save.{adapter_name}.{key}" for key in _names_of_tensors(trained))


def _names_of_tensors(module: nn.Module) -> Iterator[str]:
    """Yield the names of parameters and persistent buffers."""
    for name, part in module.named_modules(remove_duplicate=False):
        held = [*part._parameters.items(), *part._buffers.items()]
        names = [key for key, tensor in held if tensor is not None and key not in part._non_persistent_buffers_set]
        yield from (f"{name}.{key}".removeprefix(".") for key in names)


def tensors_by_layer(
    state_dict: Mapping[str, Tensor], layers: Collection[str], adapter_name: str
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each layer; a `ValueError` says if they are of other layers than ``layers``."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        if matched := _TENSOR_KEY.fullmatch(key):
            found.setdefault(matched["module"].removeprefix(ROOT), {})[matched["tensor"]] = tensor
    unmatched = sorted(set(found) ^ set(layers))
    if unmatched:
        raise ValueError(
            f"The checkpoint and the model disagree on the layers of adapter {adapter_name!r}; only one of them "
            f"has: {unmatched}. Load the adapter with the config it was saved with, onto the base model it was "
            "made for."
        )
    return found


def checked_rank(name: str, layer: nn.Module, tensors: dict[str, Tensor], config: JactusConfig) -> int:
    """Return the rank of one layer's checkpoint tensors, or raise `ValueError` naming what is wrong with them."""
    features = features_of(layer)

    def shapes_of(rank: int) -> dict[str, tuple[int, ...]]:
        return config.adapter_shape(rank, *features).tensors(*features, bias=has_bias(layer))

    def fits(rank: int) -> bool:
        shapes = shapes_of(rank)
        return all(shapes.get(key) == tuple(tensors[key].shape) for key in _TELLING_RANKS if key in tensors)

    rank = config.layer_ranks.get(name) or 0
    if not config.from_checkpoint and not fits(rank):  # tensors of a model that was compressed otherwise
        rank = next((other for other in range(1, min(features) + 1) if fits(other)), rank)
    expected_shapes = shapes_of(rank)
    if set(tensors) != set(expected_shapes):
        raise ValueError(
            f"{name}: the checkpoint must hold {sorted(expected_shapes)}; it holds {sorted(tensors)}. It is damaged, "
            "or was made for another base model."
        )
    for tensor_name, tensor in tensors.items():
        if tuple(tensor.shape) != expected_shapes[tensor_name]:
            raise ValueError(
                f"{name}: `{tensor_name}` must have shape {expected_shapes[tensor_name]}; the checkpoint has "
                f"{tuple(tensor.shape)}. It is damaged or was made for another base model."
            )
    return rank
