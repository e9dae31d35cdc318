"""Names of classes: a model's config has them, and an adapter's config keeps them beside the head that was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from peft_jactus.tuner.config import JactusConfig


def given_label_names(config: object) -> dict[int, str] | None:
    """Return the names of classes in a model's config; ``None`` if there are none, or transformers made them up."""
    names = getattr(config, "id2label", None)
    if not isinstance(names, dict) or all(name == f"LABEL_{number}" for number, name in names.items()):
        return None
    return dict(names)


def note_label_names_(config: JactusConfig, model: nn.Module) -> None:
    """Write the names of a model's classes into the config of its adapter; a loaded one keeps those that it has."""
    names = given_label_names(getattr(model, "config", None))
    if names is not None or not config.from_checkpoint:
        config.id2label = names


def noted_label_names(config: JactusConfig, num_labels: int) -> dict[int, str] | None:
    """Return the names in an adapter's config, if there are names of so many classes."""
    names = {int(number): name for number, name in (config.id2label or {}).items()}  # JSON has words for numbers
    return names if sorted(names) == list(range(num_labels)) else None


def restore_label_names_(model_config: PreTrainedConfig, config: JactusConfig) -> None:
    """Give a model's config the names in its adapter's config, if it has none of its own."""
    names = noted_label_names(config, getattr(model_config, "num_labels", 0))
    if names is not None and given_label_names(model_config) is None:
        model_config.id2label = names
        model_config.label2id = {name: number for number, name in names.items()}
