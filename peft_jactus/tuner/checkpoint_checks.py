"""Checks of an adapter's tensors against its layers: what is loaded fits, what is saved is complete."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from peft_jactus.tuner.adapter_format import FROZEN, TENSOR_NAMES
from peft_jactus.tuner.layer import JactusLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from peft_jactus.tuner.config import JactusConfig

# A key of a state dict: PEFT puts the adapter's name, which can be any, at the end.
_TENSOR_KEY = re.compile(rf"(?P<module>.+?)\.(?P<tensor>{'|'.join(TENSOR_NAMES)})(\..+)?")
_ROOT = "base_model.model."
# Two ranks may differ in the ones or the other.
_TELLING_RANKS = (*FROZEN, "jactus_adapt_down")


def fit_layers_to_checkpoint(
    model: nn.Module, config: JactusConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Give the layers of an adapter the ranks that its checkpoint has.

    Raises:
        ValueError: If the checkpoint has other layers than the model, or tensors of other shapes; before anything is
            changed.
    """
    found = _tensors_by_layer(state_dict)
    layers = {
        name.removeprefix(_ROOT): module
        for name, module in model.named_modules()
        if isinstance(module, JactusLayer) and adapter_name in module.r
    }
    unmatched = sorted(set(found) ^ set(layers))
    if unmatched:
        raise ValueError(
            f"The checkpoint and the model disagree on the layers of adapter {adapter_name!r}; only one of them "
            f"has: {unmatched}. Load the adapter with the config it was saved with, onto the base model it was "
            "made for."
        )
    ranks = {name: _checked_rank(name, layer, found[name], config) for name, layer in layers.items()}
    for name, layer in layers.items():
        shape = config.adapter_shape(ranks[name], layer.out_features, layer.in_features)
        layer.resize_adapter(adapter_name, ranks[name], shape)
    config.layer_ranks.update(ranks)


def check_complete(config: JactusConfig, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Raise `RuntimeError` if an adapter that is to be saved lacks one of its layers."""
    missing = sorted(set(config.layer_ranks) - set(_tensors_by_layer(state_dict)))
    if missing:
        raise RuntimeError(
            f"Adapter {adapter_name!r} cannot be saved: {len(missing)} of its {len(config.layer_ranks)} layers are no "
            f"longer in the model ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Save adapters "
            "before `merge_and_unload` or `unload`; afterwards, save the model that these return."
        )


def _tensors_by_layer(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        if matched := _TENSOR_KEY.fullmatch(key):
            found.setdefault(matched["module"].removeprefix(_ROOT), {})[matched["tensor"]] = tensor
    return found


def _checked_rank(name: str, layer: JactusLayer, tensors: dict[str, Tensor], config: JactusConfig) -> int:
    """Return the rank of one layer's checkpoint tensors, or raise `ValueError` naming what is wrong with them."""
    features = (layer.out_features, layer.in_features)

    def shapes_of(rank: int) -> dict[str, tuple[int, ...]]:
        return config.adapter_shape(rank, *features).tensors(*features, bias=layer.has_bias)

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
