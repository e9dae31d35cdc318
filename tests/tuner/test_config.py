import copy
import functools
import json
import math

import pytest
import torch
from peft import PeftConfig, get_peft_model

from peft_jactus import JactusConfig, calibrate, plan_ranks
from tests.support.strategies import statistics_of
from tests.support.tiny_models import classified_texts, tiny_bert

# Every field that PEFT's own configs do not have, with a value that is not its default.
OTHER_VALUES = {
    "target_modules": ["query", "value"],
    "exclude_modules": ["pooler"],
    "modules_to_save": ["classifier"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layer",
    "rank_pattern": {"query": 3, r".*\.key": 2},
    "retained_ratio": 0.6,
    "model_ratio": None,
    "max_model_size": None,
    "allocation": "uniform",
    "storage": "factored",
    "decomposition": "svd",
    "weight_energy": 0.9,
    "input_energy": 0.0,
    "gradient_energy": 1.0,
    "shrinkage": 0.25,
    "damping": 1e-3,
    "rank_floor": 0.75,
    "rank_multiple": 16,
    "frozen_bits": None,
    "adaptation_rank": 1,
    "adaptation_init": "inputs",
    "adaptation_space": "free",
    "train_core": True,
    "bias_correction": False,
    "keep_base_weights": True,
    "init_weights": False,
    "layer_ranks": {},
    "layer_energy": {},
    "id2label": {"0": "yes", "1": "no"},
    "peft_jactus_version": None,
    "adapter_format": None,
}


# -- checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "retained_ratio": [0, -0.1, 1.1, 80, math.nan],
        "weight_energy": [0, -0.1, 1.1, math.nan],
        "input_energy": [-0.1, 1.1, math.nan],
        "gradient_energy": [-0.1, 1.1, math.nan],
        "rank_floor": [-0.1, 1.1, math.nan],
        "rank_multiple": [0, -8, 1.5, True],
        "adaptation_rank": [-1, 1.5, True, None],
        "adaptation_init": ["zeros", 1],
        "adaptation_space": ["rows", None],
        "shrinkage": [-0.1, 1.1, math.nan, "oas", None, True],
        "damping": [0, -1e-6, math.nan, math.inf],
        "rank_pattern": [{"query": 0}, {"query": -1}, {"query": 2.5}, {"query": "8"}, {"query": None}],
        "allocation": ["greedy", None],
        "storage": ["dense", None],
        "decomposition": ["lora", None],
        "init_weights": ["gaussian", None],
    }.items(),
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^`{name}` must"):
            JactusConfig(**{name: value})


@pytest.mark.parametrize(
    "name", ["retained_ratio", "weight_energy", "input_energy", "gradient_energy", "damping", "rank_floor"]
)
@pytest.mark.parametrize("value", ["0.8", None, True], ids=repr)
def test_what_is_no_number_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(TypeError, match=f"^`{name}` must be a number; got {value!r}"):
        JactusConfig(**{name: value})


USES = {
    "get_peft_model": get_peft_model,
    "plan_ranks": functools.partial(plan_ranks, progress_bar=False),
    "calibrate": lambda model, config: calibrate(model, config, classified_texts(), progress_bar=False),
}


@pytest.mark.parametrize("use", sorted(USES))
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("retained_ratio", 50, ValueError), ("damping", "small", TypeError), ("rank_floor", 7, ValueError)],
)
def test_a_bad_value_that_was_set_later_is_refused_where_the_config_is_used(name, value, error, use):
    model = tiny_bert()
    modules = dict(model.named_modules())
    config = JactusConfig(target_modules=["query"], decomposition="svd", retained_ratio=0.5)
    setattr(config, name, value)
    with pytest.raises(error, match=f"`{name}`"):
        USES[use](model, config)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("value", [None, ["query"], 8], ids=repr)
def test_a_rank_pattern_is_a_dict(value):
    with pytest.raises(TypeError, match=r"^`rank_pattern` must be a dict"):
        JactusConfig(rank_pattern=value)


@pytest.mark.parametrize(
    "options",
    [
        {"retained_ratio": 1.0},
        {"retained_ratio": 1e-3},
        {"weight_energy": 1},
        {"input_energy": 0, "gradient_energy": 0},
        {"input_energy": 1, "gradient_energy": 1},
        {"shrinkage": 0},
        {"shrinkage": 1},
        {"rank_floor": 0},
        {"rank_floor": 1},
    ],
    ids=str,
)
def test_the_ends_of_each_range_are_allowed_where_they_mean_something(options):
    config = JactusConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("option", [{"layers_to_transform": [0]}, {"layers_pattern": "layer"}])
def test_layer_indices_and_a_regular_expression_exclude_each_other(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}` cannot be used when `target_modules` is a str"):
        JactusConfig(target_modules=r".*query", **option)


def test_a_layers_pattern_needs_layer_indices():
    with pytest.raises(ValueError, match="`layers_to_transform` must also be specified"):
        JactusConfig(target_modules=["query"], layers_pattern="layer")


# -- saving -----------------------------------------------------------------------------------------------


def test_all_fields_are_covered_here():
    own = set(JactusConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert own == {*OTHER_VALUES, "statistics"}  # which is never saved


@pytest.mark.parametrize(
    "options",
    [
        {},
        OTHER_VALUES,
        {"model_ratio": 0.5},
        {"max_model_size": "60MB"},
        {"frozen_bits": 8, "adaptation_space": "retained"},
    ],
    ids=["defaults", "other_values", "model_ratio", "max_model_size", "adaptation only"],
)
def test_a_config_comes_back_from_its_json_with_all_values(tmp_path, options):
    saved = JactusConfig(**copy.deepcopy(options))
    saved.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, JactusConfig)
    assert loaded == saved
    for name in options:
        assert getattr(loaded, name) == getattr(saved, name)


def test_other_values_are_not_the_defaults():
    defaults = JactusConfig()
    written_by_the_package = {"layer_ranks", "layer_energy", "peft_jactus_version", "adapter_format"}
    # By a budget, or a core that trains.
    excluded_by_others = {"model_ratio", "max_model_size", "frozen_bits", "adaptation_space"}
    for name in set(OTHER_VALUES) - written_by_the_package - excluded_by_others:
        assert getattr(defaults, name) != getattr(JactusConfig(**OTHER_VALUES), name), name


def test_ranks_are_saved_and_the_saved_form_asks_for_the_checkpoint(tmp_path):
    config = JactusConfig(layer_ranks={"a": 3, "b": None}, layer_energy={"a": 0.5, "b": 1.0})
    config.save_pretrained(tmp_path)
    assert config.init_weights is True  # this object can make a further adapter
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.layer_ranks == {"a": 3, "b": None}
    assert loaded.layer_energy == {"a": 0.5, "b": 1.0}
    assert loaded.from_checkpoint
    assert not config.from_checkpoint
    assert loaded.peft_jactus_version


def test_statistics_are_never_saved_or_compared(tmp_path):
    config = JactusConfig(target_modules=["query"])
    config.statistics = {"query": statistics_of(torch.eye(2).double(), torch.eye(3).double())}
    assert "statistics" not in config.to_dict()
    config.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert "statistics" not in json.loads(text)
    assert PeftConfig.from_pretrained(tmp_path).statistics is None
    assert config == JactusConfig(target_modules=["query"])


# -- use --------------------------------------------------------------------------------------------------


def test_without_calibration_the_error_says_what_to_call_and_the_model_is_unchanged():
    model = tiny_bert()
    modules = dict(model.named_modules())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = JactusConfig(target_modules=["query"])
    with pytest.raises(ValueError, match=r'Call `peft_jactus.calibrate.*`decomposition="svd"`'):
        get_peft_model(model, config)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not config.layer_ranks


def test_statistics_of_other_layers_are_refused_and_the_model_is_unchanged():
    model = tiny_bert()
    modules = dict(model.named_modules())
    config = JactusConfig(target_modules=["query"])
    calibrate(model, config, classified_texts(), progress_bar=False)
    other = JactusConfig(target_modules=["query", "key"])
    other.statistics = config.statistics
    with pytest.raises(ValueError, match=r"`config.statistics` has no statistics of bert.*key"):
        get_peft_model(model, other)
    assert dict(model.named_modules()) == modules


def test_a_model_releases_the_statistics_it_was_made_from():
    model = tiny_bert()
    config = JactusConfig(target_modules=["query"], retained_ratio=0.5)
    statistics = calibrate(model, config, classified_texts(), progress_bar=False)
    assert config.statistics is statistics
    get_peft_model(model, config)
    assert config.statistics is None


def test_data_free_svd_needs_no_calibration():
    config = JactusConfig(target_modules=["query"], decomposition="svd", retained_ratio=0.5)
    get_peft_model(tiny_bert(), config)
    assert set(config.layer_ranks) == {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}
