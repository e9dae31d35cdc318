"""Several processes share the work. With one process nothing happens here.

The processes are those of `torch.distributed`, once it is initialized: `accelerate launch`, `torchrun` and the Trainer
do that. Every process has to make the same calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

T = TypeVar("T")


def num_processes() -> int:
    """Return how many processes share the work."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_index() -> int:
    """Return which of them this is, from 0."""
    return distributed.get_rank() if num_processes() > 1 else 0


def gather_objects(value: T) -> list[T]:
    """Return the ``value`` of each process, in their order; it should be small."""
    values: list[T] = [value] * num_processes()
    if num_processes() > 1:
        distributed.all_gather_object(values, value)
    return values


def share_out(costs: Mapping[str, float]) -> dict[str, int]:
    """Return which process does each task, so that none has much more to do than another.

    The most expensive task goes first, to the process that has least to do (Graham, 1969): at most 4/3 of the best.
    """
    load = [0.0] * num_processes()
    owners = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = load.index(min(load))
        load[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}


def broadcast_(tensor: Tensor, source: int) -> None:
    """Fill ``tensor`` with that of process ``source``."""
    if num_processes() == 1:
        return
    on_device = tensor.to(_device()).contiguous()
    distributed.broadcast(on_device, source)
    tensor.copy_(on_device)


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of all processes' tensors."""
    total = tensor.to(_device(), copy=True)
    distributed.all_reduce(total)
    return total.to(tensor.device)


def _device() -> torch.device:
    """Return where tensors have to be to be sent."""
    on_gpu = distributed.get_backend() == distributed.Backend.NCCL
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
