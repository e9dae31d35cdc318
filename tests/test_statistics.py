import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from peft_jactus.calibration import statistics as statistics_module
from peft_jactus.numerics.moments import LayerStatistics, SecondMoment
from peft_jactus.calibration.statistics import CalibrationStatistics, read_metadata
from peft_jactus.numerics.metrics import regularized_covariance
from tests import oracles
from tests.strategies import dims, moment_from, randn, seeds

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of less than 50 terms of order 1, in any order
num_vectors = st.integers(1, 40)


def assert_moments_equal(one, other):
    for name in ("scatter", "mean", "quartic_sum", "absolute_sum"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **EXACT)
    assert one.num_tokens == other.num_tokens


# -- SecondMoment -----------------------------------------------------------------------------------------


@given(seed=seeds, dim=dims, num=num_vectors)
def test_covariance_and_mean_are_those_of_the_vectors(seed, dim, num):
    vectors = randn(seed, num, dim)
    moment = moment_from(vectors)
    torch.testing.assert_close(moment.covariance, oracles.covariance(vectors), **EXACT)
    mean = oracles.mean(vectors)
    around_mean = oracles.covariance(vectors - mean) + torch.outer(mean, mean) / num
    torch.testing.assert_close(moment.centred_covariance, around_mean, **EXACT)
    torch.testing.assert_close(moment.mean, oracles.mean(vectors), **EXACT)
    assert (moment.dim, moment.num_tokens) == (dim, num)


@given(data=st.data(), seed=seeds, dim=dims, num=num_vectors)
def test_sums_do_not_depend_on_batches_or_order(data, seed, dim, num):
    vectors = randn(seed, num, dim)
    order = torch.tensor(data.draw(st.permutations(range(num))))
    cuts = data.draw(st.lists(st.integers(0, num), max_size=4).map(sorted))  # empty batches, too
    moment = SecondMoment.zeros(dim, dtype=torch.float64)
    for part in torch.tensor_split(vectors[order], cuts):
        moment.update_(part)
    assert_moments_equal(moment, moment_from(vectors))


@given(seed=seeds, dim=dims, sizes=st.tuples(num_vectors, num_vectors, num_vectors))
def test_merging_is_associative_and_equals_the_whole(seed, dim, sizes):
    vectors = randn(seed, sum(sizes), dim)

    def parts():
        return [moment_from(part) for part in vectors.split(sizes)]

    a, b, c = parts()
    a.merge_(b)
    a.merge_(c)  # (a + b) + c
    d, e, f = parts()
    e.merge_(f)
    d.merge_(e)  # a + (b + c)
    assert_moments_equal(a, d)
    assert_moments_equal(a, moment_from(vectors))


def test_merging_keeps_the_other_and_refuses_another_dimension():
    vectors = randn(0, 5, 3)
    mine, other = moment_from(vectors[:2]), moment_from(vectors[2:])
    mine.merge_(other)
    assert_moments_equal(other, moment_from(vectors[2:]))
    with pytest.raises(ValueError, match="`other` must have dimension 3; got 4"):
        mine.merge_(moment_from(randn(0, 1, 4)))


def test_clone_shares_nothing():
    moment = moment_from(randn(0, 5, 3))
    moment.clone().update_(randn(1, 5, 3))
    assert_moments_equal(moment, moment_from(randn(0, 5, 3)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_is_finite_notices_one_bad_entry(bad):
    vectors = randn(0, 5, 3)
    assert moment_from(vectors).is_finite()
    vectors[2, 1] = bad
    assert not moment_from(vectors).is_finite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vectors_are_summed_in_float32(dtype):
    """4096 ones and a half: the sum would stall at 256 in bfloat16 and at 2048 in float16."""
    moment = moment_from(torch.ones(4097, 1, dtype=dtype), dtype=torch.float32)
    assert 4097 * float(moment.covariance) == float(moment.quartic_sum) == float(moment.absolute_sum) == 4097


# Float32 sums of 20,000 squares.
FLOAT32_SUMS = 1e-5


def nearly_constant(seed, num, dim, *, mean, deviation):
    """Vectors whose first entry hardly varies, rounded to float32."""
    vectors = randn(seed, num, dim)
    vectors[:, 0] = mean + deviation * vectors[:, 0]
    return vectors.float()


@pytest.mark.parametrize("num_batches", [1, 100])
@pytest.mark.parametrize(("mean", "deviation"), [(3.1, 0.0), (3.1, 3e-3), (-100.0, 1e-2), (0.5, 1e-5)])
def test_the_variance_of_an_entry_that_hardly_varies_has_correct_digits(num_batches, mean, deviation):
    parts = [nearly_constant(seed, 200, 6, mean=mean, deviation=deviation) for seed in range(num_batches)]
    vectors = torch.cat(parts)
    moment = SecondMoment.zeros(6)
    for part in parts:
        moment.update_(part)
    exact = moment_from(vectors.double())
    assert_variances_close(moment, exact)
    halves = [moment_from(half, dtype=torch.float32) for half in vectors.sort(0).values.tensor_split(2)]
    halves[0].merge_(halves[1])  # of which one has the smaller values, the other the larger ones
    assert_variances_close(halves[0], moment_from(vectors.double().sort(0).values))


def assert_variances_close(moment, exact):
    """Compare entries of the covariance around the mean with the deviations, and the uncentred one with the sizes."""
    deviations, sizes = exact.centred_covariance.diagonal().sqrt(), exact.covariance.diagonal().sqrt()
    for name, scales in (("centred_covariance", deviations), ("covariance", sizes)):
        errors = (getattr(moment, name) - getattr(exact, name)).abs() / torch.outer(scales, scales)
        assert float(errors.max()) < FLOAT32_SUMS, name
    assert float(((moment.mean - exact.mean) / sizes).abs().max()) < 1e-7
    assert float(torch.linalg.eigvalsh(moment.centred_covariance)[0]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_entry_that_never_varies_leaves_the_metric_positive_definite(dtype):
    moment = SecondMoment.zeros(8, dtype=dtype)
    for seed in range(200):
        moment.update_(nearly_constant(seed, 64, 8, mean=30.1, deviation=0.0))
    covariance = regularized_covariance(moment, shrinkage=0.0, damping=1e-6, centred=True)
    assert float(torch.linalg.eigvalsh(covariance)[0]) > 0


def test_merging_with_no_vectors_changes_nothing():
    none, some = SecondMoment.zeros(3, dtype=torch.float64), moment_from(randn(0, 5, 3))
    some.merge_(none)
    assert_moments_equal(some, moment_from(randn(0, 5, 3)))
    none.merge_(SecondMoment.zeros(3))
    assert none.is_finite()
    none.merge_(some)
    assert_moments_equal(none, some)


@given(seed=seeds, dim=dims, num=num_vectors)
def test_the_scatter_around_any_point_is_that_of_the_vectors(seed, dim, num):
    vectors, point = randn(seed, num, dim), 3 * randn(seed + 1, dim)
    expected = num * oracles.covariance(vectors - point)
    torch.testing.assert_close(moment_from(vectors).scatter_around(point), expected, **EXACT)


# -- Ledoit and Wolf --------------------------------------------------------------------------------------


@given(seed=seeds, dim=dims, num=num_vectors)
def test_shrinkage_is_ledoit_and_wolfs(seed, dim, num):
    vectors = randn(seed, num, dim) * torch.logspace(0, -1, dim, dtype=torch.float64)
    if dim == 1:  # its own target: nothing to choose
        assert moment_from(vectors).ledoit_wolf_shrinkage() == 1.0
        return
    expected = oracles.ledoit_wolf_shrinkage(vectors)
    assert moment_from(vectors).ledoit_wolf_shrinkage() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("num", [5, 20, 80])
def test_shrinkage_brings_the_covariance_closer_to_the_true_one(num):
    scales = torch.logspace(0, -1, 20, dtype=torch.float64)
    true = torch.diag(scales.square())
    target = torch.eye(20, dtype=torch.float64)
    plain_error = shrunk_error = 0.0
    for seed in range(20):
        moment = moment_from(randn(seed, num, 20) * scales)
        C, rho = moment.covariance, moment.ledoit_wolf_shrinkage()
        shrunk = (1 - rho) * C + rho * C.diagonal().mean() * target
        plain_error += float((C - true).square().sum())
        shrunk_error += float((shrunk - true).square().sum())
    assert shrunk_error < plain_error


def test_shrinkage_vanishes_with_many_vectors():
    scales = torch.logspace(0, -1, 5, dtype=torch.float64)
    shrinkages = [moment_from(randn(0, num, 5) * scales).ledoit_wolf_shrinkage() for num in (10, 100, 10_000)]
    assert shrinkages == sorted(shrinkages, reverse=True)
    assert shrinkages[-1] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**20])  # powers of two: scaling itself rounds nothing
def test_shrinkage_does_not_depend_on_the_scale(dtype, scale):
    vectors = randn(0, 10, 4) * torch.logspace(0, -1, 4, dtype=torch.float64)
    shrinkage = moment_from(vectors, dtype=dtype).ledoit_wolf_shrinkage()
    assert 0.01 < shrinkage < 1
    scaled = moment_from(scale * vectors, dtype=dtype).ledoit_wolf_shrinkage()
    assert scaled == pytest.approx(shrinkage, rel=1e-12)


# -- CalibrationStatistics: merging -----------------------------------------------------------------------


def calibration_statistics(seed, num, *, num_batches=2):
    """Layers q and k share their input, as they do in attention."""
    shared = moment_from(randn(seed, num, 4))
    layers = {
        "q": LayerStatistics(shared, moment_from(randn(seed + 1, num, 3))),
        "k": LayerStatistics(shared, moment_from(randn(seed + 2, num, 2))),
        "out": LayerStatistics(moment_from(randn(seed + 3, num, 3)), moment_from(randn(seed + 4, num, 4))),
    }
    return CalibrationStatistics(layers, num_batches=num_batches)


def test_merged_statistics_add_up_and_shared_inputs_stay_shared():
    one, other = calibration_statistics(0, 5), calibration_statistics(10, 7, num_batches=3)
    merged = one.merge(other)
    assert list(merged) == ["q", "k", "out"]
    assert merged.num_batches == 5
    assert merged["q"].num_tokens == 12
    assert merged["q"].input is merged["k"].input
    assert_moments_equal(merged["k"].gradient, moment_from(torch.cat([randn(2, 5, 2), randn(12, 7, 2)])))
    assert_moments_equal(one["q"].input, moment_from(randn(0, 5, 4)))  # untouched


def test_merging_refuses_other_layers_and_names_them():
    one = calibration_statistics(0, 5)
    other = CalibrationStatistics({name: one[name] for name in ("q", "k")})
    with pytest.raises(ValueError, match=r"same layers.*\['out'\]"):
        one.merge(other)


class ReadAgain(Mapping):
    """Layers that are made when they are asked for, and go when nobody needs them."""

    def __init__(self, seed, num_layers):
        self.seeds = {f"layer{number}": seed + 2 * number for number in range(num_layers)}

    def __getitem__(self, name):
        seed = self.seeds[name]
        return LayerStatistics(moment_from(randn(seed, 5, 3)), moment_from(randn(seed + 1, 5, 3)))

    def __iter__(self):
        return iter(self.seeds)

    def __len__(self):
        return len(self.seeds)


def test_layers_that_go_after_they_were_read_are_not_taken_for_one_another(tmp_path):
    one, other = (CalibrationStatistics(ReadAgain(seed, 50)) for seed in (0, 1000))
    merged = one.merge(other)
    one.save(tmp_path / "statistics")
    saved = CalibrationStatistics.load(tmp_path / "statistics")
    for name, layer in one.items():
        for side in ("input", "gradient"):
            expected = getattr(layer, side)
            assert_moments_equal(getattr(saved[name], side), expected)
            expected.merge_(getattr(other[name], side))
            assert_moments_equal(getattr(merged[name], side), expected)


# -- CalibrationStatistics: files -------------------------------------------------------------------------


def test_save_and_load_are_exact_and_keep_sharing(tmp_path):
    saved, path = calibration_statistics(0, 5), tmp_path / "made" / "on" / "demand.safetensors"
    saved.save(path, metadata={"complete": "true"})
    loaded = CalibrationStatistics.load(path)
    assert list(loaded) == list(saved)
    assert loaded.num_batches == saved.num_batches
    assert loaded["q"].input is loaded["k"].input
    assert read_metadata(path)["complete"] == "true"
    for name in saved:
        for one, other in (
            (saved[name].input, loaded[name].input),
            (saved[name].gradient, loaded[name].gradient),
        ):
            assert one.num_tokens == other.num_tokens
            for key in ("scatter", "mean", "quartic_sum", "absolute_sum"):
                assert torch.equal(getattr(one, key), getattr(other, key))
                assert getattr(one, key).dtype == getattr(other, key).dtype


def test_shared_inputs_are_stored_once(tmp_path):
    calibration_statistics(0, 5).save(tmp_path / "statistics")
    numbers = json.loads(read_metadata(tmp_path / "statistics")["layers"])
    assert numbers["q"][0] == numbers["k"][0]
    assert len({number for pair in numbers.values() for number in pair}) == 5


def test_loading_a_missing_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No statistics file at .*nowhere"):
        CalibrationStatistics.load(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.999])
def test_loading_a_truncated_file_says_it_is_damaged(tmp_path, kept):
    path = tmp_path / "statistics"
    calibration_statistics(0, 5).save(path)
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(ValueError, match=r"statistics is damaged.*calibrate again"):
        CalibrationStatistics.load(path)


def test_loading_something_else_says_it_is_damaged_or_foreign(tmp_path):
    text, foreign = tmp_path / "text", tmp_path / "foreign"
    text.write_text("These are no statistics, but they are long enough to hold a header length.")
    with pytest.raises(ValueError, match="text is damaged"):
        CalibrationStatistics.load(text)
    save_file({"weight": torch.zeros(2)}, foreign, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"foreign is not a statistics file.*None"):
        CalibrationStatistics.load(foreign)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": "999"},
        {"num_batches": None},
        {"num_batches": "many"},
        {"num_tokens": "[1]"},
        {"num_tokens": "[1, "},
        {"layers": None},
        {"layers": '{"q": [0, 99]}'},
    ],
    ids=str,
)
def test_loading_a_wrong_header_is_a_value_error_that_names_the_file(tmp_path, change):
    path = tmp_path / "statistics"
    calibration_statistics(0, 5).save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        header = {k: v for k, v in (file.metadata() | change).items() if v is not None}
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=f"{path}.*[Cc]alibrate again"):
        CalibrationStatistics.load(path)


def test_a_file_of_an_earlier_format_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "statistics"
    calibration_statistics(0, 5).save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata() | {"format_version": "2"}
    save_file({"0.outer_sum": torch.zeros(4, 4)}, path, metadata=header)
    with pytest.raises(ValueError, match=r"format version 3; its header says '2'.*another file, or delete this one"):
        CalibrationStatistics.load(path)


@pytest.mark.parametrize("failing", ["write", "sync"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "statistics"
    old = calibration_statistics(0, 5)
    old.save(path)

    def write_half(tensors, target, metadata):
        save_file(tensors, target, metadata=metadata)
        os.truncate(target, Path(target).stat().st_size // 2)
        raise OSError("No space left on device")

    def refuse_to_sync(descriptor):
        raise OSError("No space left on device")

    if failing == "write":
        monkeypatch.setattr(statistics_module, "save_file", write_half)
    else:
        monkeypatch.setattr(os, "fsync", refuse_to_sync)
    with pytest.raises(OSError, match="No space left"):
        calibration_statistics(1, 5).save(path)
    assert_moments_equal(CalibrationStatistics.load(path)["q"].input, old["q"].input)
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_read_like_a_mapping():
    statistics = calibration_statistics(0, 5)
    assert len(statistics) == 3
    assert "q" in statistics
    assert repr(statistics) == "CalibrationStatistics(3 layers, 2 batches)"
    with pytest.raises(KeyError, match="v"):
        statistics["v"]
