"""Write a trained model as a compressed checkpoint: a normal Hub repository without dense targeted weights."""

from __future__ import annotations

import logging
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from torch import nn

from peft_jactus._progress import progress
from peft_jactus.deployment.adapted import find_adapted
from peft_jactus.deployment.arguments import (
    check_card_fields,
    check_dtype,
    check_processor,
    check_repo_id,
    check_shard_size,
)
from peft_jactus.deployment.atomic_folder import appearing_whole, check_target
from peft_jactus.deployment.config import LayerForm, is_export
from peft_jactus.deployment.copying import (
    cast_,
    dtype_in_checkpoint,
    forget_adapters_,
    structural_copy,
    take_layers_,
    untie_,
    unwrap_trained_modules_,
    with_submodule,
)
from peft_jactus.deployment.layers import FORMS, FactorizedLinear, LowRankLinear, PivotedLinear
from peft_jactus.deployment.model_card import write_model_card
from peft_jactus.deployment.plots import plot_ranks
from peft_jactus.deployment.quantization import Rounding
from peft_jactus.deployment.quantized_linear import QuantizedLinear
from peft_jactus.deployment.quantizer import attach_compression
from peft_jactus.deployment.ranks import rank_summary
from peft_jactus.errors import NumericalWarning
from peft_jactus.numerics.allocation import DENSE, Storage, stays_dense
from peft_jactus.tuner.checkpoint_checks import check_complete
from peft_jactus.tuner.dense_layers import make_dense_layer
from peft_jactus.tuner.label_names import restore_label_names_
from peft_jactus.tuner.quantized_bases import dequantize_
from peft_jactus.tuner.targeting import pipeline_class

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from peft_jactus.deployment.adapted import Adapted
    from peft_jactus.numerics.moments import LayerStatistics
    from peft_jactus.tuner.layer import JactusLayer

logger = logging.getLogger(__name__)

# Relative rounding error of a weight, above which something is wrong with its pivoted form. Measured in bfloat16,
# 384 to 4096 wide: 4e-3 to 1.3e-2, far less than what the higher rank gains; in float16 and float32 less.
_MAX_PIVOTED_ERROR = 2e-2


def export_compressed(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    storage: Storage | None = None,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    processor: PreTrainedTokenizerBase | ProcessorMixin | Any | None = None,
    max_shard_size: int | str = "5GB",
    metrics: Mapping[str, float] | None = None,
    datasets: str | list[str] | None = None,
    overwrite: bool = False,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    progress_bar: bool = True,
    **hub_kwargs: Any,
) -> Path:
    """Merge what was trained into the factors, and write them as a checkpoint without dense targeted weights.

    ``import peft_jactus; AutoModel*.from_pretrained(save_directory)`` loads the model; a SentenceTransformer is loaded
    by ``SentenceTransformer(save_directory)``. The directory is written whole or not at all. ``model`` does not
    change.

    Args:
        model: A `PeftModel` with a JACTUS adapter, trained or not, or a transformers model that loaded one. It can
            also be a `SentenceTransformer`, `CrossEncoder` or similar that contains such a model; it is written with
            all its modules.
        save_directory: Directory to write; it must be new or empty, unless ``overwrite``.
        storage: ``"pivoted"`` stores ``rank * (out + in - rank)`` numbers per layer, ``"factored"`` stores ``rank *
            (out + in)``. Default: the form in which the config's budget was counted.
        dtype: Dtype of the checkpoint; what the model's class keeps in float32 stays so, as in `from_pretrained`.
            Default: that of each part of the model.
        bits: 8 or 4: store the weights of the targeted layers in 8 or 4 bits per number, in groups of 64 with one
            scale each, and compute in ``dtype``. These weights can no longer be trained. 4 bits need bitsandbytes,
            also where the checkpoint is loaded.
        statistics: What `calibrate` returned (or `CalibrationStatistics.load`), to round to ``bits`` by the inputs of
            the layers. Without them, 8 bits lose a little more, and 4 bits several times as much, with a warning.
        processor: Tokenizer, image processor or processor to write with the model.
        max_shard_size: Largest file, as for `save_pretrained`.
        metrics: Results for the model card, for example ``trainer.evaluate()``.
        datasets: Hub names of the training data, for the model card.
        overwrite: Replace what is in ``save_directory``.
        push_to_hub: Also upload the directory.
        repo_id: Repository to upload to, ``user/name``. Default: the name of ``save_directory``.
        progress_bar: Show a bar over the layers.
        **hub_kwargs: For `huggingface_hub.HfApi`: ``token``, ``private``, ``commit_message``, ``revision``,
            ``create_pr``.

    Returns:
        ``save_directory``.

    Raises:
        TypeError: If the base model is neither a transformers model nor one of sentence-transformers, a part of it is
            quantized and can't be read, an argument has the wrong type, or ``hub_kwargs`` has an unknown name. A
            `ValueError` is raised if no JACTUS adapter or more than one is active, a weight is not finite, an adapted
            layer is tied in a way that a checkpoint cannot store, ``save_directory`` is not empty or contains the base
            model or the current directory, or ``max_shard_size`` or ``repo_id`` cannot be read.
    """
    target = Path(save_directory)
    check_target(target, overwrite=overwrite)
    unknown = set(hub_kwargs) - {"token", "private", "commit_message", "revision", "create_pr"}
    if unknown:
        raise TypeError(f"export_compressed() got unexpected keyword arguments {sorted(unknown)}.")
    check_dtype(dtype)
    check_shard_size(max_shard_size)
    check_processor(processor)
    check_card_fields(metrics, datasets)
    repository = check_repo_id(repo_id, target) if push_to_hub else None
    adapted = find_adapted(model)
    check_target(target, overwrite=overwrite, read=_origins(adapted))
    rounding = Rounding.checked(bits, statistics, adapted)
    compressed = _compress(adapted, rounding, storage=storage, dtype=dtype, progress_bar=progress_bar)
    with appearing_whole(target) as folder:
        _save(compressed, adapted, folder, max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        shared = rank_summary(adapted.holder, adapted.adapter_name).shared_parameters
        summary = replace(rank_summary(compressed), shared_parameters=shared)
        has_plot = _save_plot(compressed, folder / "ranks.png")
        write_model_card(
            folder,
            compressed.config,
            summary,
            metrics=metrics,
            datasets=datasets,
            plot="ranks.png" if has_plot else None,
            pipeline_class=None if adapted.pipeline is None else pipeline_class(adapted.pipeline),
        )
        for file in folder.rglob("*.safetensors"):  # safetensors makes files for one user
            shutil.copymode(folder / "README.md", file)
    if repository is not None:
        _upload(target, repository, **hub_kwargs)
    return target


def _origins(adapted: Adapted) -> dict[str, str]:
    """Return where the base model is, which the adapter goes on needing, by what an error calls it."""
    places = {
        "the adapter's base model": adapted.config.base_model_name_or_path,
        "the base model": adapted.base.config.name_or_path,
    }
    return {name: place for name, place in places.items() if place and not is_export(Path(place))}


def _save(compressed: PreTrainedModel, adapted: Adapted, folder: Path, max_shard_size: int | str) -> None:
    """Write the model, with what is around it."""
    if adapted.pipeline is None:
        compressed.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    # The pipeline has no such argument to hand on.
    sharded = partial(compressed.save_pretrained, max_shard_size=max_shard_size)
    vars(compressed)["save_pretrained"] = sharded
    pipeline: Any = with_submodule(adapted.pipeline, adapted.path, compressed)
    pipeline.save_pretrained(str(folder), create_model_card=False)


def _save_plot(model: nn.Module, path: Path) -> bool:
    try:
        plot_ranks(model).savefig(path, dpi=120)
    except ImportError:
        logger.info("No plot of the ranks: matplotlib is not installed.")
        return False
    return True


def _upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload compressed checkpoint",
    revision: str | None = None,
    create_pr: bool = False,
) -> None:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
    )


# -- the compressed model ---------------------------------------------------------------------------------


def compressed_copy(
    model: nn.Module,
    *,
    storage: Storage | None = None,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    progress_bar: bool = False,
) -> PreTrainedModel:
    """Return the model with deployed layers in place of adapted ones; arguments as for `export_compressed`.

    Tensors outside of the adapted layers are shared with ``model``, unless ``dtype`` changes them. ``model`` does not
    change.

    Raises:
        TypeError: If ``model`` is not a transformers model, or ``dtype`` is none that a checkpoint can have. A
            `ValueError` is raised if ``storage`` is unknown, and for the same reasons as in `export_compressed`.
    """
    check_dtype(dtype)
    adapted = find_adapted(model)
    if adapted.pipeline is not None:
        raise TypeError(
            "`compressed_copy` only copies transformers models; give it the one in this "
            f"{type(adapted.pipeline).__name__}: `model.get_submodule({adapted.path!r})`. `export_compressed` accepts "
            "the whole model."
        )
    rounding = Rounding.checked(bits, statistics, adapted)
    return _compress(adapted, rounding, storage=storage, dtype=dtype, progress_bar=progress_bar)


@torch.no_grad()
def _compress(
    adapted: Adapted, rounding: Rounding, *, storage: Storage | None, dtype: torch.dtype | None, progress_bar: bool
) -> PreTrainedModel:
    base, config = adapted.base, adapted.config
    storage = config.storage if storage is None else storage
    if storage not in FORMS:
        raise ValueError(f"`storage` must be one of {tuple(FORMS)}; got {storage!r}.")
    check_complete(adapted.holder, config, adapted.adapter_name, None, verb="exported")
    copied = structural_copy(base)
    forget_adapters_(copied)
    restore_label_names_(copied.config, config)
    layers = take_layers_(copied, adapted.adapter_name)
    untie_(copied, [*layers, *unwrap_trained_modules_(copied)])
    forms, conv1d_layers = {}, []
    for name, layer in progress(layers.items(), description="Folding", unit="layer", shown=progress_bar):
        pairs = rounding.bits is None  # their larger coefficients lose more in few bits
        own = layer.base_dtype if dtype is None else dtype_in_checkpoint(copied, f"{name}.weight", dtype)
        wide = rounding.dtype_before(own)
        deployed = _deployed_layer(name, layer, adapted.adapter_name, storage, wide, pairs=pairs)
        deployed = rounding.of(adapted.prefix + name, deployed, own)
        copied.set_submodule(name, deployed)
        forms[name] = _form(layer, deployed, config.layer_energy.get(adapted.prefix + name))
        conv1d_layers += [name] if layer.is_conv1d and forms[name].storage != DENSE else []
    _warn_if_untrained(layers.values(), adapted.adapter_name)
    dequantize_(copied)
    if dtype is not None:
        cast_(copied, dtype, beside=forms)
    attach_compression(
        copied,
        forms,
        conv1d_layers,
        retained_ratio=config.asked_ratio,
        base_model=_model_name(config.base_model_name_or_path or base.config.name_or_path),
    )
    _warn_if_over_budget(adapted, copied, storage)
    return copied


def _warn_if_over_budget(adapted: Adapted, compressed: PreTrainedModel, storage: Storage) -> None:
    planned = rank_summary(adapted.holder, adapted.adapter_name).retained_ratio
    kept, counted = rank_summary(compressed).retained_ratio, adapted.config.storage
    if storage != counted and kept > planned:
        warnings.warn(
            f"The ranks were chosen for `storage`={counted!r}, to keep {planned:.0%}. Stored {storage}, the "
            f"targeted layers keep {kept:.0%}, and layers that would grow stay dense. Compress with "
            f"`JactusConfig(storage={storage!r})` to meet the budget.",
            stacklevel=5,
        )


def _form(layer: JactusLayer, deployed: nn.Module, energy_kept: float | None) -> LayerForm:
    features = (layer.out_features, layer.in_features)
    storage, rank = DENSE, min(features)
    if isinstance(deployed, FactorizedLinear):
        storage, rank = deployed.storage, deployed.rank
    part = next(deployed.children(), deployed)
    if not isinstance(part, QuantizedLinear):
        return LayerForm(storage, rank, energy_kept)
    return LayerForm(storage, rank, energy_kept, part.bits, features)


def _warn_if_untrained(layers: Collection[JactusLayer], adapter_name: str) -> None:
    shapes = (layer.adapter_shapes.get(adapter_name) for layer in layers)
    if any(shape is not None and shape.space == "retained" for shape in shapes):
        return  # no rank was set aside
    held = (layer.jactus_adapt_up for layer in layers)
    adapting = [tensors[adapter_name] for tensors in held if adapter_name in tensors]
    if adapting and not any(bool(tensor.any()) for tensor in adapting):
        warnings.warn(
            "No adaptation rank was trained. The export leaves them out, so a part of the budget is not used. Train "
            "the model first; or compress with `JactusConfig(adaptation_rank=0)`, which uses all ranks for the "
            "weights.",
            NumericalWarning,
            stacklevel=5,
        )


def _model_name(name_or_path: str | None) -> str | None:
    """Return a Hub name as it is, and only the last part of a local path, which means nothing to others."""
    if not name_or_path:
        return None
    return Path(name_or_path).name if Path(name_or_path).exists() else name_or_path


def _deployed_layer(
    name: str, layer: JactusLayer, adapter_name: str, storage: Storage, dtype: torch.dtype, *, pairs: bool
) -> nn.Module:
    tensors = layer.adapter_tensors(adapter_name)
    for tensor_name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name}: `{tensor_name}` has no values in memory; load the model without offloading.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: `{tensor_name}` is not finite. The training diverged, or nothing was loaded.")
    left, core, right = layer.get_factors(adapter_name).joined()
    bias = tensors.get("jactus_bias")
    device = next(iter(tensors.values())).device
    if not stays_dense(layer.r[adapter_name], layer.out_features, layer.in_features, storage):
        factors = (left, core, right, bias)
        deployed: FactorizedLinear | None = FORMS[storage].from_factors(*factors, dtype=dtype, pairs=pairs)
        if isinstance(deployed, PivotedLinear):
            deployed = _pivoted_if_accurate(name, deployed, factors, dtype)
        if deployed is not None:
            return deployed.to(device)
    weight = (left @ core @ right.mT).to(device, dtype)
    return make_dense_layer(weight, None if bias is None else bias.to(dtype), is_conv1d=layer.is_conv1d)


def _pivoted_if_accurate(
    name: str, pivoted: PivotedLinear, factors: tuple[Tensor, Tensor, Tensor, Tensor | None], dtype: torch.dtype
) -> FactorizedLinear | None:
    """Return ``pivoted``, or with rows chosen one by one, or factors: what has a sound rounding error.

    ``None`` is for a layer whose factors would be larger than its dense weight.
    """
    left, core, right, _ = factors
    weight = left @ core @ right.mT
    norm = float(torch.linalg.norm(weight))

    def error(layer: FactorizedLinear) -> float:
        return float(torch.linalg.norm(layer.dense_weight() - weight))

    pivoted_error = error(pivoted)
    if pivoted_error > _MAX_PIVOTED_ERROR * norm:
        pivoted = PivotedLinear.from_factors(*factors, dtype=dtype, pairs=False)
        pivoted_error = error(pivoted)
    if pivoted_error <= _MAX_PIVOTED_ERROR * norm:
        return pivoted
    reason = f"{name}: stored pivoted in {dtype}, its weight would be off by {pivoted_error / norm:.1e}; it is stored"
    if stays_dense(pivoted.rank, pivoted.out_features, pivoted.in_features, "factored"):
        warnings.warn(f"{reason} as one dense weight.", NumericalWarning, stacklevel=6)
        return None
    factored = LowRankLinear.from_factors(*factors, dtype=dtype)
    factored_error = error(factored)
    if factored_error >= pivoted_error:
        return pivoted
    warnings.warn(
        f"{reason} factored, which takes {pivoted.rank**2:,} parameters more (error {factored_error / norm:.1e}).",
        NumericalWarning,
        stacklevel=6,
    )
    return factored
