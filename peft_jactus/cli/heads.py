"""The base model of an adapter: with a head of the shape that was trained, which its checkpoint may not have."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig

from peft_jactus.cli.hub import load_model_config
from peft_jactus.tuner.label_names import noted_label_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

    from peft_jactus.tuner.config import JactusConfig

_ROOT = "base_model.model."
_Shapes = dict[str, tuple[int, ...]]


def load_base(model_class: Any, config: JactusConfig, tensors: Mapping[str, tuple[int, ...]]) -> PreTrainedModel:
    """Load the base model of an adapter, in its own dtype.

    Args:
        model_class: One of transformers' classes, or an auto class.
        config: Of the adapter.
        tensors: Shapes of the adapter's tensors, by their names in the file.

    Returns:
        The model. Where the adapter holds a head, it has as many labels as that; a `UserWarning` says if their names
        are not known.

    Raises:
        ValueError: If tensors that the adapter holds whole fit the base model for no number of labels, or the
            checkpoint has others of another shape.
    """
    name = str(config.base_model_name_or_path)
    whole = {key.removeprefix(_ROOT): shape for key, shape in tensors.items() if ".jactus_" not in key}
    options = _label_options(model_class, config, whole)
    model, report = model_class.from_pretrained(name, dtype="auto", output_loading_info=True, **options)
    unlike = sorted({key for key, *_ in report["mismatched_keys"]} - set(whole))
    if unlike:
        raise ValueError(
            f"{name} has other shapes than a {type(model).__name__} with {model.num_labels} labels, in {unlike[:5]}, "
            "which the adapter does not hold. Give the base model that it was trained on."
        )
    return cast("PreTrainedModel", model)


def _label_options(model_class: Any, config: JactusConfig, whole: _Shapes) -> dict[str, Any]:
    name = str(config.base_model_name_or_path)
    base_labels = load_model_config(name).num_labels or 0
    num_labels = _num_labels(model_class, name, whole) if whole else base_labels
    names = noted_label_names(config, num_labels)
    options: dict[str, Any] = {}
    if names is not None:
        options = {"id2label": names, "label2id": {label: number for number, label in names.items()}}
    if num_labels == base_labels:
        return options
    if names is None:
        warnings.warn(
            f"The adapter's head has {num_labels} classes and {name} has {base_labels}. Nothing says what "
            "they are called, so they are LABEL_0, LABEL_1 and so on: set `id2label` and `label2id` in config.json.",
            stacklevel=2,
        )
    return {"num_labels": num_labels, "ignore_mismatched_sizes": True, **options}


def _num_labels(model_class: Any, name: str, whole: _Shapes) -> int:
    """Return the number of labels with which a model has tensors of these shapes."""
    config = AutoConfig.from_pretrained(name)
    misfits = _misfits(model_class, config, whole)
    if not misfits:
        return config.num_labels or 0
    for number in sorted({size for found, expected in misfits.values() for size in set(found) - set(expected)}):
        if not _misfits(model_class, AutoConfig.from_pretrained(name, num_labels=number), whole):
            return number
    key, (found, expected) = next(iter(misfits.items()))
    raise ValueError(
        f"The adapter holds {key} of shape {list(found)}; in {name} it is {list(expected)}, and another number of "
        "labels does not help. Load the model as it was in training (its head, resized embeddings), then the adapter "
        "(`PeftModel.from_pretrained`), and call `peft_jactus.export_compressed`."
    )


def _misfits(
    model_class: Any, config: PreTrainedConfig, whole: _Shapes
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the adapter's and the model's shape of each tensor where they differ."""
    build = getattr(model_class, "from_config", None) or model_class
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in build(config).state_dict().items()}
    return {key: (shape, shapes[key]) for key, shape in whole.items() if shapes.get(key, shape) != shape}
