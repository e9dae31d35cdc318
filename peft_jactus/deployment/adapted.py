"""Finding the transformers model that an adapter is on, in what a user trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from peft_jactus.tuner.config import JactusConfig
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.quantized_bases import check_readable
from peft_jactus.tuner.targeting import pipeline_class

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Adapted:
    """A transformers model with a JACTUS adapter, and where it was found.

    Attributes:
        base: The transformers model.
        holder: What the adapter was put on, and has the table of ranks: a `PeftModel`, or ``base``.
        prefix: What the names in the adapter's config begin with, before those in ``base``.
        config: Of the adapter.
        adapter_name: Of the adapter.
        pipeline: The sentence-transformers model around it, if there is one.
        path: The name of what holds ``base`` in ``pipeline``.
    """

    base: PreTrainedModel
    holder: nn.Module
    prefix: str
    config: JactusConfig
    adapter_name: str
    pipeline: nn.Module | None = None
    path: str = ""


def find_adapted(model: nn.Module) -> Adapted:
    """Return the one transformers model in ``model`` that has a JACTUS adapter.

    Raises:
        ValueError: If there is no adapter, more than one active one, or several such models.
        TypeError: If the adapter is on something else than a transformers model, or on one with weights that are
            quantized and can't be read.
    """
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    if not _has_jactus_layers(root):
        raise ValueError(
            "`model` has no JACTUS layers. Give the model that `get_peft_model` or `PeftModel.from_pretrained` "
            "returned. If the model is already compressed, save it with `save_pretrained`."
        )
    if isinstance(root, PreTrainedModel):
        return _adapted(root, model)
    if pipeline_class(root) is None:
        raise TypeError(
            f"Only transformers models have compressed checkpoints; got a {type(root).__name__}. `merge_and_unload` "
            "gives plain layers for any model."
        )
    path, part = _only_part(root)
    base = part.get_base_model() if isinstance(part, PeftModel) else part
    assert isinstance(base, PreTrainedModel)
    if hasattr(part, "peft_config"):
        return _adapted(base, part, pipeline=root, path=path)
    return _adapted(base, model, prefix=f"{path}.", pipeline=root, path=path)  # the adapter was put on the whole


def _adapted(base: PreTrainedModel, holder: nn.Module, **where: Any) -> Adapted:
    # As transformers' `active_adapters` does, which from 5.24 on refuses every PEFT before 0.22.
    tuner_layer = next(module for module in base.modules() if isinstance(module, BaseTunerLayer))
    active: list[str] = holder.active_adapters if isinstance(holder, PeftModel) else tuner_layer.active_adapters
    config = cast("dict[str, Any]", holder.peft_config)[active[0]]
    if len(active) != 1 or not isinstance(config, JactusConfig):
        raise ValueError(f"One JACTUS adapter must be active; got {active}. Use `set_adapter`.")
    check_readable(base)
    return Adapted(base, holder, config=config, adapter_name=active[0], **{"prefix": "", **where})


def _only_part(pipeline: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the module of the transformers model that is adapted, with the `PeftModel` around it."""
    found: dict[str, nn.Module] = {}
    for name, module in pipeline.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if is_inside or not isinstance(module, PeftModel | PreTrainedModel) or not _has_jactus_layers(module):
            continue
        # Assigned to the old name `auto_model`, a PeftModel stands beside the model that is in it, and that runs.
        if not (isinstance(module, PeftModel) and module.get_base_model() in found.values()):
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"One transformers model in the {type(pipeline).__name__} must have JACTUS layers; these have: "
            f"{list(found)}. Export each one separately: `export_compressed(model.get_submodule(name), ...)`."
        )
    return next(iter(found.items()))


def _has_jactus_layers(model: nn.Module) -> bool:
    return any(isinstance(module, JactusLayer) for module in model.modules())
