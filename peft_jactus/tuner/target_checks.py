"""Which layers of a model factors can replace, and why others can't."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peft_jactus.tuner.base_weights import READABLE, quantization_of
from peft_jactus.tuner.held_aside import find_held
from peft_jactus.tuner.layer import JactusLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

# Inputs of these sizes show whether a layer clips, rounds, or is linear only in part.
_PROBE_SCALES = (1e-3, 1.0, 1e3)
# In units of rounding: different orders of summation.
_PROBE_TOLERANCE = 32
# Of those that match nothing, so many are shown.
_MAX_NAMES = 10


@dataclass(frozen=True)
class Refusal:
    """Why a layer can't be replaced.

    Attributes:
        reason: What follows the layer's name, and what to do, in full sentences.
        always: Whether ``target_modules="all-linear"`` is refused for it, too, instead of leaving the layer dense:
            where the model came in a state in which none of its layers may be compressible.
    """

    reason: str
    always: bool = False


def unmatched_names(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Return those of ``names`` that match no module, the first ones with the names of layers that are most like them.

    A name matches as in a list of ``target_modules``: it is a whole name, or its last parts.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    layers = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer))]
    endings: dict[int, set[str]] = {}  # by number of parts
    unmatched: dict[str, list[str]] = {}
    for name in sorted(names):
        num_parts = name.count(".") + 1
        if num_parts not in endings:
            endings[num_parts] = {_last_parts(other, num_parts) for other in modules}
        if name not in endings[num_parts]:
            is_shown = len(unmatched) < _MAX_NAMES
            candidates = {_last_parts(layer, num_parts) for layer in layers} if is_shown else ()
            unmatched[name] = difflib.get_close_matches(name, sorted(candidates))
    return unmatched


def _last_parts(name: str, number: int) -> str:
    return ".".join(name.split(".")[-number:])


def describe_unmatched(unmatched: Mapping[str, list[str]]) -> str:
    """Return the first ones of `unmatched_names`, each with what is like it."""
    shown = list(unmatched.items())[:_MAX_NAMES]
    texts = [f"{name!r} (similar: {', '.join(similar)})" if similar else repr(name) for name, similar in shown]
    return ", ".join([*texts, *([f"and {len(unmatched) - len(shown)} more"] if len(unmatched) > len(shown) else [])])


def used_elsewhere(model: nn.Module) -> dict[str, Refusal]:
    """Return, by name, linear layers that ``model`` also uses from other places than theirs, so that none can go."""
    return {**_held_aside(model), **_sharing_a_weight(model)}


def _sharing_a_weight(model: nn.Module) -> dict[str, Refusal]:
    """Return the layers whose weight stands in several places."""
    places: dict[object, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight") if isinstance(module, (nn.Linear, Conv1D)) else None
        if weight is not None:
            # Two parameters of one memory count as one; without memory (device 'meta', ZeRO-3), one object does.
            in_memory = not weight.is_meta and weight.data_ptr() != 0
            here = (weight.device, weight.data_ptr(), weight.numel()) if in_memory else id(weight)
            places.setdefault(here, []).append(name.removesuffix(".base_layer"))
    return {
        name: Refusal(
            f"shares its weight with {', '.join(other for other in names if other != name)}: factors for each layer "
            "would take more memory, not less, and each would learn separately. Add all of them to `exclude_modules`."
        )
        for names in places.values()
        if len(names) > 1
        for name in names
    }


def _held_aside(model: nn.Module) -> dict[str, Refusal]:
    """Return the layers that are, or whose weight is, also somewhere else, where nothing is replaced."""
    found = {}
    for name, held in find_held(model).items():
        holder = f"`{held.attribute}` of {held.holder or 'the model'}, a {held.kind}"
        if held.is_weight:
            reason = (
                f"has a weight that is also held by {holder}: the model may read or change it there, without calling "
                "the layer. Add the name to `exclude_modules`; in your own class, keep a copy (`clone`), or call the "
                "layer."
            )
        else:
            reason = (
                f"is also held by {holder}, outside of its registered modules: the model may call it from there "
                "instead of its replacement. Add the name to `exclude_modules`; in your own class, use nn.ModuleList."
            )
        found[name] = Refusal(reason)
    return found


def ties_to_break(model: nn.Module, names: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return which of a transformers model's tied weights ``names`` would untie, and those that would stay tied.

    Args:
        model: Any.
        names: Of modules that get weights of their own.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    broken = {
        key: source for key, source in tied.items() if any(part.rpartition(".")[0] in names for part in (key, source))
    }
    return broken, {key: source for key, source in tied.items() if key not in broken}


def find_refusal(name: str, module: nn.Module, parent: nn.Module, elsewhere: Mapping[str, Refusal]) -> Refusal | None:
    """Return why factors can't replace ``module``, or None if they can.

    Args:
        name: Of the module.
        module: Any.
        parent: That holds it.
        elsewhere: `used_elsewhere` of the model.
    """
    if name in elsewhere:
        return elsewhere[name]
    if isinstance(module, JactusLayer):
        return None
    if isinstance(module, BaseTunerLayer):
        return Refusal(
            f"already carries a {type(module).__module__}.{type(module).__name__}. Merge that adapter first "
            "(`merge_and_unload`), or add the name to `exclude_modules`.",
            always=True,
        )
    if any(hasattr(type(layer), "weight_is_hidden") for layer in (module, parent)):  # a `deployment.HiddenWeight`
        return Refusal(
            "is compressed already, or is a part of a layer that is. To compress it anew, load the model under "
            "`loading_options(dense=True)`. To keep it as it is, add the name to `exclude_modules`, or make "
            "`target_modules` more specific.",
            always=True,
        )
    if isinstance(parent, nn.MultiheadAttention):
        return Refusal(
            "belongs to an nn.MultiheadAttention, which reads its weight and never calls it. Add the name to "
            "`exclude_modules`."
        )
    if not isinstance(module, (nn.Linear, Conv1D)):
        return Refusal(
            f"is a {type(module).__name__}; only torch.nn.Linear and transformers' Conv1D can be factorized. Add the "
            "name to `exclude_modules`, or make `target_modules` more specific.",
            always=True,
        )
    return _refusal_of_linear(module)


def _refusal_of_linear(module: nn.Linear | Conv1D) -> Refusal | None:
    if module._parameters.get("weight") is None:
        return Refusal(
            "has a weight that is computed from other tensors (by a parametrization, weight or spectral norm, or "
            "pruning). Make it a plain parameter (torch.nn.utils.parametrize.remove_parametrizations, "
            "remove_weight_norm, remove_spectral_norm, prune.remove), or add the name to `exclude_modules`."
        )
    library = quantization_of(module)
    if library not in {None, *READABLE}:
        return Refusal(
            f"is quantized ({type(module).__name__}), and its weight can't be read back. Load the model in bf16, fp16 "
            "or fp32, or in 8 or 4 bits with bitsandbytes or torchao; or add the name to `exclude_modules`.",
            always=True,
        )
    if library is None and not _is_plain_product(module):
        return Refusal(
            f"is a {type(module).__name__}, which computes more than the product with its weight: factors would lose "
            "the rest. Add the name to `exclude_modules`."
        )
    if module.weight.is_meta and not has_offloaded_params(module):
        return Refusal(
            "has no weight in memory (device 'meta'). Load the model with its weights; an adapter only loads onto a "
            "model without offloaded layers.",
            always=True,
        )
    return None


def _is_plain_product(module: nn.Linear | Conv1D) -> bool:
    """Whether a layer computes ``x W^T + b`` and nothing else, whatever its class is called."""
    # Routers of experts and grouped linear layers compute more. A class with a forward of its own is tried.
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    return not module.weight.is_meta and all(_agrees_with_product(module, scale) for scale in _PROBE_SCALES)


@torch.no_grad()
def _agrees_with_product(module: nn.Linear | Conv1D, scale: float) -> bool:
    weight = module.weight.mT if isinstance(module, Conv1D) else module.weight
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(2, 3, weight.shape[1], generator=generator)
    x = x.to(weight)
    forward: Callable[..., object] = type(module).forward  # without hooks
    try:
        output = forward(module, x)
    except Exception:  # noqa: BLE001  # somebody's forward may want other inputs, and raise anything for these
        return False
    expected = functional.linear(x, weight, module.bias)
    if not isinstance(output, torch.Tensor) or output.shape != expected.shape or output.dtype != expected.dtype:
        return False
    difference = torch.linalg.vector_norm((output - expected).double())
    size = torch.linalg.vector_norm(expected.double())
    return bool(difference <= _PROBE_TOLERANCE * torch.finfo(weight.dtype).eps * size)


def refusal_of_head(module: nn.Module) -> Refusal | None:
    """Return why a module that an adapter trains whole can't be, or None if it can."""
    if (library := quantization_of(module)) is None:
        return None
    return Refusal(
        "would be trained whole together with the adapter (`modules_to_save`, and the head of `task_type`), but "
        f"{library} has quantized it. Load the model without quantizing this module: `llm_int8_skip_modules` of "
        "BitsAndBytesConfig, `modules_to_not_convert` of TorchAoConfig."
    )


def raise_refusals(refusals: Mapping[str, Refusal]) -> None:
    """Raise one `TypeError` for all of them."""
    raise TypeError("\n".join(f"{name} {refusal.reason}" for name, refusal in refusals.items()))


def describe(refusals: Mapping[str, Refusal]) -> str:
    """Return a line for each reason, without the advice, which is for layers that were asked for."""
    by_reason: dict[str, list[str]] = {}
    for name, refusal in refusals.items():
        by_reason.setdefault(refusal.reason.split(". ")[0], []).append(name)
    return "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in by_reason.items())
