"""What several processes share of a tuner: layers are shared out, and tensors that one makes are used by all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peft_jactus._processes import broadcast_, gather_objects, share_out
from peft_jactus.tuner.targeting import device_and_dtype, features_of, has_bias

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from peft_jactus.tuner.config import JactusConfig


@dataclass(frozen=True)
class MadeLayer:
    """What is made of one layer, ready to be put into the model.

    Attributes:
        rank: Of the whole weight.
        tensors: All of the adapter's, by name.
    """

    rank: int
    tensors: dict[str, Tensor]


def made_for_all(
    made: MadeLayer | None, owner: int, config: JactusConfig, target: nn.Module, dtype: torch.dtype
) -> MadeLayer:
    """Return what process ``owner`` made of a layer.

    Args:
        made: There, what it made; elsewhere ``None``.
        owner: The process that made it.
        config: The adapter's.
        target: The layer.
        dtype: Of its weight.
    """
    rank = gather_objects(None if made is None else made.rank)[owner]
    assert rank is not None
    if made is None:
        device, _ = device_and_dtype(target)
        features = features_of(target)
        shape = config.adapter_shape(rank, *features)
        empty = {
            name: torch.empty(size, dtype=shape.dtype_of(name, dtype), device=device)
            for name, size in shape.tensors(*features, bias=has_bias(target)).items()
        }
        made = MadeLayer(rank, empty)
    for name in sorted(made.tensors):
        broadcast_(made.tensors[name], owner)
    return made


def share_out_layers(targets: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return which process factorizes which layer; the time grows with the cube of its sides."""
    shapes = {name: features_of(module) for name, module in targets.items()}
    return share_out({name: float(sum(side**3 for side in shape)) for name, shape in shapes.items()})


def digest(tensor: Tensor) -> float:
    """Return a number that is hardly the same for two tensors, or for two orders of one."""
    weights = torch.arange(1, 1 + tensor.numel(), dtype=torch.float64, device=tensor.device)
    return float(tensor.detach().flatten().double() @ weights)
