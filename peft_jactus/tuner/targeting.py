"""Which modules a config targets: one answer for `calibrate` and for `get_peft_model`."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
from typing import TYPE_CHECKING, cast

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_jactus.tuner.base_weights import dense_dtype, float_weight, layer_features
from peft_jactus.tuner.config_checks import check_config, targets_all_linear
from peft_jactus.tuner.dense_layers import check_not_lost
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.tuner.quantized_bases import check_method, check_not_extended
from peft_jactus.tuner.target_checks import (
    Refusal,
    describe,
    describe_unmatched,
    find_refusal,
    raise_refusals,
    refusal_of_head,
    ties_to_break,
    unmatched_names,
    used_elsewhere,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from peft_jactus.tuner.config import JactusConfig

logger = logging.getLogger(__name__)

DEFAULT_TARGET_MODULES = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
# By task type, names of fresh heads that PEFT does not know: BART's; those of XLNet and XLM.
FURTHER_HEAD_NAMES = {"SEQ_CLS": ("classification_head", "logits_proj", "sequence_summary")}
# By task type, names of the head that is trained whole. PEFT adds its own ones to `modules_to_save` after layers are
# replaced, `add_further_heads_` the others.
HEAD_NAMES = {
    "SEQ_CLS": ("classifier", "score", *FURTHER_HEAD_NAMES["SEQ_CLS"]),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def targeted_modules(model: nn.Module, config: JactusConfig) -> dict[str, nn.Module]:
    """Return the modules that ``config`` targets, by full name, in the model's order; change neither.

    Raises:
        ValueError: If the targets are missing or match nothing, or a field was set to what it cannot have. A
            `TypeError` names a module that has no factors, or a quantized one that can't be used, or says that the
            model is a routed one.
    """
    check_config(config)
    check_not_lost(model)
    check_method(model)
    check_not_extended(model)
    asked, config = config.target_modules, _resolve_shorthand(model, config)
    modules = dict(model.named_modules())
    heads, elsewhere = head_names(config), used_elsewhere(model)
    check_heads(model, config)
    targets = _matched(modules, config)
    refusals: dict[str, Refusal] = {}
    for name, module in targets.items():
        refusal = find_refusal(name, module, modules[name.rpartition(".")[0]], elsewhere)
        if refusal is None and is_trained_whole(name, heads):
            refusal = Refusal(
                f"is targeted, but PEFT would train it whole, because its name ends with one of {sorted(heads)} "
                "(`modules_to_save`, and the head of `task_type`). Add it to `exclude_modules`."
            )
        if refusal is not None:
            refusals[name] = refusal
    if refusals:
        raise_refusals(refusals)
    if not targets and targets_all_linear(asked):
        raise ValueError(
            f"{type(model).__name__} has nothing to compress: apart from heads, `exclude_modules` and layers that "
            "stay dense, there is no linear layer that factors could replace."
        )
    if not targets:
        raise ValueError(
            f"`target_modules`={config.target_modules!r} matches no module of {type(model).__name__}. Use "
            "'all-linear', or names from `model.named_modules()`."
        )
    _warn_of_unmatched(model, asked)
    _warn_of_export(model, {*targets, *(name for name in modules if is_trained_whole(name, heads))})
    return targets


def _matched(modules: Mapping[str, nn.Module], config: JactusConfig) -> dict[str, nn.Module]:
    """Return those of a model's ``modules`` that ``config`` asks for, whether or not they can be replaced."""
    adapted = tuple(name + "." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    asked = (name for name in modules if name and not name.startswith(adapted) and _matches(config, name))
    return {name: modules[name] for name in asked}


def saved_layers(
    model: nn.Module, config: JactusConfig, elsewhere: Mapping[str, Refusal] | None = None
) -> dict[str, nn.Module]:
    """Return the layers of a saved adapter, by name, before the first one is replaced.

    Args:
        model: That it is loaded onto.
        config: The adapter's.
        elsewhere: `used_elsewhere` of the model, if it is known.

    Raises:
        ValueError: If the model has not the layers that the adapter has ranks for, or they are too small for them. A
            `TypeError` names a module that factors cannot replace.
    """
    check_not_lost(model)
    check_heads(model, config)
    modules = dict(model.named_modules())
    if missing := [name for name in sorted(config.layer_ranks) if name not in modules]:
        raise ValueError(
            f"{len(missing)} of the adapter's {len(config.layer_ranks)} layers were not found in the base model, a "
            f"{type(model).__name__}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. The adapter was "
            "made for another model: load it onto that one."
        )
    elsewhere = used_elsewhere(model) if elsewhere is None else elsewhere
    layers = _matched(modules, config)
    found = {
        name: find_refusal(name, layer, modules[name.rpartition(".")[0]], elsewhere) for name, layer in layers.items()
    }
    if refusals := {name: refusal for name, refusal in found.items() if refusal is not None}:
        raise_refusals(refusals)
    for name, layer in layers.items():
        saved_rank(config, name, layer)
    return layers


def saved_rank(config: JactusConfig, name: str, layer: nn.Module) -> int:
    """Return the rank that a saved adapter has in a layer; a `ValueError` says that it is of another model."""
    if name not in config.layer_ranks:
        raise ValueError(
            f"{name} is targeted, but the adapter's config has no rank for it in `layer_ranks`. The adapter was made "
            "for another model, or adapter_config.json was edited."
        )
    rank, shape = config.layer_ranks[name], features_of(layer)
    if rank > min(shape):
        raise ValueError(
            f"{name}: the adapter has rank {rank} here, but the model has a weight of shape {shape}. The adapter was "
            "made for another model: load it onto that one."
        )
    return rank


def _warn_of_unmatched(model: nn.Module, asked: Iterable[str] | str | None) -> None:
    """Say which names of a list match nothing. PEFT says it only where no name matches, as lists are shared."""
    names = set() if asked is None or isinstance(asked, str) else set(asked)
    # PEFT writes its own list into the config, which is for all models of a type.
    if unmatched := unmatched_names(model, names - set(_default_targets(model) or ())):
        log_once(
            f"These names in `target_modules` match no module of {type(model).__name__}, so nothing is compressed "
            f"for them: {describe_unmatched(unmatched)}. Correct them, or leave them out."
        )


def check_heads(model: nn.Module, config: JactusConfig) -> None:
    """Raise `TypeError` for modules that ``config`` trains whole, and can't, `ValueError` if it names none."""
    heads, asked = head_names(config), tuple(config.modules_to_save or ())
    if asked and not any(name.endswith(asked) for name, _ in model.named_modules()):
        raise ValueError(
            f"`modules_to_save`={list(asked)} (with PEFT's own names of the head of `task_type`) matches no module of "
            f"{type(model).__name__}. Use names from `model.named_modules()`, or another `task_type`."
        )
    found = {name: refusal_of_head(module) for name, module in model.named_modules() if is_trained_whole(name, heads)}
    if refusals := {name: refusal for name, refusal in found.items() if refusal is not None}:
        raise_refusals(refusals)


def pipeline_class(model: nn.Module) -> type | None:
    """Return the class of sentence-transformers that ``model`` is of, which is not imported for this."""
    classes = (cls for cls in type(model).__mro__ if cls.__module__.partition(".")[0] == "sentence_transformers")
    found = next(classes, None)
    return found if hasattr(found, "save_pretrained") else None


def _warn_of_export(model: nn.Module, changed: set[str]) -> None:
    """Say now what `export_compressed` would say after the training."""
    if not isinstance(model, PreTrainedModel) and pipeline_class(model) is None:
        log_once(
            f"`export_compressed` will not write a {type(model).__name__}: only models of transformers and "
            "sentence-transformers have compressed checkpoints. It can be trained, saved as an adapter, and merged."
        )
    broken, kept = ties_to_break(model, changed)
    if broken and kept:
        log_once(
            f"`export_compressed` will not write this adapter: it unties {broken}, while {kept} stay tied, and "
            "config.json has one switch for all ties. To export it, leave these layers out (`exclude_modules`, "
            "`modules_to_save`), or load the model with `tie_word_embeddings=False`."
        )


def _matches(config: JactusConfig, name: str) -> bool:
    matched = check_target_module_exists(config, name)
    return bool(matched) and not isinstance(matched, _ExcludedModule)


def head_names(config: JactusConfig) -> tuple[str, ...]:
    """Return what modules that are trained whole are called: the user's names, and those of the task's head."""
    return (*(config.modules_to_save or ()), *HEAD_NAMES.get(_task_of(config), ()))


def add_further_heads_(config: JactusConfig, model: nn.Module) -> None:
    """Add fresh heads of ``model`` that PEFT does not know to ``modules_to_save``."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    heads = [head for head in FURTHER_HEAD_NAMES.get(_task_of(config), ()) if head in names]
    held = list(config.modules_to_save or ())
    if new := [head for head in heads if head not in held]:
        config.modules_to_save = held + new


def _task_of(config: JactusConfig) -> str:
    return str(config.task_type).rpartition(".")[2]


def is_trained_whole(name: str, heads: Iterable[str]) -> bool:
    """Whether PEFT will train a module, or one that holds it, whole: where its name ends with one of ``heads``."""
    parts = name.split(".")
    paths = (".".join(parts[: length + 1]) for length in range(len(parts)))
    return any(path.endswith(head) for path, head in itertools.product(paths, heads))


def resolve_all_linear_(config: JactusConfig, model: nn.Module) -> None:
    """Replace ``target_modules="all-linear"`` by names: of all linear layers, but for heads, and what has no factors.

    PEFT's own rule keeps the output layer of language models and, for one of the tasks, that of classifiers. Quantized
    layers that can't be read stay in, so that they are refused by name. What else is left dense is logged, once.
    """
    if not targets_all_linear(config.target_modules):
        return
    _maybe_include_all_linear_layers(config, model)  # in place
    heads, elsewhere = head_names(config), used_elsewhere(model)
    targets, left_dense = set(), {}
    for name in config.target_modules or ():
        if is_trained_whole(name, heads):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        refusal = find_refusal(name, model.get_submodule(name), parent, elsewhere)
        if refusal is None or refusal.always:
            targets.add(name)
        elif _matches(config, name):
            left_dense[name] = refusal
    config.target_modules = targets
    if left_dense:
        log_once(
            "'all-linear' leaves these layers dense, as they cannot be factorized:\n"
            f"{describe(dict(sorted(left_dense.items())))}"
        )


@functools.lru_cache(maxsize=128)
def log_once(message: str) -> None:
    """Log a warning that was not logged before."""
    logger.warning(message)


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _default_targets(model: nn.Module) -> Sequence[str] | None:
    """Return PEFT's list for models of this type, if it has one."""
    return DEFAULT_TARGET_MODULES.get(str(_model_type(model)))


def _resolve_shorthand(model: nn.Module, config: JactusConfig) -> JactusConfig:
    """Return a copy of ``config`` whose ``target_modules`` are names, as `get_peft_model` will resolve them."""
    resolved = copy.copy(config)
    if resolved.target_modules is None:
        defaults = _default_targets(model)
        if defaults is None:
            raise ValueError(
                f"`target_modules` must be given for {_model_type(model) or type(model).__name__}: PEFT knows no "
                "default for it. Use 'all-linear', or names from `model.named_modules()`."
            )
        resolved.target_modules = set(defaults)
    resolve_all_linear_(resolved, model)
    return resolved


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a Linear or Conv1D, adapted or not, as ``(out, in)``, detached.

    That of an offloaded layer has values in `weight_loaded` only. That of a quantized one is computed at each call.
    """
    module = base_layer_of(module)
    weight = float_weight(module)
    return weight.mT if isinstance(module, Conv1D) else weight


@torch.no_grad()
def check_finite(targets: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError` naming all ``targets`` whose weights are not finite; one is loaded at a time."""
    if broken := [name for name, module in targets.items() if not _is_finite(module)]:
        raise ValueError(
            f"{', '.join(broken)}: the weight holds NaN or infinite numbers, so it cannot be approximated. Load the "
            "model again, from an undamaged checkpoint and, if they are too large for its dtype, in bf16 or fp32; or "
            "add the name to `exclude_modules`."
        )


def _is_finite(module: nn.Module) -> bool:
    with weight_loaded(module):
        return bool(torch.isfinite(dense_weight(module)).all())


def dense_weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight, as `dense_weight` does, and bias ``(out,)``, detached."""
    bias = getattr(base_layer_of(module), "bias", None)
    return dense_weight(module), None if bias is None else bias.detach()


def has_bias(module: nn.Module) -> bool:
    """Whether a Linear or Conv1D, adapted or not, whose weight may be gone, adds a bias."""
    return module.has_bias if isinstance(module, JactusLayer) else getattr(module, "bias", None) is not None


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return where the weight of a Linear or Conv1D, adapted or not, is, and its dtype once it is dense."""
    module = base_layer_of(module)
    return cast("Tensor", module.weight).device, dense_dtype(module)


def features_of(module: nn.Module) -> tuple[int, int]:
    """Return ``(out, in)`` of a Linear or Conv1D, adapted or not, whose weight may be gone."""
    if isinstance(module, JactusLayer):
        return module.out_features, module.in_features
    return layer_features(module)


def weight_loaded(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a layer that accelerate has offloaded has its weight on the device that it runs on."""
    module = base_layer_of(module)
    if has_offloaded_params(module) and cast("Tensor", module.weight).is_meta:
        context: contextlib.AbstractContextManager[None] = align_module_device(module)
        return context
    return contextlib.nullcontext()


def base_layer_of(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter is on, or ``module`` itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def match_ranks(names: Iterable[str], rank_pattern: dict[str, int]) -> dict[str, int]:
    """Return the ranks that ``rank_pattern`` gives to ``names``: exact names first, then regular expressions."""
    ranks: dict[str, int] = {}
    for name in names:
        key = name if name in rank_pattern else get_pattern_key(list(rank_pattern), name)
        if key in rank_pattern:
            ranks[name] = rank_pattern[key]
    return ranks
