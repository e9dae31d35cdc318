"""Timing: turns, units, and what is left as it was."""

import itertools

import pytest
import torch
from torch import nn

from peft_jactus.cli import stopwatch
from peft_jactus.cli.stopwatch import Case, compare, decode_case, forward_case, num_bytes, num_parameters
from tests.support.compressed_models import compressed, tiny_llama


class Clock:
    """A clock that stands still but for what models add to it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Model(nn.Module):
    """Takes as long as it is told to."""

    def __init__(self, name, clock, seconds, log):
        super().__init__()
        self.name, self.clock, self.seconds, self.log = name, clock, itertools.cycle(seconds), log
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self):
        self.log.append(self.name)
        assert not self.training
        assert not torch.is_grad_enabled()
        self.clock.now += next(self.seconds)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch.time, "thread_time", clock)
    return clock


CALL = Case("call", lambda model, _: model())


def test_minimum_and_median_are_those_of_the_measurements(clock):
    # Two calls to warm up, then five measurements of one call.
    model = Model("a", clock, [9, 9, 5, 1, 2, 40, 3], [])
    (timing,) = compare({"a": model}, [CALL], num_repeats=5)
    assert (timing.min_seconds, timing.median_seconds) == (1, 3)
    assert (timing.case, timing.model, timing.num_repeats, timing.num_calls) == ("call", "a", 5, 1)


def test_models_take_turns_and_nobody_always_goes_first(clock):
    log = []
    models = {name: Model(name, clock, [1.0], log) for name in "abc"}
    compare(models, [CALL], num_repeats=4)
    assert "".join(log[6:]) == "abcbcacababc"


def test_short_calls_are_repeated_until_they_can_be_measured(clock):
    log = []
    models = {"fast": Model("fast", clock, [0.125], log), "slow": Model("slow", clock, [0.75], log)}
    fast, slow = compare(models, [CALL], num_repeats=3, min_seconds=1.0)
    assert (fast.num_calls, slow.num_calls) == (8, 2)
    assert (fast.min_seconds, slow.min_seconds) == (0.125, 0.75)
    assert log.count("fast") == 2 + 3 * 8


def test_time_is_per_unit_and_preparing_takes_none(clock):
    def prepare(model):
        clock.now += 100
        return model.name

    def call(model, state):
        assert state == "a"
        model()

    case = Case("units", call, prepare, num_units=4)
    (timing,) = compare({"a": Model("a", clock, [2.0], [])}, [case])
    assert timing.median_seconds == 0.5


def test_modes_and_threads_are_left_as_they_were(clock):
    model = nn.Sequential(Model("a", clock, [1.0], []), nn.Dropout())
    model[1].eval()
    before = torch.get_num_threads()
    seen = []
    case = Case("threads", lambda m, _: seen.append((torch.get_num_threads(), m[0].training)))
    compare({"a": model}, [case], num_threads=before + 1, num_repeats=1, min_seconds=0.0)
    assert set(seen) == {(before + 1, False)}
    assert torch.get_num_threads() == before
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_comparisons_that_mean_nothing_are_refused(clock):
    model = Model("a", clock, [1.0], [])
    with pytest.raises(ValueError, match="at least"):
        compare({}, [CALL])
    with pytest.raises(ValueError, match="at least"):
        compare({"a": model}, [CALL], num_repeats=0)
    with pytest.raises(ValueError, match="different names"):
        compare({"a": model}, [CALL, CALL])
    with pytest.raises(ValueError, match=r"on one device.*'cpu', 'meta'"):
        compare({"a": model, "b": nn.Linear(2, 2, device="meta")}, [CALL])


def test_forward_case_calls_the_model_with_its_inputs():
    seen = []
    case = forward_case("forward", {"x": 1, "y": 2})
    case.call(lambda **inputs: seen.append(inputs), case.prepare(nn.Identity()))
    assert seen == [{"x": 1, "y": 2}]


def test_decoding_reads_the_prompt_once_and_then_one_token_after_the_other():
    model = tiny_llama()
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    case = decode_case("decode", torch.full((2, 5), 7), num_tokens=3)
    with torch.no_grad():
        state = case.prepare(model)
        assert lengths == [5]
        case.call(model, state)
    assert lengths == [5, 1, 1, 1]
    (cache,) = state.values()
    assert cache.get_seq_length() == 8
    assert case.num_units == 3


def test_a_larger_model_takes_longer():
    models = {"small": nn.Linear(8, 8), "large": nn.Linear(1024, 1024)}
    case = Case("call", lambda model, _: model(torch.ones(64, model.in_features)))
    small, large = compare(models, [case], num_repeats=3, min_seconds=0.005)
    assert small.median_seconds < large.median_seconds


def test_shared_tensors_count_once():
    model = nn.ModuleList([nn.Linear(3, 5), nn.Linear(3, 5)])
    model[1].weight = model[0].weight
    model.register_buffer("index", torch.zeros(7, dtype=torch.int32))
    model.register_buffer("view", model.index[:2])
    assert num_parameters(model) == 15 + 5 + 5
    assert num_bytes(model) == 4 * 25 + 4 * 7


def test_sizes_count_frozen_bases():
    model = compressed(tiny_llama())
    tensors = {*model.parameters(), *model.buffers()}
    assert num_bytes(model) == sum(tensor.nbytes for tensor in tensors)
