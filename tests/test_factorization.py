import weakref

import pytest
import torch

from peft_jactus.numerics.allocation import stored_parameters
from peft_jactus.numerics.approximation import DecompositionOptions, project_weight
from peft_jactus.numerics.factorization import FactorizationOptions, factorize, plan_ranks
from peft_jactus.numerics.linalg import NumericalWarning
from peft_jactus.numerics.moments import LayerStatistics
from tests import oracles
from tests.strategies import moment_from, randn

NUM_TOKENS = 40
SHAPES = {"query": (6, 8), "up": (12, 8), "down": (8, 12)}
# Float64 rounding: all entries are of order 1, and covariances of 40 Gaussian vectors well conditioned.
ROUNDING = 1e-10

# Statistics as they are, so that the oracle's metric is the package's.
EXACT = DecompositionOptions(shrinkage=0.0, damping=0.0)
OPTIONS = FactorizationOptions(decomposition=EXACT, retained_ratio=0.6)


def vectors_and_statistics(seed, shape, *, num_tokens=NUM_TOKENS):
    out_features, in_features = shape
    inputs = randn(seed, num_tokens, in_features) + 1.0  # a mean that is not zero
    gradients = randn(seed + 1, num_tokens, out_features)
    return inputs, gradients, LayerStatistics(moment_from(inputs), moment_from(gradients))


@pytest.fixture
def weights():
    return {name: randn(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture
def statistics():
    return {name: vectors_and_statistics(10 * seed, shape)[2] for seed, (name, shape) in enumerate(SHAPES.items())}


def plan(weights, statistics, options=OPTIONS, **kwargs):
    getters = {name: lambda weight=weight: weight for name, weight in weights.items()}
    return plan_ranks(getters, statistics, options, progress_bar=False, **kwargs)


# -- plan_ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_plan_covers_all_layers_within_the_budget(weights, statistics, allocation, storage):
    options = FactorizationOptions(decomposition=EXACT, retained_ratio=0.6, allocation=allocation, storage=storage)
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
        W_r = factorize(W, None, statistics[name], rank, OPTIONS).dense()
        relative = oracles.weighted_error(W - W_r, C_g, C_x) / oracles.weighted_error(W, C_g, C_x)
        assert planned.energy_kept[name] == pytest.approx(1 - relative, abs=ROUNDING)
        assert 0.3 < planned.energy_kept[name] < 1


def test_layers_of_full_rank_keep_all_energy(weights, statistics):
    """Also where the union leaves a part of the weight out."""
    narrow = DecompositionOptions(weight_energy=0.5, input_energy=0, gradient_energy=0)
    planned = plan(weights, statistics, FactorizationOptions(narrow, retained_ratio=1.0))
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
    options = FactorizationOptions(decomposition=EXACT, retained_ratio=0.4)  # pays for no dense layer
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


def test_each_weight_is_asked_for_once_and_let_go_before_the_next():
    alive, num_calls = [], 0

    def weight():
        nonlocal num_calls
        num_calls += 1
        assert all(reference() is None for reference in alive)
        W = randn(0, 6, 6)
        alive.append(weakref.ref(W))
        return W

    options = FactorizationOptions(DecompositionOptions("svd"))
    plan_ranks(dict.fromkeys("abc", weight), None, options, progress_bar=False)
    assert num_calls == 3


def test_fixed_ranks_are_planned_as_asked(weights, statistics):
    planned = plan(weights, statistics, fixed_ranks={"up": 1})
    assert planned.allocation.ranks["up"] == 1
    assert planned.allocation.num_stored <= planned.allocation.budget


def test_a_fixed_rank_above_full_rank_means_full_rank_without_a_warning(weights):
    options = FactorizationOptions(DecompositionOptions("svd"))
    ranks = plan(weights, None, options, fixed_ranks=dict.fromkeys(SHAPES, 99)).allocation.ranks
    assert ranks == {"query": 6, "up": 8, "down": 8}


def test_a_fixed_rank_above_the_union_is_capped_with_a_warning(weights, statistics):
    narrow = DecompositionOptions(weight_energy=0.1, input_energy=0, gradient_energy=0, shrinkage=0.0, damping=0.0)
    options = FactorizationOptions(decomposition=narrow)
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
        assert torch.equal(again.dense(), kept.dense())


def test_the_ranking_keeps_no_more_than_there_is_memory_for(weights, statistics):
    sizes = {name: projected.num_bytes for name, projected in plan(weights, statistics).projections.items()}
    assert min(sizes.values()) > 0
    first = next(iter(weights))
    assert set(plan(weights, statistics, keep_bytes=sizes[first]).projections) == {first}
    assert plan(weights, statistics, keep_bytes=0).projections == {}


# -- factorize --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_factors_are_the_best_approximation_with_bases_that_are_the_identity_in_some_rows(weights, statistics, rank):
    factors = factorize(weights["query"], None, statistics["query"], rank, OPTIONS)
    assert factors.rank == rank
    left, right = factors.left.dense(), factors.right.dense()
    assert (left.shape, right.shape) == ((6, rank), (8, rank))
    outputs, inputs = factors.left.order[:rank], factors.right.order[:rank]
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(left[outputs], eye, rtol=0, atol=0)
    torch.testing.assert_close(right[inputs], eye, rtol=0, atol=0)
    torch.testing.assert_close(factors.dense()[outputs][:, inputs], factors.core, rtol=0, atol=ROUNDING)
    best = project_weight(weights["query"], statistics["query"], OPTIONS.decomposition).truncate(rank).dense()
    torch.testing.assert_close(factors.dense(), best, rtol=0, atol=ROUNDING)


def test_full_rank_reproduces_a_weight_that_the_union_does_not_hold(weights, statistics):
    narrow = DecompositionOptions(weight_energy=0.5, input_energy=0, gradient_energy=0)
    factors = factorize(weights["query"], None, statistics["query"], 6, FactorizationOptions(narrow))
    torch.testing.assert_close(factors.dense(), weights["query"], rtol=0, atol=ROUNDING)
    capped = factorize(weights["query"], None, statistics["query"], 5, FactorizationOptions(narrow))
    assert capped.rank < 5


def test_rank_is_capped_at_full_rank(weights):
    factors = factorize(weights["query"], None, None, 99, FactorizationOptions(DecompositionOptions("svd")))
    assert factors.rank == 6
    torch.testing.assert_close(factors.dense(), weights["query"], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rank", [1, 4])
def test_bias_correction_removes_the_mean_output_error_on_the_calibration_data(rank):
    W, bias = randn(0, 6, 8), randn(1, 6)
    inputs, _, statistics = vectors_and_statistics(2, W.shape)
    factors = factorize(W, bias, statistics, rank, OPTIONS)
    error = (inputs @ W.mT + bias) - (inputs @ factors.dense().mT + factors.bias)
    assert float(error.norm()) > 1.0  # there is an error,
    torch.testing.assert_close(error.mean(0), torch.zeros(6).double(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rank", [1, 3])
def test_with_a_bias_to_correct_the_error_around_the_mean_is_least(rank):
    W, bias = randn(0, 6, 8), randn(1, 6)
    inputs, gradients, statistics = vectors_and_statistics(2, W.shape)
    inputs = inputs + 3.0  # far from zero: around it, the best direction is the mean
    statistics = LayerStatistics(moment_from(inputs), statistics.gradient)
    C_g, mean = oracles.covariance(gradients), oracles.mean(inputs)
    deviations = oracles.covariance(inputs - mean) + torch.outer(mean, mean) / NUM_TOKENS
    factors = factorize(W, bias, statistics, rank, OPTIONS)
    expected = oracles.weighted_truncation(W, C_g, deviations, rank)
    torch.testing.assert_close(factors.dense(), expected, rtol=0, atol=ROUNDING)

    def weighted_output_error(dense, new_bias):
        error = inputs @ (W - dense).mT + bias - new_bias
        return float((error @ C_g * error).sum())

    by_kfac = FactorizationOptions(DecompositionOptions("kfac", shrinkage=0.0, damping=0.0))
    around_zero = factorize(W, bias, statistics, rank, by_kfac)
    torch.testing.assert_close(
        around_zero.dense(),
        oracles.weighted_truncation(W, C_g, oracles.covariance(inputs), rank),
        rtol=0,
        atol=ROUNDING,
    )
    error_around_zero = weighted_output_error(around_zero.dense(), around_zero.bias)
    assert weighted_output_error(factors.dense(), factors.bias) < 0.98 * error_around_zero


def test_energies_of_layers_with_a_bias_are_those_around_the_mean(weights, statistics):
    planned = plan(weights, statistics, with_bias={"up"})
    centred = project_weight(weights["up"], statistics["up"], EXACT, centred=True)
    kept = float(centred.gains()[: planned.allocation.ranks["up"]].sum()) / centred.total_energy
    assert planned.energy_kept["up"] == pytest.approx(kept)
    assert planned.energy_kept["up"] != pytest.approx(plan(weights, statistics).energy_kept["up"], abs=1e-3)
    uncorrected = FactorizationOptions(decomposition=EXACT, retained_ratio=0.6, bias_correction=False)
    assert (
        plan(weights, statistics, uncorrected, with_bias={"up"}).energy_kept
        == plan(weights, statistics, uncorrected).energy_kept
    )


def test_bias_stays_without_correction_without_statistics_and_without_bias():
    W, bias = randn(0, 6, 8), randn(1, 6)
    _, _, statistics = vectors_and_statistics(2, W.shape)
    uncorrected = FactorizationOptions(decomposition=EXACT, bias_correction=False)
    data_free = FactorizationOptions(DecompositionOptions("svd"))
    assert torch.equal(factorize(W, bias, statistics, 2, uncorrected).bias, bias)
    assert torch.equal(factorize(W, bias, None, 2, data_free).bias, bias)
    assert factorize(W, None, statistics, 2, OPTIONS).bias is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_are_float64_whatever_the_weight(statistics, dtype):
    W, bias = randn(0, 6, 8).to(dtype), randn(1, 6).to(dtype)
    factors = factorize(W, bias, statistics["query"], 2, OPTIONS)
    for tensor in (factors.left.coefficients, factors.core, factors.right.coefficients, factors.bias):
        assert tensor.dtype == torch.float64
