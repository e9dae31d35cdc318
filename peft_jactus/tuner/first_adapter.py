"""The first adapter of a model: what is checked before dense weights are let go of, what is put back if it fails."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_jactus.tuner.checkpoint_checks import (
    ROOT,
    check_heads_in_file,
    check_others_in_file,
    checked_rank,
    tensors_by_layer,
)
from peft_jactus.tuner.config_checks import check_can_be_made
from peft_jactus.tuner.dense_layers import FreedBase
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.snapshot import Snapshot
from peft_jactus.tuner.targeting import saved_layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from peft_jactus.tuner.config import JactusConfig


def check_generates(model: nn.Module, config: JactusConfig) -> None:
    """Raise `ValueError` if ``model`` lacks the method that PEFT asks for once the layers are replaced."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"`task_type`={str(config.task_type)!r} is for models that generate text, and {type(model).__name__} does "
            "not: it has no `prepare_inputs_for_generation`. Set the task type of your model, 'SEQ_CLS' for a "
            "classifier of texts; or None."
        )


def check_file(
    model: nn.Module, config: JactusConfig, adapter_name: str, tensors: Mapping[str, Tensor], *, any_shape: bool
) -> None:
    """Check an adapter's file against the model that it will be loaded onto.

    A `ValueError` says if it is of another model, or lacks something.

    Args:
        model: Dense, or with other adapters.
        config: Of the saved adapter.
        adapter_name: Its name.
        tensors: What the file holds; only shapes are looked at.
        any_shape: Whether what is trained whole may have other shapes, and is then left out.
    """
    check_can_be_made(config)  # of another format, all the rest would be misread
    layers = saved_layers(model, config)
    found = tensors_by_layer(tensors, layers, adapter_name)
    for name, layer in layers.items():
        checked_rank(name, layer, found[name], config)
    check_heads_in_file(model, config, adapter_name, {name.removeprefix(ROOT) for name in tensors})
    if not any_shape:
        check_others_in_file(model, tensors)


@contextmanager
def put_back_if_it_fails(model: nn.Module, config: JactusConfig) -> Iterator[None]:
    """Leave a model and a config as they were if making or loading the first adapter raises.

    Dense weights that were let go of are gone: to hold all of them until the end would take the memory of two models.
    Their layers raise where they are called.
    """
    fields = [(name, value, _copied(value)) for name, value in vars(config).items()]
    # The layers whose weights go: nothing of them may be held, and nothing else of them changes.
    dense = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    before = Snapshot(model, except_for=dense)
    try:
        yield
    except BaseException:
        freed = dict(_freed_bases(model))
        before.put_back()
        for name, base in freed.items():
            if model.get_submodule(name)._parameters.get("weight", base) is None:
                base.lost_name = name
                model.set_submodule(name, base)
        _put_fields_back(config, fields)
        raise


def _freed_bases(model: nn.Module) -> Iterator[tuple[str, FreedBase]]:
    """Yield what stands in adapted layers, or in their place, for dense weights that are gone."""
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, JactusLayer) else module
        if isinstance(base, FreedBase) and not name.endswith(".base_layer"):
            yield name, base


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list, set) else None


def _put_fields_back(config: JactusConfig, fields: list[tuple[str, Any, Any]]) -> None:
    vars(config).clear()
    for name, value, content in fields:
        if content is not None:  # PEFT adds to the user's list in place
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
        setattr(config, name, value)
