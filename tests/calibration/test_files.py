"""`statistics_file`: what is reused, what is continued, and what is refused."""

import contextlib

import pytest
import torch
from peft import get_peft_model

from peft_jactus import CalibrationStatistics, JactusConfig, calibrate
from tests.support.comparisons import assert_same_statistics
from tests.support.compressed_models import batches_for, tiny_llama
from tests.support.tiny_models import TASKS, collate, tiny_bert

# Sums of two runs are added in another order than those of one.
ROUNDING = 1e-12


class PowerCutError(Exception):
    pass


@pytest.fixture
def path(tmp_path):
    return tmp_path / "statistics.safetensors"


@pytest.fixture(params=["bert", "t5"])
def task(request):
    return TASKS[request.param]


def run(model, batches, *, head="classifier", targets="all-linear", **options):
    config = JactusConfig(target_modules=targets, exclude_modules=[head])
    statistics = calibrate(model, config, batches, progress_bar=False, **options)
    assert config.statistics is statistics
    return statistics


def interrupted(batches, num_batches):
    yield from batches[:num_batches]
    raise PowerCutError


def eight_batches(task):
    return [collate(task.examples()[i % 2 :]) for i in range(8)]


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    assert actual.num_batches == expected.num_batches
    assert_same_statistics(actual, expected, rtol=ROUNDING)


def refuse_to_run(*_):
    pytest.fail("the model was run")


def test_a_complete_file_is_used_without_running_the_model(path, caplog):
    task = TASKS["bert"]
    expected = run(tiny_bert(), eight_batches(task), statistics_file=path)
    model = tiny_bert()
    model.register_forward_pre_hook(refuse_to_run)
    assert caplog.text == ""
    assert_same(run(model, eight_batches(task), statistics_file=path), expected)
    assert f"the statistics of 8 batches are complete. If the data have changed since, delete {path}." in caplog.text


def test_the_file_holds_what_is_returned(path):
    statistics = run(tiny_bert(), eight_batches(TASKS["bert"]), statistics_file=path)
    loaded = CalibrationStatistics.load(path)
    assert_same(loaded, statistics)
    attention = "bert.encoder.layer.0.attention.self"
    assert loaded[f"{attention}.query"].input is loaded[f"{attention}.key"].input


@pytest.mark.parametrize(("save_every", "num_saved"), [(1, 5), (2, 4), (5, 5)])
def test_an_interrupted_run_is_continued_to_the_same_result(task, path, save_every, num_saved):
    batches, options = eight_batches(task), {"head": task.head, "save_every": save_every}
    with pytest.raises(PowerCutError):
        run(task.model(), interrupted(batches, 5), statistics_file=path, **options)
    assert CalibrationStatistics.load(path).num_batches == num_saved
    model, num_forwards = task.model(), []
    model.register_forward_pre_hook(lambda *_: num_forwards.append(1))
    resumed = run(model, batches, statistics_file=path, **options)
    assert len(num_forwards) == 8 - num_saved
    assert_same(resumed, run(task.model(), batches, head=task.head))
    assert_same(CalibrationStatistics.load(path), resumed)


def test_a_run_may_be_interrupted_twice(path):
    batches = eight_batches(TASKS["bert"])
    for num_batches in (2, 5):
        with pytest.raises(PowerCutError):
            run(tiny_bert(), interrupted(batches, num_batches), statistics_file=path, save_every=1)
        assert CalibrationStatistics.load(path).num_batches == num_batches
    resumed = run(tiny_bert(), batches, statistics_file=path)
    assert_same(resumed, run(tiny_bert(), batches))
    attention = "bert.encoder.layer.0.attention.self"
    assert resumed[f"{attention}.query"].input is resumed[f"{attention}.key"].input


def test_a_run_interrupted_after_its_last_batch_is_complete_on_the_next(path):
    batches = eight_batches(TASKS["bert"])
    with pytest.raises(PowerCutError):
        run(tiny_bert(), interrupted(batches, 8), statistics_file=path, save_every=1)
    assert_same(run(tiny_bert(), batches, statistics_file=path), run(tiny_bert(), batches))


def test_max_batches_counts_those_of_the_interrupted_run(path):
    batches = eight_batches(TASKS["bert"])
    with pytest.raises(PowerCutError):
        run(tiny_bert(), interrupted(batches, 2), statistics_file=path, save_every=1)
    resumed = run(tiny_bert(), batches, statistics_file=path, max_batches=3)
    assert_same(resumed, run(tiny_bert(), batches[:3]))


def test_a_file_of_other_layers_or_shapes_is_refused_and_named(path):
    batches = eight_batches(TASKS["bert"])[:1]
    run(tiny_bert(), batches, statistics_file=path, targets=["query", "key"])
    with pytest.raises(ValueError, match=r"`statistics_file` .*statistics of bert.*value"):
        run(tiny_bert(), batches, statistics_file=path, targets=["query", "value"])
    with pytest.raises(ValueError, match=r"query for a weight of shape \(8, 8\); it has \(16, 16\)"):
        run(tiny_bert(hidden_size=16), batches, statistics_file=path, targets=["query", "key"])


@pytest.mark.parametrize("limit", [None, 8_000])
@pytest.mark.parametrize("num_forwards", [2, 5, 100])
def test_a_file_of_other_weights_is_refused_whatever_it_holds(path, num_forwards, limit):
    """Some batches, or all of some groups, or everything; with a limit the layer that changes is of a later group."""
    batches, forwards = eight_batches(TASKS["bert"])[:3], []

    def fail_in_time(*_):
        forwards.append(1)
        if len(forwards) > num_forwards:
            raise PowerCutError

    options = {"statistics_file": path, "save_every": 1, "max_statistics_memory": limit}
    model = tiny_bert()
    handle = model.register_forward_pre_hook(fail_in_time)
    with contextlib.suppress(PowerCutError):
        run(model, batches, **options)
    handle.remove()
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    assert before
    torch.nn.init.ones_(model.bert.pooler.dense.weight)
    model.register_forward_pre_hook(refuse_to_run)
    with pytest.raises(ValueError, match=r"`statistics_file` .*pooler.dense with other weights.* Delete it"):
        run(model, batches, **options)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize("num_batches", [2, 8])
@pytest.mark.parametrize("limit", [None, 8_000])
def test_a_file_of_another_head_is_named_in_a_warning(path, limit, num_batches, caplog):
    """As a script without a seed makes it when it is run again; statistics of some batches, or of all."""
    batches = eight_batches(TASKS["bert"])
    options = {"statistics_file": path, "save_every": 1, "max_statistics_memory": limit}
    with contextlib.suppress(PowerCutError):
        run(tiny_bert(), interrupted(batches, num_batches) if limit is None else batches[:num_batches], **options)
    assert caplog.text == ""
    for same in (True, False):
        model = tiny_bert()
        if not same:
            torch.nn.init.ones_(model.classifier.weight)
        before = {file: file.read_bytes() for file in path.parent.iterdir()}
        run(model, batches, **options)
        assert ("the model had other values in classifier.weight." in caplog.text) != same
        for file, content in before.items():
            file.write_bytes(content)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_layers_that_torchao_has_packed_beside_the_targets_do_not_matter(path, kind):
    torchao = pytest.importorskip("torchao.quantization")
    config = {"int8": torchao.Int8WeightOnlyConfig, "float8": torchao.Float8WeightOnlyConfig}[kind]()
    model = tiny_llama(dtype=torch.bfloat16)
    torchao.quantize_(model, config)
    batches = batches_for(model)
    for _ in range(2):
        settings = JactusConfig(target_modules=["q_proj", "v_proj"])
        statistics = calibrate(model, settings, batches, statistics_file=path, progress_bar=False)
        assert statistics.num_batches == len(batches)


def test_statistics_that_a_user_saved_are_taken_for_any_weights(path):
    batches = eight_batches(TASKS["bert"])[:3]
    run(tiny_bert(), batches).save(path)
    model = tiny_bert()
    torch.nn.init.ones_(model.bert.pooler.dense.weight)
    assert run(model, batches, statistics_file=path).num_batches == 3


@pytest.mark.parametrize("num_batches", [2, 3])
def test_a_file_without_fisher_information_is_refused_for_fwsvd_with_what_to_do(path, num_batches):
    batches = eight_batches(TASKS["bert"])[:3]
    with contextlib.suppress(PowerCutError):
        unfinished = batches if num_batches == 3 else interrupted(batches, num_batches)
        run(tiny_bert(), unfinished, statistics_file=path, save_every=1)
    config = JactusConfig(target_modules="all-linear", exclude_modules=["classifier"], decomposition="fwsvd")
    message = r"no Fisher information of bert.*to another `statistics_file`"
    with pytest.raises(ValueError, match=rf"`statistics_file` .*{message}"):
        calibrate(tiny_bert(), config, batches, statistics_file=path, progress_bar=False)
    config.statistics = CalibrationStatistics.load(path)
    with pytest.raises(ValueError, match=rf"`config.statistics` .*{message}"):
        get_peft_model(tiny_bert(), config)


def test_a_damaged_file_is_refused_and_left_alone(path):
    path.write_bytes(b"no statistics, but long enough to be read as a header")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is damaged"):
        run(tiny_bert(), eight_batches(TASKS["bert"]), statistics_file=path)
    assert path.read_bytes() == before


def test_failing_checks_do_not_mark_a_file_complete(path):
    """A layer without any gradient is found at the end; the next run must not take its file for good."""
    model = tiny_bert()
    torch.nn.init.zeros_(model.classifier.weight)
    for _ in range(2):
        with pytest.raises(ValueError, match="its gradient is zero"):
            run(model, eight_batches(TASKS["bert"]), statistics_file=path, save_every=1)
