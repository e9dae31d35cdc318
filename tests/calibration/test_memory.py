"""`max_statistics_memory`: the same statistics, a group of layers at a time."""

import gc
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_jactus import CalibrationStatistics, JactusConfig, calibrate
from peft_jactus.tuner.planning import measure_gains
from tests.support.comparisons import assert_same_statistics
from tests.support.strategies import randn
from tests.support.tiny_models import TASKS, collate, tiny_bert

# Each group runs the same operations on the same numbers.
ROUNDING = 1e-12
# Two to three layers of the tiny Bert, which take 1,280 and 1,984 bytes each.
LIMIT = 4_000


class PowerCutError(Exception):
    pass


def square_loss(model, batch):
    return model(batch["x"]).square().sum(1).mean()


def batches_of(task):
    return [collate(task.examples()[i % 2 :]) for i in range(3)]


def run(model, batches, *, head="classifier", adaptation_rank=0, **options):
    config = JactusConfig(
        target_modules="all-linear", exclude_modules=[head], retained_ratio=0.6, adaptation_rank=adaptation_rank
    )
    statistics = calibrate(model, config, batches, progress_bar=False, **options)
    return config, statistics


def bytes_of_largest_layers(statistics, count):
    return sum(sorted(bytes_of(layer) for layer in statistics.values())[-count:])


def bytes_of(layer):
    moments = sum(moment.scatter.nbytes + 2 * moment.mean.nbytes for moment in (layer.input, layer.gradient))
    sketch = layer.weight_gradient
    return moments + (0 if sketch is None else sketch.left.nbytes + sketch.right.nbytes)


@pytest.mark.parametrize("adaptation_rank", [0, 32])
@pytest.mark.parametrize("name", ["bert", "t5", "llama", "vit"])
def test_a_limit_of_two_layers_gives_the_statistics_of_no_limit(name, adaptation_rank):
    task = TASKS[name]
    options = {"head": task.head, "adaptation_rank": adaptation_rank}
    _, expected = run(task.model(), batches_of(task), **options)
    forwards = []
    model = task.model()
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    limit = bytes_of_largest_layers(expected, 2)
    config, statistics = run(model, batches_of(task), max_statistics_memory=limit, **options)
    assert config.statistics is statistics
    assert list(statistics) == list(expected)
    assert statistics.num_batches == expected.num_batches
    assert_same_statistics(statistics, expected, rtol=ROUNDING)
    num_passes = len(forwards) / len(batches_of(task))
    assert len(expected) / 4 < num_passes <= len(expected)  # small layers go together, no more than fit


def test_the_compressed_model_is_the_same():
    task = TASKS["bert"]
    models = []
    for limit in (None, LIMIT):
        model = tiny_bert()
        config, _ = run(model, batches_of(task), max_statistics_memory=limit)
        models.append(get_peft_model(model, config))
    unlimited, limited = models
    assert unlimited.peft_config["default"].layer_ranks == limited.peft_config["default"].layer_ranks
    state = unlimited.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in limited.state_dict().items())


def test_dropout_and_batches_that_can_be_read_once_are_the_same_for_each_group():
    task = TASKS["bert"]
    results = []
    for limit in (None, LIMIT):
        model = tiny_bert(hidden_dropout_prob=0.5)
        torch.manual_seed(0)
        results.append(run(model, iter(batches_of(task)), train_mode=True, max_statistics_memory=limit)[1])
    assert_same_statistics(*results, rtol=ROUNDING)


class WatchedStatistics(CalibrationStatistics):
    """Counts the dense weights that are still there whenever a layer is asked for."""

    def __init__(self, statistics, model, head):
        super().__init__(statistics, num_batches=statistics.num_batches)
        self.weights = [weakref.ref(model.get_submodule(name).weight) for name in statistics if name != head]
        self.alive = []

    def __getitem__(self, name):
        gc.collect()
        self.alive.append(sum(weight() is not None for weight in self.weights))
        return super().__getitem__(name)


def test_dense_weights_go_while_layers_are_replaced():
    model = tiny_bert()
    config, statistics = run(model, batches_of(TASKS["bert"]))
    config.statistics = watched = WatchedStatistics(statistics, model, "classifier")
    get_peft_model(model, config)
    num_layers = len(watched.weights)
    assert watched.alive[-num_layers:] == list(range(num_layers, 0, -1))


def test_the_limit_holds_for_what_compression_keeps_as_well(tmp_path, monkeypatch):
    kept = []

    def watched(*args, keep_bytes, **options):
        measured = measure_gains(*args, keep_bytes=keep_bytes, **options)
        kept.append(sum(projection.num_bytes for projection in measured.projections.values()))
        return measured

    monkeypatch.setattr("peft_jactus.tuner.model.measure_gains", watched)
    path = tmp_path / "statistics.safetensors"
    for limit in (None, LIMIT):
        model = tiny_bert()
        config, _ = run(model, batches_of(TASKS["bert"]), statistics_file=path, max_statistics_memory=limit)
        config.statistics = CalibrationStatistics.load(path)
        get_peft_model(model, config)
        path.unlink(missing_ok=True)
    unlimited, limited = kept
    assert 0 < limited <= LIMIT < unlimited


def test_the_limit_holds_for_compression_also_where_all_statistics_fit():
    _, statistics = run(tiny_bert(), batches_of(TASKS["bert"]), max_statistics_memory="1MiB")
    assert statistics.memory_limit == 2**20


def test_temporary_files_go_with_the_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config, statistics = run(tiny_bert(), batches_of(TASKS["bert"]), max_statistics_memory=LIMIT)
    assert len(list(tmp_path.rglob("*.safetensors"))) > 1
    config.statistics = None
    del statistics
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_goes_on_in_the_group_it_was_in(tmp_path):
    task, path = TASKS["bert"], tmp_path / "statistics.safetensors"
    _, expected = run(task.model(), batches_of(task))
    options = {"statistics_file": path, "save_every": 1, "max_statistics_memory": LIMIT}
    forwards = []

    def fail_in_the_third_group(*_):
        forwards.append(1)
        if len(forwards) == 8:
            raise PowerCutError

    model = tiny_bert()
    model.register_forward_pre_hook(fail_in_the_third_group)
    with pytest.raises(PowerCutError):
        run(model, batches_of(task), **options)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(FileNotFoundError):  # no index yet
        CalibrationStatistics.load(path)

    model, forwards_of_the_second_run = tiny_bert(), []
    model.register_forward_pre_hook(lambda *_: forwards_of_the_second_run.append(1))
    _, resumed = run(model, batches_of(task), **options)
    assert_same_statistics(resumed, expected, rtol=ROUNDING)
    num_groups = len(list(tmp_path.glob("statistics-*.safetensors")))
    assert len(forwards_of_the_second_run) == 3 * num_groups - 7
    assert_same_statistics(CalibrationStatistics.load(path), expected, rtol=ROUNDING)

    model.register_forward_pre_hook(lambda *_: pytest.fail("all groups were there"))
    run(model, batches_of(task), **options)


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2)])
def test_a_part_of_another_number_of_batches_is_not_taken_for_complete(first, second, tmp_path, caplog):
    """Of an interrupted run, or of one whose index alone was deleted."""
    task, path = TASKS["bert"], tmp_path / "statistics.safetensors"
    options = {"statistics_file": path, "max_statistics_memory": LIMIT}
    run(task.model(), batches_of(task), max_batches=first, **options)
    path.with_name("statistics.safetensors.index.json").unlink()
    _, expected = run(task.model(), batches_of(task), max_batches=second)
    _, statistics = run(task.model(), batches_of(task), max_batches=second, **options)
    assert statistics.num_batches == second
    assert_same_statistics(statistics, expected, rtol=ROUNDING)
    assert caplog.text == ""


def test_all_files_to_delete_are_named(tmp_path, caplog):
    task, path = TASKS["bert"], tmp_path / "statistics.safetensors"
    options = {"statistics_file": path, "max_statistics_memory": LIMIT}
    run(task.model(), batches_of(task), **options)
    files = set(tmp_path.iterdir())
    run(task.model(), batches_of(task), **options)
    assert all(str(file) in caplog.text for file in files)
    caplog.clear()
    path.with_name("statistics.safetensors.index.json").unlink()
    run(task.model(), batches_of(task), **options)
    assert caplog.text.count("No batch is read for a part of the layers") == len(files) - 1


def test_an_interrupted_run_goes_on_with_another_limit_that_makes_as_many_groups(tmp_path):
    task, path = TASKS["bert"], tmp_path / "statistics.safetensors"
    _, expected = run(task.model(), batches_of(task))
    model, forwards = task.model(), []

    def fail_in_the_last_group(*_):
        forwards.append(1)
        if len(forwards) > 12:
            raise PowerCutError

    model.register_forward_pre_hook(fail_in_the_last_group)
    with pytest.raises(PowerCutError):
        run(model, batches_of(task), statistics_file=path, max_statistics_memory=4_600)  # 3, 2, 3, 3, 2 layers
    _, resumed = run(
        task.model(), batches_of(task), statistics_file=path, max_statistics_memory=5_200
    )  # 4, 2, 4, 2, 1
    assert len(list(tmp_path.glob("statistics-*-of-00005.safetensors"))) == 5
    assert list(resumed) == list(expected)
    assert_same_statistics(resumed, expected, rtol=ROUNDING)


def interrupted(batches):
    yield from batches[:2]
    raise PowerCutError


@pytest.mark.parametrize("limit", [LIMIT, "1MiB"])
def test_a_run_that_was_interrupted_without_a_limit_goes_on_with_one(tmp_path, limit):
    task, path = TASKS["bert"], tmp_path / "statistics.safetensors"
    _, expected = run(task.model(), batches_of(task))
    with pytest.raises(PowerCutError):
        run(task.model(), interrupted(batches_of(task)), statistics_file=path, save_every=1)
    model, forwards = task.model(), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    _, resumed = run(model, batches_of(task), statistics_file=path, max_statistics_memory=limit)
    num_groups = len(list(tmp_path.glob("statistics-*.safetensors")))
    assert len(forwards) == max(1, num_groups)  # a pass over the third batch for each
    assert path.exists() == (num_groups == 0)
    for statistics in (resumed, CalibrationStatistics.load(path)):
        assert statistics.num_batches == 3
        assert_same_statistics(statistics, expected, rtol=ROUNDING)


@pytest.mark.parametrize("first", [None, LIMIT, 2 * LIMIT])
@pytest.mark.parametrize("second", [None, LIMIT])
def test_complete_statistics_are_used_whatever_the_limit_was(tmp_path, first, second):
    task, path = TASKS["bert"], tmp_path / "statistics.safetensors"
    _, expected = run(task.model(), batches_of(task), statistics_file=path, max_statistics_memory=first)
    files = set(tmp_path.iterdir())
    model = task.model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    _, statistics = run(model, batches_of(task), statistics_file=path, max_statistics_memory=second)
    assert statistics.memory_limit == second
    assert_same_statistics(statistics, expected, rtol=0)
    assert set(tmp_path.iterdir()) == files


def test_of_an_index_and_a_single_file_the_one_that_was_written_last_counts(tmp_path):
    task, path = TASKS["bert"], tmp_path / "statistics.safetensors"
    _, single = run(task.model(), batches_of(task)[:1])
    _, whole = run(task.model(), batches_of(task), statistics_file=path, max_statistics_memory=LIMIT)
    index = Path(f"{path}.index.json")
    content = index.read_text()
    single.save(path)
    assert CalibrationStatistics.load(path).num_batches == 1
    index.write_text(content)  # the process ended between the two steps, or an older version left both
    loaded = CalibrationStatistics.load(path)
    assert loaded.num_batches == 3
    assert_same_statistics(loaded, whole, rtol=0)


def test_an_index_whose_files_are_missing_is_an_error_that_names_them(tmp_path):
    path = tmp_path / "statistics.safetensors"
    run(tiny_bert(), batches_of(TASKS["bert"]), statistics_file=path, max_statistics_memory=LIMIT)
    part = min(tmp_path.glob("statistics-*.safetensors"))
    part.unlink()
    for read in (CalibrationStatistics.load, lambda path: run(tiny_bert(), [], statistics_file=path)):
        with pytest.raises(FileNotFoundError, match=rf"index.json names .*{part.name}.*calibrate again"):
            read(path)


def test_layers_that_share_their_input_share_its_covariance_also_when_read_from_files(tmp_path):
    path = tmp_path / "statistics.safetensors"
    _, statistics = run(tiny_bert(), batches_of(TASKS["bert"]), statistics_file=path, max_statistics_memory="64KB")
    attention = "bert.encoder.layer.0.attention.self"
    layers = dict(statistics)
    assert layers[f"{attention}.query"].input is layers[f"{attention}.key"].input
    statistics.save(tmp_path / "whole.safetensors")
    assert_same_statistics(CalibrationStatistics.load(tmp_path / "whole.safetensors"), statistics, rtol=0)


def test_statistics_in_files_merge_and_save_as_those_in_memory(tmp_path):
    """What is read of a layer goes before the next one is read: nothing may be told by where it lay."""
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(20)]).double()
    in_memory, in_files = [], []
    for seed in range(2):
        batches = [{"x": randn(seed, 5, 6)}]
        for limit, results in ((None, in_memory), ("4KB", in_files)):
            config = JactusConfig(target_modules="all-linear")
            options = {"loss_fn": square_loss, "max_statistics_memory": limit, "progress_bar": False}
            results.append(calibrate(model, config, batches, **options))
    expected = in_memory[0].merge(in_memory[1])
    for other in (in_files[1], in_memory[1]):
        assert_same_statistics(in_files[0].merge(other), expected, rtol=ROUNDING)
    in_files[0].save(tmp_path / "whole.safetensors")
    assert_same_statistics(CalibrationStatistics.load(tmp_path / "whole.safetensors"), in_memory[0], rtol=ROUNDING)


def test_layers_share_their_input_also_in_a_merger_of_files():
    _, statistics = run(tiny_bert(), batches_of(TASKS["bert"]), max_statistics_memory="64KB")
    merged = statistics.merge(statistics)
    attention = "bert.encoder.layer.0.attention.self"
    assert merged[f"{attention}.query"].input is merged[f"{attention}.value"].input
    assert merged[f"{attention}.query"].input is not merged[f"{attention.replace('0', '1')}.query"].input


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("1KB", r"`max_statistics_memory` is 1,000 bytes, but bert.* alone needs \d+,\d+\..*`exclude_modules`"),
        ("much", "`max_statistics_memory` must be a positive number of bytes, or a size such as .*; got 'much'"),
        (0, "must be a positive number of bytes.*got 0"),
        (-5, "must be a positive number of bytes.*got -5"),
    ],
)
def test_a_limit_that_cannot_be_met_is_refused_before_the_model_runs(limit, message):
    model = tiny_bert()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=message):
        run(model, batches_of(TASKS["bert"]), max_statistics_memory=limit)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "{"])
def test_a_damaged_index_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "statistics.safetensors"
    Path(f"{path}.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"statistics.safetensors.index.json is damaged.*calibrate again"):
        CalibrationStatistics.load(path)
