"""`CalibrationStatistics`: sums that add up, in memory and in files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peft_jactus import _files
from peft_jactus.calibration.statistics import CalibrationStatistics
from peft_jactus.calibration.statistics_files import read_metadata
from peft_jactus.numerics.moments import LayerStatistics
from tests.support.strategies import moment_from, randn

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of less than 50 terms of order 1, in any order


def assert_moments_equal(one, other):
    for name in ("scatter", "mean", "quartic_sum", "absolute_sum"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **EXACT)
    assert one.num_tokens == other.num_tokens


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
    with pytest.raises(ValueError, match=r"statistics .*is damaged.*calibrate again"):
        CalibrationStatistics.load(path)


def test_loading_something_else_says_it_is_damaged_or_foreign(tmp_path):
    text, foreign = tmp_path / "text", tmp_path / "foreign"
    text.write_text("These are no statistics, but they are long enough to hold a header length.")
    with pytest.raises(ValueError, match=r"text .*is damaged"):
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
        monkeypatch.setattr(_files, "save_file", write_half)
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
