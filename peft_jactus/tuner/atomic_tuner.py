"""Operations on the adapters of a whole model: on all layers or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTuner

from peft_jactus.tuner.checkpoint_checks import check_complete
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.tuner.quantized_bases import note_plain_layers_
from peft_jactus.tuner.snapshot import all_or_no_switches, all_or_nothing

if TYPE_CHECKING:
    from torch import nn


class AtomicTuner(BaseTuner):
    """A tuner whose model is as it was if an operation fails in one of its layers."""

    _takes_layers_out = False  # meanwhile

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into all layers, or, if one of them cannot, into none."""
        self._check_adapters_to_merge(adapter_names)
        with all_or_nothing(self):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take adapters out of all layers or none."""
        with all_or_nothing(self):
            super().unmerge_adapter()  # type: ignore[no-untyped-call]  # PEFT: untyped

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter in all layers or none."""
        with all_or_nothing(self):
            super().delete_adapter(adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones in all layers or none."""
        with all_or_no_switches(self):
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters in all layers or none."""
        with all_or_no_switches(self):
            super().set_requires_grad(adapter_names, requires_grad=requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with all_or_no_switches(self):
            super()._enable_adapter_layers(enabled)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_adapters_to_merge(adapter_names)
        with all_or_nothing(self):
            self._takes_layers_out = True
            unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
            self._takes_layers_out = False
            note_plain_layers_(self.model)
        return unloaded

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if self._takes_layers_out:
            # PEFT's version wants a weight of what comes out, which a head of several layers does not have.
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _check_adapters_to_merge(self, names: list[str] | None) -> None:
        for name in self.active_adapters if names is None else names:
            if isinstance(config := self.peft_config.get(name), JactusConfig):
                check_complete(self.model, config, name, None, verb="merged")
