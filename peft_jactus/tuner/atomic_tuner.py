"""Merging and unloading of a whole model: all layers or none."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


class AtomicTuner(BaseTuner):
    """A tuner whose model is as it was if merging or unloading fails in one of its layers."""

    _unloaded: list[tuple[nn.Module, str, nn.Module]] | None = None  # while layers are taken out: parent, name, layer

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into all layers, or, if one of them cannot, into none."""
        with self._merges_of_all_layers():
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    @contextmanager
    def _merges_of_all_layers(self) -> Iterator[None]:
        before = {layer: list(layer.merged_adapters) for layer in _layers_of(self.model)}
        try:
            yield
        except BaseException:
            for layer, names in before.items():
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unloaded: list[tuple[nn.Module, str, nn.Module]] = []
        self._unloaded = unloaded
        with self._merges_of_all_layers():
            try:
                return super()._unload_and_optionally_merge(*args, **kwargs)
            except BaseException:
                for parent, name, module in unloaded:
                    setattr(parent, name, module)
                raise
            finally:
                self._unloaded = None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if self._unloaded is None:
            super()._replace_module(parent, child_name, new_module, child)
            return
        # PEFT's version wants a weight of what comes out, which a head of several layers does not have.
        self._unloaded.append((parent, child_name, child))
        setattr(parent, child_name, new_module)


def _layers_of(model: nn.Module) -> Iterator[BaseTunerLayer]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
