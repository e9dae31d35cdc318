"""Copies of what does not train, for saving an adapter whose frozen tensors DeepSpeed ZeRO-3 holds in shards.

The Trainer then gathers only what trains, and saves in one process, which cannot ask the others for more. Frozen
tensors never change, so a copy from before the training is as good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.utils.integrations import check_deepspeed_zero3_enabled

from peft_jactus._processes import process_index
from peft_jactus.tuner.adapter_format import FROZEN
from peft_jactus.tuner.layer import JactusLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def frozen_copies(model: nn.Module) -> dict[str, Tensor]:
    """Return copies in CPU memory of the frozen tensors of all adapters, by name, where they will be needed.

    That is in the first process under ZeRO-3; else there are none.
    """
    if process_index() or not check_deepspeed_zero3_enabled():
        return {}
    return {
        f"{name}.{tensor_name}.{adapter}": tensor.detach().to("cpu", copy=True)
        for name, layer in model.named_modules()
        if isinstance(layer, JactusLayer)
        for tensor_name in FROZEN
        for adapter, tensor in getattr(layer, tensor_name).items()
    }


def with_frozen_copies(state_dict: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of a `PeftModel` with the copies, as far as it lacks them."""
    return {f"base_model.{name}": tensor for name, tensor in copies.items()} | dict(state_dict)
