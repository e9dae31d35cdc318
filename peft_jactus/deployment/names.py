"""Names of layers in the files of a checkpoint: transformers stores some families under older names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from peft_jactus.deployment.layers import FactorizedLinear

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel


class Renaming:
    """Where transformers puts the tensors of a checkpoint.

    Args:
        model: As its class builds it, before layers are replaced.
        original_format: As for `CompressionConfig`.
    """

    def __init__(self, model: PreTrainedModel, *, original_format: bool) -> None:
        conversions = get_model_conversion_mapping(model) if original_format else []
        self._renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        self._converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._tensors = model.state_dict()
        self._tied = model.all_tied_weights_keys  # saved under another name
        self._modules = dict(model.named_modules())

    def __call__(self, checkpoint_name: str) -> str | None:
        """Return the name of the module, ``None`` if this model has none of that name."""
        name = self._key(f"{checkpoint_name}.weight").removesuffix(".weight")
        return name if name in self._modules else None

    def _key(self, key: str) -> str:
        key, _ = rename_source_key(key, self._renamings, self._converters, self._prefix, self._tensors)
        return key

    def without_tensors(self, keys: Iterable[str]) -> list[str]:
        """Return the linear layers of the model whose weight is not among a checkpoint's tensors."""
        found = {self._key(key) for key in keys} | self._tied.keys()
        return [
            name
            for name, module in self._modules.items()
            if isinstance(module, (nn.Linear, Conv1D)) and f"{name}.weight" not in found
        ]


def checkpoint_names(model: PreTrainedModel, module_names: Collection[str]) -> dict[str, str]:
    """Return under which names `save_pretrained` writes modules; not those whose weight is not written as it is.

    Of some families transformers writes the weights of several layers as one, or permuted.
    """
    weights = {f"{name}.weight": _dense_weight(model.get_submodule(name)) for name in module_names}
    parts = tuple(f"{name}." for name in module_names)
    others = {key: tensor.to("meta") for key, tensor in model.state_dict().items() if not key.startswith(parts)}
    # The same objects under other names, if their values stay as they are.
    written = {id(tensor): key for key, tensor in revert_weight_conversion(model, {**others, **weights}).items()}
    return {
        key.removesuffix(".weight"): written[id(tensor)].removesuffix(".weight")
        for key, tensor in weights.items()
        if written.get(id(tensor), "").endswith(".weight")
    }


def are_found_again(model: PreTrainedModel, names: Mapping[str, str]) -> bool:
    """Whether transformers finds all modules again under the names in a checkpoint, given by module name."""
    renamed = Renaming(model, original_format=True)
    return all(renamed(name) == module_name for module_name, name in names.items())


def _dense_weight(layer: nn.Module) -> Tensor:
    """Return a weight of the layer's shape without numbers."""
    if isinstance(layer, FactorizedLinear):
        return torch.empty(layer.out_features, layer.in_features, device="meta")
    return cast("Tensor", layer.weight).to("meta")


def without_numbers(name: str) -> str:
    """Return what names of the same layer in all blocks have in common."""
    return re.sub(r"\.\d+\.", ".*.", name)
