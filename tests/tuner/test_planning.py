"""What each rank is worth, which ranks a budget buys, and the plan that says so before anything is compressed."""

import re
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_jactus import JactusConfig, export_compressed, plan_ranks, plot_plan, rank_summary
from peft_jactus.errors import NumericalWarning
from peft_jactus.numerics.allocation import stored_parameters
from peft_jactus.numerics.approximation import project_weight
from peft_jactus.numerics.factorization import choose_ranks, factorize
from peft_jactus.numerics.moments import LayerStatistics
from peft_jactus.tuner import planning
from peft_jactus.tuner.targeting import log_once
from tests.support import oracles
from tests.support.compressed_models import calibrated, perturb_cores_, tiny_gpt2, tiny_llama
from tests.support.options import decomposition_options, factorization_options
from tests.support.strategies import moment_from, randn
from tests.support.weighted_layers import (
    EXACT,
    OPTIONS,
    SHAPES,
    some_weights,
    their_statistics,
    vectors_and_statistics,
)

# Float64 rounding: all entries are of order 1, and covariances of 40 Gaussian vectors well conditioned.
ROUNDING = 1e-10


@pytest.fixture
def weights():
    return some_weights()


@pytest.fixture
def statistics():
    return their_statistics()


def linear(weight, *, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight.data = weight
    return layer


def plan(weights, statistics, options=OPTIONS, *, with_bias=(), fixed_ranks=None, keep_bytes=planning.KEEP_BYTES):
    """What the tuner does before it replaces layers."""
    layers = {name: linear(weight, bias=name in with_bias) for name, weight in weights.items()}
    measured = planning.measure_gains(
        layers, statistics, options, keep_bytes=keep_bytes, owners=None, progress_bar=False
    )
    allocation = choose_ranks(measured.gains, options, fixed_ranks or {})
    energy_kept = {name: measured.gains[name].energy_kept(rank) for name, rank in allocation.ranks.items()}
    return SimpleNamespace(allocation=allocation, energy_kept=energy_kept, projections=measured.projections)


# -- measuring and choosing ranks -------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_plan_covers_all_layers_within_the_budget(weights, statistics, allocation, storage):
    options = factorization_options(decomposition=EXACT, retained_ratio=0.6, allocation=allocation, storage=storage)
    planned = plan(weights, statistics, options).allocation
    assert list(planned.ranks) == list(SHAPES)
    stored = sum(stored_parameters(planned.ranks[name], *SHAPES[name], storage) for name in SHAPES)
    assert planned.num_stored == stored <= planned.budget == int(0.6 * (48 + 96 + 96))
    if allocation == "uniform":
        assert planned.ranks == allocate_uniformly(weights, storage)


def allocate_uniformly(weights, storage):
    """The largest rank whose cost is at most 0.6 of the layer."""
    return {
        name: max(r for r in range(1, 9) if stored_parameters(r, *W.shape, storage) <= 0.6 * W.numel())
        for name, W in weights.items()
    }


def test_energy_kept_is_one_minus_the_relative_weighted_error(weights, statistics):
    planned = plan(weights, statistics)
    for name, W in weights.items():
        C_g, C_x = statistics[name].gradient.covariance, statistics[name].input.covariance
        rank = planned.allocation.ranks[name]
        W_r = factorize(W, None, statistics[name], rank, OPTIONS).weight().dense()
        relative = oracles.weighted_error(W - W_r, C_g, C_x) / oracles.weighted_error(W, C_g, C_x)
        assert planned.energy_kept[name] == pytest.approx(1 - relative, abs=ROUNDING)
        assert 0.3 < planned.energy_kept[name] < 1


def test_layers_of_full_rank_keep_all_energy(weights, statistics):
    """Also where the union leaves a part of the weight out."""
    narrow = decomposition_options(weight_energy=0.5, input_energy=0, gradient_energy=0)
    planned = plan(weights, statistics, factorization_options(narrow, retained_ratio=1.0))
    assert planned.allocation.ranks == {"query": 6, "up": 8, "down": 8}
    assert planned.energy_kept == dict.fromkeys(SHAPES, 1.0)


def test_layers_that_see_more_tokens_get_more_rank():
    """A pooler sees one position of each example; its twin sees them all."""
    W = randn(0, 12, 12)
    _, _, few = vectors_and_statistics(1, (12, 12))
    many = LayerStatistics(few.input.clone(), few.gradient.clone())
    for moment in (many.input, many.gradient):
        for _ in range(3):  # eight times the same vectors: equal covariances
            moment.merge_(moment.clone())
    options = factorization_options(decomposition=EXACT, retained_ratio=0.4)  # pays for no dense layer
    statistics = {"pooler": few, "encoder": many}
    ranks = plan({"pooler": W, "encoder": W}, statistics, options).allocation.ranks
    assert ranks["encoder"] > ranks["pooler"]


def test_repeating_all_calibration_data_changes_no_rank(weights, statistics):
    doubled = {
        name: LayerStatistics(layer.input.clone(), layer.gradient.clone()) for name, layer in statistics.items()
    }
    for layer in doubled.values():
        layer.input.merge_(layer.input.clone())
        layer.gradient.merge_(layer.gradient.clone())
    assert plan(weights, doubled).allocation == plan(weights, statistics).allocation


def test_each_weight_is_asked_for_once_and_let_go_before_the_next(monkeypatch):
    alive, num_calls = [], 0

    def weight(_):
        nonlocal num_calls
        num_calls += 1
        assert all(reference() is None for reference in alive)
        W = randn(0, 6, 6)
        alive.append(weakref.ref(W))
        return W

    monkeypatch.setattr(planning, "_loaded_weight", weight)
    plan(dict.fromkeys("abc", torch.ones(6, 6)), None, factorization_options(decomposition_options("svd")))
    assert num_calls == 3


def test_fixed_ranks_are_planned_as_asked(weights, statistics):
    planned = plan(weights, statistics, fixed_ranks={"up": 1})
    assert planned.allocation.ranks["up"] == 1
    assert planned.allocation.num_stored <= planned.allocation.budget


def test_a_fixed_rank_above_full_rank_means_full_rank_without_a_warning(weights):
    options = factorization_options(decomposition_options("svd"))
    ranks = plan(weights, None, options, fixed_ranks=dict.fromkeys(SHAPES, 99)).allocation.ranks
    assert ranks == {"query": 6, "up": 8, "down": 8}


@pytest.mark.parametrize(("rank", "expected"), [(3, 3), (4, 8), (5, 8), (7, 8)])
def test_a_fixed_rank_whose_factors_cost_as_much_as_the_weight_means_full_rank(rank, expected):
    """With two factors, rank 4 of 8 x 8 takes 64 numbers."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weight = model[0].weight.detach().clone()
    config = JactusConfig(
        target_modules=["0", "1"],
        decomposition="svd",
        storage="factored",
        adaptation_rank=0,
        retained_ratio=0.9,
        rank_pattern={"0": rank},
    )
    plan = plan_ranks(model, config, progress_bar=False)
    summary = rank_summary(get_peft_model(model, config))
    for row in (plan.summary.rows[0], summary.rows[0]):
        assert (row.rank, row.stays_dense) == (expected, expected == 8)
        assert row.energy_kept == 1 or not row.stays_dense
    assert config.layer_ranks["0"] == expected
    error = torch.linalg.norm(model.get_submodule("0").get_dense_weight("default") - weight)
    assert (error < 1e-5) == (expected == 8)


def test_a_fixed_rank_above_the_union_is_capped_with_a_warning(weights, statistics):
    narrow = decomposition_options(weight_energy=0.1, input_energy=0, gradient_energy=0, shrinkage=0.0, damping=0.0)
    options = factorization_options(decomposition=narrow)
    with pytest.warns(NumericalWarning, match=r"up: rank 7 was asked for.*has 1 dimensions; rank 1 is used"):
        planned = plan(weights, statistics, options, fixed_ranks={"up": 7})
    assert planned.allocation.ranks["up"] == 1


def test_errors_name_the_module(weights, statistics):
    statistics["up"] = LayerStatistics(statistics["up"].input, moment_from(torch.zeros(3, 12, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"^up: `moment` must hold at least one non-zero vector"):
        plan(weights, statistics)
    with pytest.raises(ValueError, match=r"^query: `statistics` must be given"):
        plan(weights, None)


def test_what_the_ranking_keeps_for_the_factors_changes_nothing(weights, statistics):
    planned = plan(weights, statistics)
    assert set(planned.projections) == set(weights)
    for name, projected in planned.projections.items():
        again, kept = (
            factorize(weights[name], None, statistics[name], planned.allocation.ranks[name], OPTIONS, projected=given)
            for given in (None, projected)
        )
        assert torch.equal(again.weight().dense(), kept.weight().dense())


def test_the_ranking_keeps_no_more_than_there_is_memory_for(weights, statistics):
    sizes = {name: projected.num_bytes for name, projected in plan(weights, statistics).projections.items()}
    assert min(sizes.values()) > 0
    first = next(iter(weights))
    assert set(plan(weights, statistics, keep_bytes=sizes[first]).projections) == {first}
    assert plan(weights, statistics, keep_bytes=0).projections == {}


def test_energies_of_layers_with_a_bias_are_those_around_the_mean(weights, statistics):
    planned = plan(weights, statistics, with_bias={"up"})
    centred = project_weight(weights["up"], statistics["up"], EXACT, centred=True)
    kept = float(centred.gains()[: planned.allocation.ranks["up"]].sum()) / centred.total_energy
    assert planned.energy_kept["up"] == pytest.approx(kept)
    assert planned.energy_kept["up"] != pytest.approx(plan(weights, statistics).energy_kept["up"], abs=1e-3)
    uncorrected = factorization_options(decomposition=EXACT, retained_ratio=0.6, bias_correction=False)
    assert (
        plan(weights, statistics, uncorrected, with_bias={"up"}).energy_kept
        == plan(weights, statistics, uncorrected).energy_kept
    )


# -- plan_ranks -------------------------------------------------------------------------------------------


BUDGETS = [{"retained_ratio": 0.6}, {"model_ratio": 0.8}, {"max_model_size": "60KB"}]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: next(iter(budget)))
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_the_plan_is_what_compression_gives(budget, storage, tmp_path):
    model = tiny_llama()
    config = calibrated(model, **{"retained_ratio": 0.8, "storage": storage, **budget})
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planned = plan_ranks(model, config, progress_bar=False)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())
    assert config.statistics is not None
    assert config.layer_ranks == {}
    tuned = get_peft_model(model, config)
    assert planned.ranks == config.layer_ranks
    assert planned.summary == rank_summary(tuned)
    perturb_cores_(tuned)  # or adaptation ranks are still zero, and are left out
    folder = export_compressed(tuned, tmp_path / "compressed", progress_bar=False)
    small = AutoModelForCausalLM.from_pretrained(folder)
    assert planned.num_parameters == small.num_parameters()
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert planned.num_bytes == pytest.approx(written, rel=0.05)  # headers are estimated, and a large part here
    if "max_model_size" in budget:
        assert 55_000 < written <= 60_000
    if "model_ratio" in budget:
        assert 0.77 < planned.model_ratio == small.num_parameters() / tiny_llama().num_parameters() <= 0.8


def test_plans_for_other_budgets_are_those_of_a_config_with_them():
    model = tiny_llama()
    config = calibrated(model)
    planned = plan_ranks(model, config, progress_bar=False)
    for other in planned.curve((0.3, 0.7, 1.0)):
        ratio = other.summary.asked_ratio
        again = plan_ranks(model, replace(config, retained_ratio=ratio), progress_bar=False)
        assert other.ranks == again.ranks == planned.at(ratio).ranks
        assert (other.num_bytes, other.loss_rise) == (again.num_bytes, again.loss_rise)
    with pytest.raises(ValueError, match=r"`retained_ratio` must be in \(0, 1\]; got 1.5"):
        planned.at(1.5)


def test_the_expected_rise_is_half_of_the_weighted_error_for_each_label():
    model = tiny_llama(dtype=torch.float64)
    config = calibrated(model, shrinkage=0.0, damping=1e-12, bias_correction=False)
    statistics = config.statistics
    planned = plan_ranks(model, config, progress_bar=False)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in planned.ranks}
    tuned = get_peft_model(model, config)
    expected = 0.0
    for name, layer in tuned.get_base_model().named_modules():
        if name in weights:
            error = weights[name] - layer.get_factors("default").dense()
            C_g, C_x = statistics[name].gradient.covariance, statistics[name].input.covariance
            expected += statistics[name].num_tokens * float(oracles.weighted_error(error, C_g, C_x)) / 2
    assert planned.loss_rise == pytest.approx(expected / statistics.num_loss_terms, rel=1e-6)
    assert planned.at(1.0).loss_rise == 0


def test_less_is_kept_at_a_higher_expected_loss():
    model = tiny_llama()
    rises = [
        at.loss_rise for at in plan_ranks(model, calibrated(model), progress_bar=False).curve((0.3, 0.5, 0.7, 0.9))
    ]
    assert rises == sorted(rises, reverse=True)
    assert rises[-1] > 0


def test_no_rise_is_given_where_nothing_estimates_it():
    model = tiny_llama()
    for decomposition in ("svd", "svd-llm"):
        planned = plan_ranks(model, calibrated(model, decomposition=decomposition), progress_bar=False)
        assert planned.loss_rise is None
        assert "Expected rise" not in str(planned)


def test_statistics_can_be_given_and_a_wrapped_model_is_planned_as_its_base():
    model = tiny_llama()
    config = calibrated(model)
    statistics, config.statistics = config.statistics, None
    planned = plan_ranks(model, config, statistics, progress_bar=False)
    wrapped = get_peft_model(model, calibrated(model, keep_base_weights=True))
    again = plan_ranks(wrapped, config, statistics, progress_bar=False)
    assert (again.ranks, again.num_bytes, again.model_ratio) == (planned.ranks, planned.num_bytes, planned.model_ratio)


def test_a_tied_head_counts_once():
    model = tiny_gpt2()  # its output layer is its embedding
    planned = plan_ranks(model, calibrated(model), progress_bar=False)
    assert planned.num_parameters / planned.model_ratio == pytest.approx(model.num_parameters())


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"model_ratio": 0.1},
            r"`model_ratio`=0.1 cannot be reached: what is not targeted .* takes \d+\.\d% of the param",
        ),
        ({"max_model_size": 2000}, r"`max_model_size`=2000 cannot be reached: .* takes 0\.0 MB"),
    ],
)
def test_a_budget_that_the_rest_of_the_model_uses_up_is_refused_before_the_work(budget, message):
    model = tiny_llama()
    config = replace(calibrated(model), retained_ratio=0.8, **budget)
    for make in (plan_ranks, get_peft_model):
        with pytest.raises(ValueError, match=message):
            make(model, config)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_a_budget_below_the_least_ranks_is_named_as_it_was_given():
    model = tiny_llama()
    targeted = sum(row.num_dense for row in plan_ranks(model, calibrated(model), progress_bar=False).summary.rows)
    least = 1 - targeted / model.num_parameters()
    config = replace(calibrated(model), retained_ratio=0.8, model_ratio=least + 0.001)
    for make in (plan_ranks, get_peft_model):
        with pytest.warns(NumericalWarning, match=r"^`model_ratio`=0\.\d+ cannot be reached: 0\.\d+ of the target"):
            make(model, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_ratio": 1.5}, r"`model_ratio` must be in \(0, 1\], or None; got 1.5"),
        ({"model_ratio": True}, r"`model_ratio` must be in"),
        (
            {"max_model_size": "small"},
            r"`max_model_size` must be a positive number of bytes, or a size .* got 'small'",
        ),
        ({"max_model_size": "1MB", "model_ratio": 0.5}, r"Give only one budget: `model_ratio` replaces"),
        ({"retained_ratio": 0.5, "model_ratio": 0.5}, r"Give only one budget"),
    ],
)
def test_a_config_has_one_budget(fields, message):
    with pytest.raises(ValueError, match=message):
        JactusConfig(**fields)


def test_printing_a_plan_shows_layers_and_the_whole_model():
    model = tiny_llama()
    text = str(plan_ranks(model, calibrated(model), progress_bar=False))
    assert "model.layers.1.mlp.down_proj" in text
    assert re.search(r"The whole model keeps [\d,]+ of [\d,]+ parameters: \d\d\.\d%, 0\.1 of 0\.1 MB\.", text)
    assert re.search(r"Expected rise of the loss before training: \d\.\d+e-\d\d nats", text)


@pytest.mark.parametrize("decomposition", ["jactus", "svd"])
def test_the_plan_has_a_picture(decomposition, tmp_path):
    model = tiny_llama()
    planned = plan_ranks(model, calibrated(model, decomposition=decomposition), progress_bar=False)
    figure = plot_plan(planned)
    figure.savefig(tmp_path / "plan.png")
    cost_axes, size_axes = figure.axes
    assert cost_axes.get_ylabel().startswith("expected rise" if decomposition == "jactus" else "energy lost")
    sizes = size_axes.lines[0].get_ydata()
    assert sizes[0] < sizes[-1] == pytest.approx(planned.dense_bytes / 1e6)


@pytest.mark.parametrize(("rank_multiple", "said"), [(1, False), (8, False), (2, True)])  # 8 is the default
def test_a_rank_multiple_that_is_not_used_is_said(rank_multiple, said, caplog):
    log_once.cache_clear()
    model = tiny_llama()
    with caplog.at_level("WARNING", "peft_jactus"):
        plan_ranks(model, JactusConfig(target_modules=["gate_proj"], decomposition="svd", rank_multiple=rank_multiple))
    messages = [message for message in caplog.messages if "rank_multiple" in message]
    assert bool(messages) is said
    if said:
        assert "`rank_multiple`=2 is not used for 2 of 2 layers" in messages[0]
