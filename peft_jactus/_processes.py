"""Several processes share the work: sums are added up, layers are shared out. With one process nothing happens here.

Processes are those of `torch.distributed`, once it is initialized, as `accelerate launch`, `torchrun` and the Trainer
do. Every process has to make the same calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed

from peft_jactus.numerics.moments import LayerStatistics, SecondMoment
from peft_jactus.calibration.statistics import CalibrationStatistics

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


def from_all(value: T) -> list[T]:
    """Return the small ``value`` of each process, in their order."""
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


def summed(statistics: CalibrationStatistics) -> CalibrationStatistics:
    """Return the statistics of what all processes saw together.

    Raises:
        ValueError: If processes have statistics of different layers.
    """
    if num_processes() == 1:
        return statistics
    if any(names != list(statistics) for names in from_all(list(statistics))):
        raise ValueError("Processes calibrate different layers; give all of them the same model and config.")
    layers = list(statistics.values())
    inputs = _summed_moments([layer.input for layer in layers])
    gradients = _summed_moments([layer.gradient for layer in layers])
    row_fishers = [None if layer.row_fisher is None else _sum(layer.row_fisher) for layer in layers]
    total = map(LayerStatistics, inputs, gradients, row_fishers)
    num_batches = sum(from_all(statistics.num_batches))
    return CalibrationStatistics(dict(zip(statistics, total, strict=True)), num_batches=num_batches)


def _summed_moments(moments: list[SecondMoment]) -> list[SecondMoment]:
    first = {moment.identity: number for number, moment in reversed(list(enumerate(moments)))}
    # Layers share one where they do so in every process: a process may have seen no token of an expert.
    keys = list(zip(*from_all([first[moment.identity] for moment in moments]), strict=True))
    counts = [sum(of_all) for of_all in zip(*from_all([moment.num_tokens for moment in moments]), strict=True)]
    found: dict[tuple[int, ...], SecondMoment] = {}
    for key, moment, count in zip(keys, moments, counts, strict=True):
        if key not in found:
            found[key] = _summed_moment(moment, count)
    return [found[key] for key in keys]


def _summed_moment(moment: SecondMoment, count: int) -> SecondMoment:
    """Return the sum over processes, which saw ``count`` vectors; each adds what it saw around the mean of all."""
    mean = _sum(moment.mean * (moment.num_tokens / max(1, count)))
    return SecondMoment(
        scatter=_sum(moment.scatter_around(mean)),
        mean=mean,
        quartic_sum=_sum(moment.quartic_sum),
        absolute_sum=_sum(moment.absolute_sum),
        num_tokens=count,
    )


def _sum(tensor: Tensor) -> Tensor:
    total = tensor.to(_device(), copy=True)
    distributed.all_reduce(total)
    return total.to(tensor.device)


def _device() -> torch.device:
    """Return where tensors have to be to be sent."""
    on_gpu = distributed.get_backend() == distributed.Backend.NCCL
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
