"""Finds layers, and tensors in the memory of their weights, that a model also holds where no layer is replaced.

Lists and other attributes that torch does not register, buffers, further parameters, hooks, functions.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import types
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Set

# What every module has. Of this, buffers, parameters and hooks are looked at.
_OF_MODULES = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# How far to go from an attribute: a list in an object in a dict is three.
_DEPTH = 5
_CONTAINERS = (list, tuple, set, frozenset, deque)
_PLAIN = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device, torch.Size, types.ModuleType)
# Their objects hold weights to move, shard, train or save them (hooks of accelerate, optimizers, quantizers). An
# adapted layer keeps its dense weight beside a merged one.
_TOOLS = {
    *("accelerate", "bitsandbytes", "deepspeed", "lightning", "peft", "peft_jactus", "pytorch_lightning", "torch"),
    "torchao",
}


@dataclass(frozen=True)
class Held:
    """Where a layer is, besides its place.

    Attributes:
        attribute: That holds it.
        holder: Name of the module that has the attribute.
        kind: The holder's class.
        is_weight: Whether it is not the layer that is held, but its weight, or a part of it.
    """

    attribute: str
    holder: str
    kind: str
    is_weight: bool


def find_held(model: nn.Module) -> dict[str, Held]:
    """Return, by name, the linear layers of ``model`` that it also holds elsewhere, or whose weight it does."""
    modules = {id(module): name for name, module in model.named_modules()}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}
    weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}
    places = _Places({name: weight for name, weight in weights.items() if weight is not None})
    declared = _declared_ties(model)
    seen: dict[int, int] = {}
    found = {
        name.removesuffix(".base_layer"): Held(attribute, name, type(layer).__name__, is_weight=True)
        for name, layer in layers.items()
        for attribute in _HOOKS
        if any(map(_asks_for_weight, vars(layer)[attribute].values()))
    }
    for holder_name, holder in model.named_modules():
        for attribute, value in _attributes(holder, holder_name, declared):
            for item in _items_in(value, modules, seen):
                is_weight = not isinstance(item, nn.Module)
                names = (modules[id(item)],) if isinstance(item, nn.Module) else places.names_at(item)
                for name in names:
                    # A layer may hold its own, but for hooks: these do not run any more.
                    if name in layers and (name != holder_name or (is_weight and attribute in _HOOKS)):
                        held = Held(attribute, holder_name, type(holder).__name__, is_weight)
                        found.setdefault(name.removesuffix(".base_layer"), held)
    return found


def _attributes(holder: nn.Module, name: str, declared: Set[str]) -> Iterator[tuple[str, object]]:
    """Yield names and values of what may hold something aside."""
    for attribute, value in vars(holder).items():
        if attribute not in _OF_MODULES:
            yield attribute, value
    for attribute in _HOOKS:
        yield attribute, vars(holder)[attribute]
    yield from holder._buffers.items()
    # Weights in two linear layers, and of embeddings and output layers, are tied: that is looked at elsewhere.
    if not isinstance(holder, (nn.Linear, Conv1D, nn.Embedding, nn.EmbeddingBag)):
        prefix = f"{name}." if name else ""
        yield from (item for item in holder._parameters.items() if prefix + item[0] not in declared)


def _asks_for_weight(hook: Any) -> bool:
    """Whether the code of a layer's own hook has the word, as in ``module.weight.data.clamp_(-1, 1)``."""
    function = getattr(hook, "func", hook)  # of a partial one
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return "weight" in getattr(code, "co_names", ())


def _declared_ties(model: nn.Module) -> set[str]:
    """Return the parameters that a transformers model says are tied, and its embeddings, which those are tied to."""
    declared: set[str] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        tied: Mapping[str, str] = vars(module).get("all_tied_weights_keys") or {}
        declared.update(prefix + key for pair in tied.items() for key in pair)
    return declared


def _items_in(
    value: object, modules: Mapping[int, str], seen: dict[int, int]
) -> Iterator[nn.Module | Tensor | np.ndarray[Any, Any]]:
    """Yield the tensors, arrays, and modules of ``modules``, that can be reached from ``value``.

    Args:
        value: Any.
        modules: Names of the registered ones, by identity: they are looked at by themselves.
        seen: How much was left to go in objects that were passed, by their identity; updated.
    """
    stack = [(value, _DEPTH)]
    while stack:
        item, left = stack.pop()
        if isinstance(item, _PLAIN):
            continue
        if isinstance(item, (Tensor, np.ndarray)) or (isinstance(item, nn.Module) and id(item) in modules):
            yield item
        elif left > seen.get(id(item), 0):
            seen[id(item)] = left
            stack.extend((part, left - 1) for part in _parts_of(item))


def _parts_of(item: Any) -> Iterable[object]:
    """Return what a container, a function or an object refers to."""
    if isinstance(item, (dict, types.MappingProxyType)):
        return item.values()
    if isinstance(item, _CONTAINERS):
        return item
    if isinstance(item, functools.partial):
        return (item.func, item.args, item.keywords)
    if isinstance(item, types.MethodType):
        return (item.__func__, item.__self__)
    if isinstance(item, types.FunctionType):
        cells = map(_content_of, item.__closure__ or ())
        return (*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values())
    if not isinstance(item, nn.Module) and type(item).__module__.partition(".")[0] in _TOOLS:
        return ()
    # Also of a module that is not registered.
    return (*getattr(item, "__dict__", {}).values(), *_in_slots(item))


def _in_slots(item: object) -> Iterator[object]:
    kind: Any = type(item)
    for slot in _slots_of(kind):
        with contextlib.suppress(AttributeError):  # it is empty
            yield slot.__get__(item)


@functools.lru_cache(maxsize=1024)
def _slots_of(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    attributes = (attribute for base in kind.__mro__ for attribute in vars(base).values())
    return tuple(attribute for attribute in attributes if isinstance(attribute, types.MemberDescriptorType))


def _content_of(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


class _Places:
    """Where weights are in memory."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._names: dict[int, list[str]] = {}
        spans: dict[torch.device, list[tuple[int, int, str]]] = {}
        for name, weight in weights.items():
            self._names.setdefault(id(weight), []).append(name)
            for device, start, end in _spans_of(weight):
                spans.setdefault(device, []).append((start, end, name))
        self._spans = {device: sorted(of_device) for device, of_device in spans.items()}

    def names_at(self, item: Tensor | np.ndarray[Any, Any]) -> Iterator[str]:
        """Yield the names of the weights that a tensor is, or that it or an array shares memory with."""
        yield from self._names.get(id(item), ())
        for device, start, end in _spans_of(item):
            of_device = self._spans.get(device, [])
            # Weights are the same or do not overlap, so that their ends are in order as well.
            first = bisect.bisect_right(of_device, start, key=lambda span: span[1])
            for other_start, _, name in of_device[first:]:
                if other_start >= end:
                    break
                yield name


def _spans_of(item: Tensor | np.ndarray[Any, Any]) -> Iterator[tuple[torch.device, int, int]]:
    """Yield the device, start and end of a tensor's or array's memory; nothing if it has none, or does not say."""
    if isinstance(item, np.ndarray):
        steps = [(size - 1) * stride for size, stride in zip(item.shape, item.strides, strict=True)]
        if item.size:
            first = item.ctypes.data + sum(step for step in steps if step < 0)
            yield torch.device("cpu"), first, first + sum(map(abs, steps)) + item.itemsize
        return
    tensor, wrapper = item, cast("Any", item)
    if is_traceable_wrapper_subclass(wrapper):  # of torchao: its parts
        names, _ = wrapper.__tensor_flatten__()
        for name in names:
            yield from _spans_of(getattr(wrapper, name))
        return
    try:
        start = 0 if tensor.is_meta or tensor.layout != torch.strided else tensor.data_ptr()
    except RuntimeError:  # so torch answers for a tensor that has no memory, as a fake one: it shares none
        return
    if start and tensor.numel():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        yield tensor.device, start, start + (last + 1) * tensor.element_size()
