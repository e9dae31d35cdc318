"""Copies of what does not train, for saving an adapter whose frozen tensors DeepSpeed ZeRO-3 holds in shards.

The Trainer then gathers only what trains, and saves in one process, which cannot ask the others for more. Frozen
tensors do not change in training, so a copy from before it is as good. A copy is not used where another adapter has
been loaded or made under the same name since: its tensors are then missing, and the adapter is not saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from peft.utils.integrations import check_deepspeed_zero3_enabled

from peft_jactus._processes import process_index
from peft_jactus.tuner.adapter_format import FROZEN
from peft_jactus.tuner.layer import JactusLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


class FrozenCopy(NamedTuple):
    """A copy of a tensor, and what was copied."""

    tensor: Tensor
    original: Tensor
    version: int

    def is_of(self, tensor: Tensor | None) -> bool:
        """Whether ``tensor`` is what was copied, and has not been written to since. To shard it is not to write."""
        return tensor is self.original and tensor._version == self.version


def frozen_copies(model: nn.Module) -> dict[str, FrozenCopy]:
    """Return copies in CPU memory of the frozen tensors of all adapters, by name, where they will be needed.

    That is in the first process under ZeRO-3; else there are none.
    """
    if process_index() or not check_deepspeed_zero3_enabled():
        return {}
    return {
        name: FrozenCopy(tensor.detach().to("cpu", copy=True), tensor, tensor._version)
        for name, tensor in _frozen_tensors(model).items()
    }


def with_frozen_copies(
    model: nn.Module, state_dict: Mapping[str, Tensor], copies: Mapping[str, FrozenCopy]
) -> dict[str, Tensor]:
    """Return a state dict of a `PeftModel` around ``model``; what it lacks is there from copies that still hold."""
    now = _frozen_tensors(model) if copies else {}
    valid = {f"base_model.{name}": copy.tensor for name, copy in copies.items() if copy.is_of(now.get(name))}
    return valid | dict(state_dict)


def _frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{tensor_name}.{adapter}": tensor
        for name, layer in model.named_modules()
        if isinstance(layer, JactusLayer)
        for tensor_name in FROZEN
        for adapter, tensor in getattr(layer, tensor_name).items()
    }
