"""How large a model is before and after compression."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

from peft_jactus.numerics.allocation import DENSE, stays_dense, stored_parameters
from peft_jactus.tuner.base_weights import dense_dtype, layer_features, quantization_of, unpack_
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.targeting import (
    base_layer_of,
    features_of,
    has_bias,
    head_names,
    is_trained_whole,
    log_once,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    import torch
    from torch import Tensor

    from peft_jactus.numerics.allocation import Storage
    from peft_jactus.tuner.config import JactusConfig
    from peft_jactus.tuner.rank_table import RankSummary

# Of a tensor's entry in the headers of safetensors files, beside its name, which stands there twice: shape and
# offsets, and the digest that a compressed checkpoint carries. Rather too many than too few.
_ENTRY_BYTES = 180
_INDEX_BYTES = 4  # a pivoted layer stores where each of its rows (or columns) belongs, int32
# Of a targeted layer, without its bias. A factorised one has two parts, one number in the place of the weight, and if
# it is pivoted an index.
_NUM_TENSORS = {DENSE: 1, "factored": 3, "pivoted": 4}
_MOST_NAMED = 4


def warn_of_large_rest(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Log, once, what the rest of a model is where it has more parameters than the targeted layers."""
    groups: Counter[str] = Counter()
    quantized = _quantized_layers(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in other_parameters(model, targets):
        if not is_on_top(name, modules):
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
    """Yield the parameters, with their names, that are no weights of the targeted layers and no parts of adapters.

    Shared ones come once. Copies that an adapter trains whole come, too.
    """
    weights = {f"{name}{layer}.weight" for name in targets for layer in ("", ".base_layer")}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in weights and ".jactus_" not in name and id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def num_outside(model: nn.Module, layers: Collection[str], copied: Collection[str] = ()) -> int:
    """Return how many parameters a model has outside of ``layers``, with the biases of these; shared ones count once.

    Args:
        model: Adapted or not; what adapters add does not count.
        layers: Names of a Linear or Conv1D each, adapted or not, whose weight may be gone.
        copied: Names of modules that get parameters of their own.

    Returns:
        Their number.
    """
    quantized, modules = _quantized_layers(model), dict(model.named_modules(remove_duplicate=False))
    outside = {
        (id(parameter), _holder(name, copied)): _numel(name, parameter, quantized)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if _holder(name, layers) is None and not is_on_top(name, modules)
    }
    biases = [features_of(layer)[0] for layer in map(model.get_submodule, layers) if has_bias(layer)]
    return sum(outside.values()) + sum(biases)


def is_on_top(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor is an adapter's, or a copy that is trained beside one, by the modules that hold it."""
    parts = name.split(".")
    if "modules_to_save" in parts:
        return True
    holders = (".".join(parts[:length]) for length in range(1, len(parts)))
    wrapped = [holder for holder in holders if isinstance(modules.get(holder), BaseTunerLayer)]
    return bool(wrapped) and not name.startswith(f"{wrapped[-1]}.base_layer.")


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model, dense and compressed.

    Attributes:
        num_parameters: Of the whole dense model; shared ones count once.
        num_bytes: Of its parameters and saved buffers, with the headers of the files.
        other_parameters: What a compressed model has beside the weights of the targeted layers. What these, or heads
            that are trained whole, share with others in the dense model (embeddings) is among them, too.
        other_bytes: Of these and of saved buffers, as an export has them.
        shapes: ``(out, in)`` of each targeted layer, by full module name.
        itemsizes: Bytes of one number of each targeted layer.
        file_names: What the targeted layers are called in an export.
    """

    num_parameters: int
    num_bytes: int
    other_parameters: int
    other_bytes: int
    shapes: dict[str, tuple[int, int]]
    itemsizes: dict[str, int]
    file_names: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, targets: Mapping[str, nn.Module], config: JactusConfig) -> ModelSize:
        """Measure ``model``, with its quantized weights as they are exported; adapters that are there do not count."""
        heads = head_names(config)
        copied = {name for name, _ in model.named_modules() if is_trained_whole(name, heads)}
        tensors = _dense_tensors(model)
        dense = {tensor.identity: tensor for tensor in tensors.values()}.values()
        outside = {
            (tensor.identity, _holder(name, copied)): tensor
            for name, tensor in tensors.items()
            if _holder(name, targets) is None
        }
        itemsizes = {name: _deployed_dtype(module, model).itemsize for name, module in targets.items()}
        in_files = _names_in_files(model, [f"{name}.weight" for name in targets])
        file_names = {name: in_files[f"{name}.weight"].removesuffix(".weight") for name in targets}
        biases = {name: features_of(module)[0] for name, module in targets.items() if has_bias(module)}
        return cls(
            num_parameters=sum(tensor.count for tensor in dense if tensor.is_parameter),
            num_bytes=sum(tensor.num_bytes for tensor in dense),
            other_parameters=num_outside(model, targets, copied),
            other_bytes=sum(tensor.num_bytes for tensor in outside.values())
            + sum(
                count * itemsizes[name] + _entry_bytes(f"{file_names[name]}.bias") for name, count in biases.items()
            ),
            shapes={name: features_of(module) for name, module in targets.items()},
            itemsizes=itemsizes,
            file_names=file_names,
        )

    @property
    def targeted_parameters(self) -> int:
        """Parameters of the targeted layers' weights."""
        return sum(out_features * in_features for out_features, in_features in self.shapes.values())

    @property
    def shared_parameters(self) -> int:
        """How many parameters a compressed model has twice that the dense one has once (a head that is tied)."""
        return self.other_parameters + self.targeted_parameters - self.num_parameters

    def compressed_parameters(self, summary: RankSummary) -> int:
        """Return the parameters of the whole model, with the targeted layers at these ranks."""
        return self.other_parameters + sum(row.num_stored for row in summary.rows)

    def compressed_bytes(self, ranks: Mapping[str, int], storage: Storage) -> int:
        """Return the bytes of the whole checkpoint, with the targeted layers at these ranks."""
        num_bytes = self.other_bytes
        for name, rank in ranks.items():
            shape = self.shapes[name]
            form = DENSE if stays_dense(rank, *shape, storage) else storage
            num_bytes += stored_parameters(rank, *shape, storage) * self.itemsizes[name]
            num_bytes += self.bytes_beside(name, form)
        return num_bytes

    def bytes_beside(self, name: str, storage: str) -> int:
        """Return what a targeted layer stores beside its numbers."""
        index = _INDEX_BYTES * min(self.shapes[name]) if storage == "pivoted" else 0
        # The longest name is that of a part. It makes up for a bias, whose name also grows.
        part = "weight" if storage == DENSE else "columns.weight"
        return index + _NUM_TENSORS[storage] * _entry_bytes(f"{self.file_names[name]}.{part}")


@dataclass(frozen=True)
class _DenseTensor:
    """A parameter or saved buffer of a dense model."""

    identity: int
    name: str
    count: int
    dtype: torch.dtype
    is_parameter: bool

    @property
    def num_bytes(self) -> int:
        """Its share of a file."""
        return self.count * self.dtype.itemsize + _entry_bytes(self.name)


def _dense_tensors(model: nn.Module) -> dict[str, _DenseTensor]:
    """Return what the dense model saves, by name in ``model``; shared ones under each name."""
    quantized = _quantized_layers(model)
    for layer in quantized.values():
        unpack_(layer)  # or `state_dict` would, and leave a part of it
    state = model.state_dict(keep_vars=True)
    # What else a quantized layer saves, scales and codes, belongs to its weight.
    extra = {key for name in quantized for key in state if key.startswith((f"{name}.weight.", f"{name}.SCB"))}
    extra |= {f"{name}.weight_format" for name in quantized}
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name in state if name not in extra and not is_on_top(name, modules)]
    in_files = _names_in_files(model, names)
    return {
        name: _DenseTensor(
            identity=id(state[name]),
            name=in_files[name],
            count=_numel(name, state[name], quantized),
            dtype=_dense_dtype(name, state[name], quantized, model),
            is_parameter=isinstance(state[name], nn.Parameter),
        )
        for name in names
    }


def _holder(name: str, modules: Collection[str]) -> str | None:
    """Return which of ``modules``, given by name, holds a tensor: the outermost one."""
    parts = name.split(".")
    paths = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((path for path in paths if path in modules), None)


def _names_in_files(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return what tensors and layers are called in files: of some families transformers writes older, longer names.

    The longer of both is returned, as an export can also have the model's own.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None and isinstance(model, PreTrainedModel):
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in found if not isinstance(conversion, PrefixChange)]
    renamings: list[Any] = [
        conversion.reverse_transform()
        for conversion in reversed(conversions or ())
        if isinstance(conversion, WeightRenaming) and conversion.quantization_operation is None
    ]
    in_files = {}
    for name in names:
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        in_files[name] = max(plain, apply_renamings(plain, renamings), key=len)
    return in_files


def _quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if quantization_of(module) is not None}


def _numel(name: str, tensor: Tensor, quantized: Mapping[str, nn.Module]) -> int:
    """Return how many numbers a tensor stands for; in 4 bits two are packed into one."""
    layer = quantized.get(name.removesuffix(".weight"))
    return math.prod(layer_features(layer)) if isinstance(layer, nn.Linear) else tensor.numel()


def _dense_dtype(name: str, tensor: Tensor, quantized: Mapping[str, nn.Module], model: nn.Module) -> torch.dtype:
    layer = quantized.get(name.removesuffix(".weight"))
    return tensor.dtype if layer is None else dense_dtype(layer, model)


def _deployed_dtype(module: nn.Module, model: nn.Module) -> torch.dtype:
    return module.base_dtype if isinstance(module, JactusLayer) else dense_dtype(base_layer_of(module), model)


def _entry_bytes(name: str) -> int:
    return 2 * len(name) + _ENTRY_BYTES
