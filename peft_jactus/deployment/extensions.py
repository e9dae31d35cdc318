"""What another room adds to a compressed checkpoint: a field of its ``quantization_config``, and a module.

The loader knows no extension by name. One registers under the field that describes it, with a function that imports
it, which is called when a checkpoint has the field.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from transformers import PreTrainedModel


class ExtensionConfig(Protocol):
    """Settings of an extension, as ``config.json`` has them."""

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into ``config.json``."""
        ...


class CheckpointExtension(ABC):
    """What the loader asks of an extension."""

    @abstractmethod
    def parse(self, values: object) -> ExtensionConfig:
        """Return the settings that a ``config.json`` holds; a `ValueError` says what is wrong with them."""

    @abstractmethod
    def install(self, model: PreTrainedModel, layers: Sequence[str], config: Any) -> nn.Module:
        """Put the module into ``model``, in place, and return it; its tensors may be on the meta device.

        Args:
            model: With its factorised layers in place.
            layers: Full names of the targeted modules, in the order of their names in the checkpoint.
            config: From `parse`.
        """

    @abstractmethod
    def config_of(self, module: nn.Module) -> ExtensionConfig:
        """Return the settings of the module."""

    @abstractmethod
    def title_of(self, module: nn.Module) -> str:
        """Return what the module is and its size, for errors: "router of 120 experts"."""

    @abstractmethod
    def remove(self, model: nn.Module) -> None:
        """Take the module out of ``model``."""

    @abstractmethod
    def describe(self, config: Any) -> str:
        """Return a line about the settings, for people."""


@dataclass(frozen=True)
class Registered:
    """An extension that may not be imported yet.

    Attributes:
        field: Of the ``quantization_config``.
        module_name: Of its module in a model, and so of its tensors in a checkpoint.
        load: Imports and returns the extension.
    """

    field: str
    module_name: str
    load: Callable[[], CheckpointExtension]


_REGISTERED: dict[str, Registered] = {}


def register_extension(field: str, module_name: str, load: Callable[[], CheckpointExtension]) -> None:
    """Make ``field`` of a ``quantization_config`` known; see `Registered` for the arguments."""
    _REGISTERED[field] = Registered(field, module_name, load)


def find_extension(field: str) -> Registered | None:
    """Return the extension that ``field`` belongs to, if there is one."""
    return _REGISTERED.get(field)


def extensions_in(model: nn.Module) -> list[Registered]:
    """Return the extensions that have a module in ``model``."""
    return [entry for entry in _REGISTERED.values() if getattr(model, entry.module_name, None) is not None]


def extension_configs(model: nn.Module) -> dict[str, ExtensionConfig]:
    """Return the settings of the extensions that have a module in ``model``, by field."""
    return {entry.field: entry.load().config_of(getattr(model, entry.module_name)) for entry in extensions_in(model)}
