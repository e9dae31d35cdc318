"""Which modules a config targets: one answer for `calibrate` and for `get_peft_model`."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING

from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_jactus.tuner.config import targets_all_linear
from peft_jactus.tuner.layer import JactusLayer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from peft_jactus.tuner.config import JactusConfig

DEFAULT_TARGET_MODULES = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
# By task type, names of the head that PEFT trains whole; it adds them to `modules_to_save` after layers are replaced.
HEAD_NAMES = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def targeted_modules(model: nn.Module, config: JactusConfig) -> dict[str, nn.Module]:
    """Return the modules that ``config`` targets, by full name, in the model's order; change neither.

    Raises:
        ValueError: If the targets are missing or match nothing. A `TypeError` names a module that has no factors.
    """
    config = _resolve_shorthand(model, config)
    modules = dict(model.named_modules())
    adapted = tuple(name + "." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    targets: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if not name or name.startswith(adapted):
            continue
        matched = check_target_module_exists(config, name)
        if matched and not isinstance(matched, _ExcludedModule):
            parent = modules[name.rpartition(".")[0]]
            check_supported(name, module, parent)
            targets[name] = module
    if not targets:
        raise ValueError(
            f"`target_modules`={config.target_modules!r} matches no module of {type(model).__name__}. Use "
            "'all-linear', or names from `model.named_modules()`."
        )
    return targets


def head_names(config: JactusConfig) -> tuple[str, ...]:
    """Return the last parts of the names of modules that are trained whole: the user's, and those of the task."""
    return (*(config.modules_to_save or ()), *HEAD_NAMES.get(str(config.task_type).rpartition(".")[2], ()))


def resolve_all_linear_(config: JactusConfig, model: nn.Module) -> None:
    """Replace ``target_modules="all-linear"`` by names: of all linear layers, but for heads and some subclasses.

    PEFT's own rule keeps the output layer of language models and, for one of the tasks, that of classifiers. Quantized
    layers stay in, so that they are refused by name.
    """
    if not targets_all_linear(config.target_modules):
        return
    _maybe_include_all_linear_layers(config, model)  # in place
    heads = set(head_names(config))
    config.target_modules = {
        name
        for name in config.target_modules or ()
        if heads.isdisjoint(name.split(".")) and not _has_own_forward(model.get_submodule(name))
    }


def _is_quantized(module: nn.Linear | Conv1D) -> bool:
    return resolve_quantization_backend(module) is not None or not module.weight.is_floating_point()


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a layer computes something else than its product: routers of experts do, grouped linear layers do."""
    if not isinstance(module, (nn.Linear, Conv1D)) or _is_quantized(module):
        return False
    return type(module).forward not in (nn.Linear.forward, Conv1D.forward)


def _resolve_shorthand(model: nn.Module, config: JactusConfig) -> JactusConfig:
    """Return a copy of ``config`` whose ``target_modules`` are names, as `get_peft_model` will resolve them."""
    resolved = copy.copy(config)
    if resolved.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        defaults = DEFAULT_TARGET_MODULES.get(str(model_type))
        if defaults is None:
            raise ValueError(
                f"`target_modules` must be given for {model_type or type(model).__name__}: PEFT knows no default "
                "for it. Use 'all-linear', or names from `model.named_modules()`."
            )
        resolved.target_modules = set(defaults)
    resolve_all_linear_(resolved, model)
    return resolved


def check_supported(name: str, module: nn.Module, parent: nn.Module) -> None:
    """Raise `TypeError` if ``module`` cannot be replaced by factors; say why and what to do."""
    if isinstance(module, JactusLayer):
        return
    if isinstance(module, BaseTunerLayer):
        raise TypeError(
            f"{name} already carries a {type(module).__module__}.{type(module).__name__}. Merge that adapter first "
            "(`merge_and_unload`), or add the name to `exclude_modules`."
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(
            f"{name} belongs to an nn.MultiheadAttention, which reads its weight and never calls it. Add the name to "
            "`exclude_modules`."
        )
    if isinstance(module, (nn.Linear, Conv1D)):
        if _is_quantized(module):
            raise TypeError(
                f"{name} is quantized ({type(module).__name__}). Load the model in bf16, fp16 or fp32, compress it, "
                "and quantize the result; or add the name to `exclude_modules`."
            )
        if _has_own_forward(module):
            raise TypeError(
                f"{name} is a {type(module).__name__}, which computes more than the product with its weight: factors "
                "would lose that. Add the name to `exclude_modules`."
            )
        if module.weight.is_meta and not has_offloaded_params(module):
            raise TypeError(
                f"{name} has no weight in memory (device 'meta'). Load the model with its weights; an adapter only "
                "loads onto a model without offloaded layers."
            )
        return
    raise TypeError(
        f"{name} is a {type(module).__name__}; only torch.nn.Linear and transformers' Conv1D can be factorized. "
        "Add the name to `exclude_modules`, or make `target_modules` more specific."
    )


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a Linear or Conv1D, adapted or not, as ``(out, in)``, detached.

    That of an offloaded layer has values in `weight_loaded` only.
    """
    module = _base(module)
    weight: Tensor = module.weight.detach()  # type: ignore[operator]  # checked by check_supported
    return weight.mT if isinstance(module, Conv1D) else weight


def dense_weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight, as `dense_weight` does, and bias ``(out,)``, detached."""
    bias = getattr(_base(module), "bias", None)
    return dense_weight(module), None if bias is None else bias.detach()


def features_of(module: nn.Module) -> tuple[int, int]:
    """Return ``(out, in)`` of a Linear or Conv1D, adapted or not, whose weight may be gone."""
    if isinstance(module, JactusLayer):
        return module.out_features, module.in_features
    out_features, in_features = dense_weight(module).shape
    return out_features, in_features


def weight_loaded(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a layer that accelerate has offloaded has its weight on the device that it runs on."""
    module = _base(module)
    if has_offloaded_params(module) and dense_weight(module).is_meta:
        context: contextlib.AbstractContextManager[None] = align_module_device(module)
        return context
    return contextlib.nullcontext()


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def match_ranks(names: Iterable[str], rank_pattern: dict[str, int]) -> dict[str, int]:
    """Return the ranks that ``rank_pattern`` gives to ``names``: exact names first, then regular expressions."""
    ranks: dict[str, int] = {}
    for name in names:
        key = name if name in rank_pattern else get_pattern_key(list(rank_pattern), name)
        if key in rank_pattern:
            ranks[name] = rank_pattern[key]
    return ranks
