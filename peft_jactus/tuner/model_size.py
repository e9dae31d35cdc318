"""How large a model is before and after compression, and the budget that a size leaves to the targeted layers."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from peft_jactus.tuner.base_weights import dense_dtype, layer_features, quantization_of, unpack_
from peft_jactus.tuner.sizes import parse_size
from peft_jactus.tuner.targeting import base_layer_of, features_of, log_once

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from peft_jactus.tuner.config import JactusConfig
    from peft_jactus.tuner.rank_table import RankSummary

# Of a tensor's entry in the headers of safetensors files, beside its name, which stands there twice: shape and
# offsets, and the digest that a compressed checkpoint carries. Rather too many than too few.
_ENTRY_BYTES = 180
_INDEX_BYTES = 4  # a pivoted layer stores where each of its rows (or columns) belongs, int32
# A factorised layer has so many tensors more than a dense one: a second part, one number in the place of the weight,
# and the index of a pivoted one.
_MORE_TENSORS = {"factored": 2, "pivoted": 3}
_MOST_NAMED = 4


def warn_of_large_rest(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Log, once, what the rest of a model is where it has more parameters than the targeted layers."""
    groups: Counter[str] = Counter()
    quantized = _quantized_layers(model)
    for name, parameter in other_parameters(model, targets):
        groups[re.sub(r"\.\d+\.", ".*.", name)] += _numel(name, parameter, quantized)
    # A layer that another adapter compressed has no weight any more.
    total = groups.total() + sum(math.prod(features_of(module)) for module in targets.values())
    if groups.total() > total / 2:
        largest = ", ".join(f"{name} {count / total:.0%}" for name, count in groups.most_common(_MOST_NAMED))
        log_once(
            f"The targeted layers have {1 - groups.total() / total:.0%} of the model's {total:,} parameters. The "
            f"others stay as they are; most of them are in: {largest}."
        )


def other_parameters(model: nn.Module, targets: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters, with their names, that are no weights of the targeted layers and no parts of adapters."""
    weights = {f"{name}{layer}.weight" for name in targets for layer in ("", ".base_layer")}
    for name, parameter in model.named_parameters():
        if name not in weights and not _is_of_adapter(name):
            yield name, parameter


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a dense model.

    Attributes:
        num_parameters: Of the whole model; shared ones count once.
        num_bytes: Of its parameters and saved buffers, with the headers of the files.
        shapes: ``(out, in)`` of each targeted layer, by full module name.
        itemsize: Bytes of one number of a targeted weight.
    """

    num_parameters: int
    num_bytes: int
    shapes: dict[str, tuple[int, int]]
    itemsize: int

    @classmethod
    def of(cls, model: nn.Module, targets: Mapping[str, nn.Module]) -> ModelSize:
        """Measure ``model``, with its quantized weights as they are exported; adapters that are there do not count."""
        quantized = _quantized_layers(model)
        for layer in quantized.values():
            unpack_(layer)  # or `state_dict` would, and leave a part of it
        state = model.state_dict(keep_vars=True)
        # What else a quantized layer saves, scales and codes, belongs to its weight.
        extra = {key for name in quantized for key in state if key.startswith((f"{name}.weight.", f"{name}.SCB"))}
        extra |= {f"{name}.weight_format" for name in quantized}
        names = [name for name in state if not _is_of_adapter(name) and name not in extra]
        unique = {id(state[name]): name for name in names}.values()
        counts = {name: _numel(name, state[name], quantized) for name in unique}
        itemsizes = {name: _itemsize(name, state[name], quantized, model) for name in unique}
        return cls(
            num_parameters=sum(counts[name] for name in unique if isinstance(state[name], nn.Parameter)),
            num_bytes=sum(
                counts[name] * itemsizes[name] + _entry_bytes(name.replace(".base_layer", "")) for name in unique
            ),
            shapes={name: features_of(module) for name, module in targets.items()},
            itemsize=max(dense_dtype(base_layer_of(module), model).itemsize for module in targets.values()),
        )

    @property
    def targeted_parameters(self) -> int:
        """Parameters of the targeted layers' weights."""
        return sum(out_features * in_features for out_features, in_features in self.shapes.values())

    def compressed_parameters(self, summary: RankSummary) -> int:
        """Return the parameters of the whole model, with the targeted layers at these ranks."""
        return self.num_parameters + sum(row.num_stored - row.num_dense for row in summary.rows)

    def compressed_bytes(self, summary: RankSummary) -> int:
        """Return the bytes of the whole checkpoint, with the targeted layers at these ranks."""
        num_bytes = self.num_bytes
        for row in summary.rows:
            num_bytes += (row.num_stored - row.num_dense) * self.itemsize
            if not row.stays_dense:
                num_bytes += _extra_bytes(row.name, min(row.out_features, row.in_features), row.storage)
        return num_bytes


def budget_ratio(config: JactusConfig, size: ModelSize) -> float:
    """Return the share of the targeted layers' parameters that the config's budget allows, in (0, 1].

    Raises:
        ValueError: If what is not targeted takes all of the budget.
    """
    if config.model_ratio is not None:
        untargeted = size.num_parameters - size.targeted_parameters
        allowed = config.model_ratio * size.num_parameters - untargeted
        least = f"{untargeted / size.num_parameters:.1%} of the parameters"
    elif config.max_model_size is not None:
        extra = sum(_extra_bytes(name, min(shape), config.storage) for name, shape in size.shapes.items())
        untargeted = size.num_bytes - size.targeted_parameters * size.itemsize + extra
        allowed = (parse_size(config.max_model_size) - untargeted) / size.itemsize
        least = f"{untargeted / 1e6:.1f} MB"
    else:
        return config.retained_ratio
    if allowed <= 0:
        raise ValueError(
            f"{config.asked_budget} cannot be reached: what is not targeted (embeddings, heads, norms) already takes "
            f"{least}. Raise the budget, or target more layers."
        )
    return min(1.0, allowed / size.targeted_parameters)


def _is_of_adapter(name: str) -> bool:
    return ".jactus_" in name


def _quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if quantization_of(module) is not None}


def _numel(name: str, tensor: Tensor, quantized: Mapping[str, nn.Module]) -> int:
    """Return how many numbers a tensor stands for; in 4 bits two are packed into one."""
    layer = quantized.get(name.removesuffix(".weight"))
    return math.prod(layer_features(layer)) if isinstance(layer, nn.Linear) else tensor.numel()


def _itemsize(name: str, tensor: Tensor, quantized: Mapping[str, nn.Module], model: nn.Module) -> int:
    layer = quantized.get(name.removesuffix(".weight"))
    return tensor.itemsize if layer is None else dense_dtype(layer, model).itemsize


def _entry_bytes(name: str) -> int:
    return 2 * len(name) + _ENTRY_BYTES


def _extra_bytes(name: str, short_side: int, storage: str) -> int:
    """Return what a factorised layer stores beside its numbers."""
    index = _INDEX_BYTES * short_side if storage == "pivoted" else 0
    return index + _MORE_TENSORS[storage] * _entry_bytes(f"{name}.others.weight")
