"""A sample of the sweep over model types, and what is told of a failure."""

import contextlib
import sys

import pytest

from benchmarks.model_types import __main__, cases, classes, journey, shrinking, tables, workers

# An encoder, one with merged names, one with rules of its own for new weights, a decoder, experts, an encoder-decoder,
# images, sounds, images with text, a state-space model.
SAMPLE = ["bert", "nomic_bert", "xlstm", "gpt2", "mixtral", "t5", "convnext", "wav2vec2", "clip", "mamba"]
DENSE = {"mamba"}  # reads a weight without calling its layer
FORK = "ignore:.*fork:DeprecationWarning"  # of Python 3.12, if pytest has threads


@pytest.mark.filterwarnings(FORK)
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_goes_all_the_way(model_type):
    record = workers.measured(model_type, seconds=300)
    assert record["outcome"] == ("setting" if model_type in DENSE else "passed"), record
    assert record["layers"] > 0
    assert record["loading_difference"] <= journey.LOADING_TOLERANCE


@pytest.mark.parametrize(("outcome", "code"), [("passed", None), ("unbuilt", None), ("silent", 1), ("unloadable", 1)])
def test_the_command_goes_on_where_it_was_and_ends_with_an_error_if_a_type_is_not_sound(
    tmp_path, monkeypatch, capsys, outcome, code
):
    asked = []

    def measured(model_type, *, seconds):
        asked.append(model_type)
        return {"type": model_type, "outcome": outcome, "stage": "load pivoted", "reason": f"about {seconds:g}"}

    monkeypatch.setattr(__main__, "measured", measured)
    for types in (["bert"], ["bert", "t5"]):
        monkeypatch.setattr(sys, "argv", ["model_types", "run", "--out", str(tmp_path), "--types", *types])
        with pytest.raises(SystemExit) if code else contextlib.nullcontext() as ended:
            __main__.main()
        assert code is None or ended.value.code == code
    assert asked == ["bert", "t5"]
    assert f"   2 {outcome}: " in capsys.readouterr().out


def test_each_family_of_the_table_is_a_type():
    assert set(tables.FAMILIES.values()) <= set(classes.model_types())


def test_a_tensor_that_comes_back_otherwise_is_silent(monkeypatch):
    built = cases.build("bert")
    load = built.auto.from_pretrained

    def load_otherwise(*args, **options):
        model, info = load(*args, **options)
        model.classifier.bias.data.add_(1)
        return model, info

    monkeypatch.setattr(built.auto, "from_pretrained", load_otherwise)
    found = cases.journey(built, journey.Settings(), lambda stage: None)
    assert (found["outcome"], found["stage"]) == ("silent", "load pivoted")
    assert "classifier.bias" in found["reason"]


@pytest.mark.parametrize(
    ("dense", "outcome"),
    [
        (None, "silent"),
        ("DifferenceError: other values of a", "transformers"),
        ("DifferenceError: other values of b", "silent"),
        ("OSError: no file", "silent"),
    ],
)
def test_only_the_very_same_loss_is_transformers_own(dense, outcome):
    found = {"outcome": "silent", "stage": "load pivoted", "reason": "other values of a"}
    assert cases.or_of_transformers(found, dense)["outcome"] == outcome


@pytest.mark.filterwarnings(FORK)
def test_what_hangs_is_ended_and_said(monkeypatch):
    monkeypatch.setattr(
        workers, "measure", lambda model_type, enter: enter("calibrate") or [None for _ in iter(int, 1)]
    )
    record = workers.measured("bert", seconds=1)
    assert (record["outcome"], record["stage"]) == ("failed", "calibrate")
    assert "not done in time" in record["reason"]


@pytest.mark.parametrize("recipe", shrinking.RECIPES)
def test_a_small_config_is_one_of_its_type(recipe):
    config = shrinking.shrunk(classes.config_class_of("llava"), recipe)
    assert config.vision_config.num_hidden_layers == (24 if recipe == "deep" else 2)
    assert config.text_config.vocab_size == shrinking.VOCABULARY
    assert config.image_token_id < shrinking.VOCABULARY
