"""A look at what was decided: the rank table and the rank plot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from peft_jactus.deployment.extensions import extensions_in, find_extension
from peft_jactus.deployment.layers import FactorizedLinear
from peft_jactus.deployment.quantized_linear import QuantizedLinear
from peft_jactus.deployment.quantizer import JactusQuantizer
from peft_jactus.errors import DamagedCheckpointError
from peft_jactus.numerics.allocation import DENSE, stays_dense
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.model_size import is_on_top, num_outside
from peft_jactus.tuner.rank_table import LayerRank, RankSummary
from peft_jactus.tuner.target_checks import ties_to_break
from peft_jactus.tuner.targeting import features_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from peft_jactus.deployment.config import CompressionConfig, LayerForm


def rank_summary(model: nn.Module, adapter_name: str = "default") -> RankSummary:
    """Return the ranks of the targeted layers.

    Args:
        model: A `PeftModel` with a JACTUS adapter, a transformers model that loaded one, or a compressed model.
        adapter_name: Which adapter.

    Raises:
        ValueError: If the model has no such adapter and is not compressed.
    """
    configs = {
        name: config for name, config in getattr(model, "peft_config", {}).items() if isinstance(config, JactusConfig)
    }
    quantizer = getattr(model, "hf_quantizer", None)
    if adapter_name not in configs and isinstance(quantizer, JactusQuantizer):
        return _summary_of_compressed(model, quantizer)
    if adapter_name not in configs:
        raise ValueError(
            f"`model` has no JACTUS adapter named {adapter_name!r}, and is not a compressed model. Its JACTUS "
            f"adapters are {list(configs)}; pass the name of one as `adapter_name`."
        )
    config = configs[adapter_name]
    rows = []
    for module_name, layer in model.named_modules():
        name = module_name.removeprefix("base_model.model.")
        if isinstance(layer, JactusLayer) and name in config.layer_ranks:
            rank, shape = config.layer_ranks[name], (layer.out_features, layer.in_features)
            storage = DENSE if stays_dense(rank, *shape, config.storage) else config.storage
            rows.append(LayerRank(name, *shape, rank, storage, config.layer_energy.get(name)))
    layers = [name for name, layer in model.named_modules() if isinstance(layer, JactusLayer)]
    heads = [name for name, head in model.named_modules() if _is_copied(head, adapter_name)]
    others = num_outside(model, layers, heads)
    shared = others - num_outside(model, layers) + _num_tied(model, rows)
    return RankSummary(rows, config.asked_ratio, others, shared)


def _is_copied(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save


def _num_tied(model: nn.Module, rows: Iterable[LayerRank]) -> int:
    """Count the parameters of adapted layers that the dense model of transformers also uses elsewhere."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {row.name: row for row in rows}
    broken, _ = ties_to_break(base, layers)
    tied = [key.rpartition(".") for key in {*broken, *broken.values()}]
    return sum(
        layers[name].num_dense if tensor == "weight" else layers[name].out_features
        for name, _, tensor in tied
        if name in layers
    )


def _summary_of_compressed(model: nn.Module, quantizer: JactusQuantizer) -> RankSummary:
    if isinstance(model, PeftModel):  # an adapter on top
        model = model.get_base_model()
    modules = dict(model.named_modules())
    rows = []
    for name, form in quantizer.module_forms.items():
        layer = modules[name]
        if isinstance(layer, FactorizedLinear | QuantizedLinear):
            out_features, in_features = layer.out_features, layer.in_features
        else:
            out_features, in_features = features_of(layer)
        rows.append(LayerRank(name, out_features, in_features, form.rank, form.storage, form.energy_kept))
    order = {name: position for position, name in enumerate(modules)}
    rows.sort(key=lambda row: order[row.name])
    added = [entry.module_name for entry in extensions_in(model)]
    sizes = {name: p.numel() for name, p in model.named_parameters() if not is_on_top(name, modules)}
    sizes |= {name: b.numel() for name, b in model.named_buffers() if name.startswith(_inside(added))}
    others, of_router = _numbers_outside([row.name for row in rows], sizes, added=added)
    return RankSummary(rows, quantizer.quantization_config.retained_ratio, others, router_parameters=of_router)


def _numbers_outside(layers: Iterable[str], sizes: Mapping[str, int], *, added: Iterable[str]) -> tuple[int, int]:
    """Count the numbers outside of layers, and their biases.

    Args:
        layers: Full names.
        sizes: How many numbers each parameter has, by name.
        added: Names of modules that the dense model does not have, such as a router.

    Returns:
        The numbers of the model without what is added, and those of what is added.
    """
    inside, of_added = _inside(layers), _inside(added)
    others = {name: size for name, size in sizes.items() if not name.startswith(inside) or name.endswith("bias")}
    num_added = sum(size for name, size in others.items() if name.startswith(of_added))
    return sum(others.values()) - num_added, num_added


def _inside(modules: Iterable[str]) -> tuple[str, ...]:
    """Return how the names of all that is in these modules begin."""
    return tuple(f"{name}." for name in modules)


def summary_of_checkpoint(compression: CompressionConfig, shapes: Mapping[str, tuple[int, ...]]) -> RankSummary:
    """Return the ranks of a compressed checkpoint from its headers alone.

    A `DamagedCheckpointError` says if it does not hold the layers that ``config.json`` describes.

    Args:
        compression: The ``quantization_config`` of its ``config.json``.
        shapes: Of all its tensors, by name.
    """
    rows = [
        LayerRank(name, *_stored_features(name, form, shapes), form.rank, form.storage, form.energy_kept)
        for name, form in sorted(compression.layers.items(), key=lambda item: _with_numbers(item[0]))
    ]
    added = [entry.module_name for entry in map(find_extension, compression.extensions) if entry is not None]
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    others, of_router = _numbers_outside(compression.layers, sizes, added=added)
    return RankSummary(rows, compression.retained_ratio, others, router_parameters=of_router)


def summary_of_adapter(config: JactusConfig, shapes: Mapping[str, tuple[int, ...]]) -> RankSummary:
    """Return the ranks of a saved adapter from its headers alone.

    Args:
        config: Its ``adapter_config.json``.
        shapes: Of all its tensors, by name.

    Raises:
        ValueError: If the file does not hold the layers that the config describes.
    """
    rows = []
    for name, rank in sorted(config.layer_ranks.items(), key=lambda item: _with_numbers(item[0])):
        prefix = f"base_model.model.{name}."
        held = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        ends = ("left_order", "right_order") if "jactus_core" in held else ("adapt_up", "adapt_down")
        left, right = (held.get(f"jactus_{end}") for end in ends)
        wrong = held
        if left and right:
            features = (left[0], right[-1])
            expected = config.adapter_shape(rank, *features).tensors(*features, bias=False)
            wrong = {key: held.get(key, ()) for key, shape in expected.items() if held.get(key) != shape}
        if not left or not right or wrong:
            raise ValueError(
                f"{name}: adapter_config.json gives it rank {rank}. The adapter's file does not fit: it holds "
                f"{wrong or 'nothing'}. It is damaged; save it again."
            )
        storage = DENSE if stays_dense(rank, *features, config.storage) else config.storage
        rows.append(LayerRank(name, *features, rank, storage, config.layer_energy.get(name)))
    if not rows:
        raise ValueError(
            "adapter_config.json has no `layer_ranks`: this is not an adapter that `get_peft_model` made."
        )
    return RankSummary(rows, config.asked_ratio)


def _stored_features(name: str, form: LayerForm, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return (out, in) of a layer, from the shapes of its parts in a checkpoint."""
    parts = {key.removeprefix(f"{name}."): shape for key, shape in shapes.items() if key.startswith(f"{name}.")}
    try:
        if form.features is not None:
            features = form.features
        elif form.storage == DENSE:
            out_features, in_features = parts["weight"]
            # Conv1D stores its weight transposed; it always has a bias.
            is_transposed = parts.get("bias", (out_features,)) != (out_features,)
            features = (in_features, out_features) if is_transposed else (out_features, in_features)
        elif form.storage == "factored":
            features = (parts["up.weight"][0], parts["down.weight"][1])
        elif "rows.weight" in parts:
            features = (parts["rows.weight"][0] + parts["others.weight"][0], parts["rows.weight"][1])
        else:
            features = (parts["columns.weight"][0], parts["columns.weight"][1] + parts["others.weight"][1])
    except (KeyError, IndexError, ValueError):
        features = (0, 0)
    if form.rank > min(features):
        raise DamagedCheckpointError(
            f"{name}: config.json describes a {form.storage} layer of rank {form.rank}; the checkpoint holds {parts}. "
            "Download or export it again."
        )
    return features


def _with_numbers(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts block 10 after block 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
