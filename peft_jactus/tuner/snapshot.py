"""What is known of a model before an operation, to put it back if the operation fails."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

_CONTAINERS = (dict, list, set)
# What says which adapters run: of a layer or head, and of a whole model.
_SWITCHES = ("_active_adapter", "_disable_adapters", "active_adapter")


class Snapshot:
    """What a model is, to put back: modules, parameters and buffers, plain attributes, and which parameters train.

    What is written into a tensor is not put back: an operation may only replace tensors.

    Args:
        model: Any.
        except_for: Modules of it of which only is noted which parameters train, so that their tensors are not held.
    """

    def __init__(self, model: nn.Module, except_for: Iterable[nn.Module] = ()) -> None:
        left_out = {id(module) for module in except_for}
        modules = [module for module in model.modules() if id(module) not in left_out]
        self._modules = [(vars(module), dict(vars(module)), _contents(module)) for module in modules]
        self._trains = [
            (module._parameters, name, parameter.requires_grad)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        configs = (attributes["config"] for _, attributes, _ in self._modules if "config" in attributes)
        # Merging writes there that embeddings are no longer tied.
        self._tied = [
            (config, config.tie_word_embeddings) for config in configs if hasattr(config, "tie_word_embeddings")
        ]

    def put_back(self) -> None:
        """Make the model what it was."""
        for now, attributes, contents in self._modules:
            now.clear()
            now.update(attributes)
            for container, content in contents:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        held = ((parameters.get(name), requires_grad) for parameters, name, requires_grad in self._trains)
        _set_requires_grad((parameter, requires_grad) for parameter, requires_grad in held if parameter is not None)
        for config, tie_word_embeddings in self._tied:
            config.tie_word_embeddings = tie_word_embeddings


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Leave a model as it was if an operation on it raises; see `Snapshot`."""
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        before.put_back()
        raise


@contextmanager
def all_or_no_switches(model: nn.Module) -> Iterator[None]:
    """Do the same for an operation that only says which adapters run, and which of them train.

    It takes a tenth of the time. Trainers with a reference model switch at each step.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if any(layer.merged_adapters for layer in layers):  # and may unmerge them
        with all_or_nothing(model):
            yield
        return
    before = [(vars(module), _switches(module)) for module in (model, *layers)]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for now, switches in before:
            for name in _SWITCHES:
                now.pop(name, None)
            now.update(switches)
        _set_requires_grad(trains)
        raise


def _switches(module: nn.Module) -> dict[str, Any]:
    attributes = vars(module)
    return {name: attributes[name] for name in _SWITCHES if name in attributes}


def _set_requires_grad(trains: Iterable[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in trains:
        if parameter.requires_grad != requires_grad:  # codes of a quantized weight allow no call
            parameter.requires_grad_(requires_grad)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the containers among a module's attributes, which can be changed in place, with what is in them."""
    return [
        (value, value.copy() if value else ()) for value in vars(module).values() if isinstance(value, _CONTAINERS)
    ]
