"""Names of classes: a model's config has them, and an adapter's config keeps them beside the head that was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import PreTrainedConfig

    from peft_jactus.tuner.config import JactusConfig


def _are_made_up(names: Mapping[Any, str] | None) -> bool:
    """Whether nobody has named the classes, and transformers did."""
    return all(name == f"LABEL_{number}" for number, name in (names or {}).items())


def note_label_names_(config: JactusConfig, model: nn.Module) -> None:
    """Write the names of a model's classes into the config of its adapter, if that holds a head.

    A loaded adapter keeps the names that it has if the model has none of its own.
    """
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not config.modules_to_save or not isinstance(names, dict):
        config.id2label = None
    elif not (config.from_checkpoint and config.id2label and _are_made_up(names)):
        config.id2label = dict(names)


def noted_label_names(config: JactusConfig, num_labels: int) -> dict[int, str] | None:
    """Return the names in an adapter's config, if there are names of so many classes."""
    names = {int(number): name for number, name in (config.id2label or {}).items()}  # JSON has words for numbers
    return names if sorted(names) == list(range(num_labels)) else None


def restore_label_names_(model_config: PreTrainedConfig, config: JactusConfig) -> None:
    """Give a model's config the names in its adapter's config, if it has none of its own."""
    names = noted_label_names(config, getattr(model_config, "num_labels", 0))
    if names is not None and _are_made_up(model_config.id2label):
        model_config.id2label = names
        model_config.label2id = {name: number for number, name in names.items()}
