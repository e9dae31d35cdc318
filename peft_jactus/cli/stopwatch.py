"""How long models take, compared fairly: in one process, taking turns, on one clock.

Nothing here knows PEFT or transformers; a `Case` calls the models.
"""

from __future__ import annotations

import math
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    Clock = Callable[[Callable[[], object]], float]

_MAX_CALLS = 10_000  # in one measurement


def _nothing(model: nn.Module) -> None:
    del model


@dataclass(frozen=True)
class Case:
    """Something that every model is timed on.

    Attributes:
        name: What is timed; unique in a comparison.
        call: ``call(model, state)`` is timed.
        prepare: ``prepare(model)`` makes the state, anew for each call, and is not timed.
        num_units: Times are given per unit: a call that decodes 16 tokens has 16.
    """

    name: str
    call: Callable[[Any, Any], object]
    prepare: Callable[[Any], Any] = _nothing
    num_units: int = 1


@dataclass(frozen=True)
class Timing:
    """What one model took for one case.

    Attributes:
        case: Name of the case.
        model: Name of the model.
        min_seconds: Per unit; of the fastest repeat.
        median_seconds: Per unit; of the middle repeat.
        num_repeats: Measurements.
        num_calls: Calls in each measurement.
    """

    case: str
    model: str
    min_seconds: float
    median_seconds: float
    num_repeats: int
    num_calls: int


@torch.inference_mode()
def compare(
    models: Mapping[str, nn.Module],
    cases: Sequence[Case],
    *,
    num_repeats: int = 7,
    min_seconds: float = 0.05,
    num_threads: int = 1,
) -> list[Timing]:
    """Time models on the same cases, taking turns, so that a change of the machine's speed meets all of them.

    On a GPU, CUDA events measure; on a CPU, the processor time of one thread, or the wall clock if there are several
    threads. Models are timed in evaluation mode, without gradients, and come back in the mode that they were in.

    Args:
        models: By name; all on one device.
        cases: What to time.
        num_repeats: Measurements of each model and case, at least 1.
        min_seconds: A measurement makes as many calls as take this long, at least one; short ones are mostly noise.
        num_threads: Of torch, on a CPU.

    Returns:
        One row for each case and model: all models of the first case, and so on.

    Raises:
        ValueError: If there is nothing to compare, names repeat, or the models are on different devices.
    """
    if not models or not cases or num_repeats < 1 or num_threads < 1:
        raise ValueError("There must be a model, a case, a repeat and a thread, at least.")
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"Cases must have different names; got {names}.")
    clock = _clock(_common_device(models), num_threads)
    timings = []
    with _num_threads(num_threads), _evaluation_mode(models):
        for case in cases:
            timings += _compare_on(case, models, clock, num_repeats, min_seconds)
    return timings


def _compare_on(
    case: Case, models: Mapping[str, nn.Module], clock: Clock, num_repeats: int, min_seconds: float
) -> list[Timing]:
    def measure(model: nn.Module, num_calls: int) -> float:
        seconds = 0.0
        for _ in range(num_calls):
            state = case.prepare(model)
            seconds += clock(lambda: case.call(model, state))  # noqa: B023  # called at once
        return seconds

    num_calls = {}
    for name, model in models.items():
        measure(model, 1)  # the first call allocates and chooses kernels
        seconds = max(measure(model, 1), 1e-9)
        num_calls[name] = max(1, min(_MAX_CALLS, math.ceil(min_seconds / seconds)))
    samples: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for _ in range(num_repeats):
        for name in order:
            samples[name].append(measure(models[name], num_calls[name]) / num_calls[name] / case.num_units)
        order = [*order[1:], order[0]]  # nobody always goes first
    return [
        Timing(case.name, name, min(values), statistics.median(values), num_repeats, num_calls[name])
        for name, values in samples.items()
    ]


def _common_device(models: Mapping[str, nn.Module]) -> torch.device:
    devices = {tensor.device for model in models.values() for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise ValueError(f"Models must be on one device to be compared; they are on {sorted(map(str, devices))}.")
    return devices.pop()


def _clock(device: torch.device, num_threads: int) -> Clock:
    if device.type == "cuda":
        return lambda call: _cuda_seconds(call, device)
    # The processor time of a thread leaves out what other processes take from it, and what other threads do for it.
    return lambda call: _seconds(call, time.thread_time if num_threads == 1 else time.perf_counter)


def _seconds(call: Callable[[], object], now: Callable[[], float]) -> float:
    start = now()
    call()
    return now() - start


def _cuda_seconds(call: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1000  # from milliseconds


@contextmanager
def _num_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluation_mode(models: Mapping[str, nn.Module]) -> Iterator[None]:
    training = [module for model in models.values() for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# -- cases ------------------------------------------------------------------------------------------------


def forward_case(name: str, inputs: Mapping[str, Any]) -> Case:
    """Return the case of one call ``model(**inputs)``."""
    return Case(name, lambda model, _: model(**inputs))


def decode_case(name: str, prompt: Tensor, *, num_tokens: int = 16) -> Case:
    """Return the case of decoding with a cache, per token, after a prompt that is not timed.

    Args:
        name: Of the case.
        prompt: ``(batch, length)``, int64: token ids.
        num_tokens: Decoded in a call, one after the other; which ones makes no difference to the time.
    """

    def read_prompt(model: Any) -> dict[str, Any]:
        return _cache_in(model(input_ids=prompt, use_cache=True))

    def decode(model: Any, cache: dict[str, Any]) -> None:
        for _ in range(num_tokens):
            cache = _cache_in(model(input_ids=prompt[:, -1:], use_cache=True, **cache))

    return Case(name, decode, read_prompt, num_tokens)


def _cache_in(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache as the next call's argument, of the same name: ``past_key_values`` before transformers 5.24."""
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


# -- sizes ------------------------------------------------------------------------------------------------


def num_parameters(model: nn.Module) -> int:
    """Return how many parameters a model has; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_bytes(model: nn.Module) -> int:
    """Return the memory that a model's parameters and buffers take; shared memory counts once."""
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
