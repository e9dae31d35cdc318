import functools
import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from peft_jactus.numerics import allocation as module
from peft_jactus.numerics.adaptation import capped_adaptation_rank
from peft_jactus.numerics.allocation import LayerGains, stays_dense, stored_parameters, uniform_rank
from tests.support import oracles
from tests.support.strategies import spectra

allocate = functools.partial(
    module.allocate, strategy="global", storage="factored", rank_floor=0.5, rank_multiple=1, fixed_ranks={}
)
GAIN_ROUNDING = 1e-9  # sums of a few gains of at most 1e3

storages = st.sampled_from(["factored", "pivoted"])
features = st.integers(1, 10)
ratios = st.integers(1, 20).map(lambda twentieths: twentieths / 20)


@st.composite
def layer_gains(draw, out_features=features, in_features=features):
    """A layer whose union may be smaller than its weight, and may miss part of the energy."""
    out_features, in_features = draw(out_features), draw(in_features)
    size = draw(st.integers(1, min(out_features, in_features)))
    gains = draw(st.sampled_from([1.0, 1e3])) * draw(spectra(size))
    missed = draw(st.sampled_from([0.0, 0.5])) * float(gains.sum())
    return LayerGains(out_features, in_features, gains, float(gains.sum()) + missed)


def several(layers, *, num=3):
    return st.lists(layers, min_size=1, max_size=num).map(
        lambda drawn: {f"layer{i}": layer for i, layer in enumerate(drawn)}
    )


def cost(layer, rank, storage):
    """What is stored, counted tensor by tensor; the dense weight where that is less."""
    m, n = layer.out_features, layer.in_features
    # Two factors; or independent rows, and the coefficients of the others.
    factors = m * rank + rank * n if storage == "factored" else rank * n + (m - rank) * rank
    return min(factors, m * n)


def gain(layer, rank):
    full_rank = min(layer.out_features, layer.in_features)
    return layer.dense_gain if rank == full_rank else float(layer.gains[:rank].sum())


def total_gain(layers, allocation):
    return sum(gain(layers[name], rank) for name, rank in allocation.ranks.items())


def total_cost(layers, ranks, storage):
    return sum(cost(layers[name], rank, storage) for name, rank in ranks.items())


def candidates(layer, storage):
    ranks = {*range(1, len(layer.gains) + 1), min(layer.out_features, layer.in_features)}
    return [oracles.Candidate(r, cost(layer, r, storage), gain(layer, r)) for r in sorted(ranks)]


# -- costs and uniform ranks ------------------------------------------------------------------------------


@given(layer=layer_gains(), storage=storages)
def test_cost_is_what_is_stored(layer, storage):
    m, n = layer.out_features, layer.in_features
    for rank in range(1, min(m, n) + 1):
        assert stored_parameters(rank, m, n, storage) == cost(layer, rank, storage)
        assert stays_dense(rank, m, n, storage) == (cost(layer, rank, storage) == m * n)
    assert stays_dense(min(m, n), m, n, storage)


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.8, 0.97, 1.0])
def test_uniform_rank_is_the_largest_that_fits(storage, ratio):
    for m in range(1, 25):
        for n in range(1, 25):
            # Where the rounding of ratio * m * n decides, both neighbours are right.
            least, most = (largest_rank(ratio * m * n * (1 + rounding), m, n, storage) for rounding in (-1e-12, 1e-12))
            assert least <= uniform_rank(ratio, m, n, storage) <= most


def largest_rank(budget, m, n, storage):
    fitting = [r for r in range(1, min(m, n) + 1) if stored_parameters(r, m, n, storage) <= budget]
    return max(fitting, default=1)


@given(layers=several(layer_gains()), ratio=ratios, storage=storages)
def test_uniform_allocation_gives_each_layer_its_own_ratio(layers, ratio, storage):
    allocation = allocate(layers, retained_ratio=ratio, strategy="uniform", storage=storage)
    for name, layer in layers.items():
        m, n = layer.out_features, layer.in_features
        largest = uniform_rank(ratio, m, n, storage)
        if stays_dense(largest, m, n, storage):
            assert allocation.ranks[name] == min(m, n)
        else:
            assert allocation.ranks[name] == min(largest, len(layer.gains))


# -- the budget -------------------------------------------------------------------------------------------


@given(
    layers=several(layer_gains(), num=6),
    ratio=ratios,
    storage=storages,
    floor=st.sampled_from([0.0, 0.5, 1.0]),
    strategy=st.sampled_from(["global", "uniform"]),
)
def test_never_above_budget_unless_one_rank_each_is(layers, ratio, storage, floor, strategy):
    allocation = allocate(layers, retained_ratio=ratio, strategy=strategy, storage=storage, rank_floor=floor)
    budget = ratio * sum(layer.num_parameters for layer in layers.values())
    assert allocation.budget == math.floor(budget + GAIN_ROUNDING)
    assert allocation.num_stored == total_cost(layers, allocation.ranks, storage)
    if any(cost(layer, 1, storage) > ratio * layer.num_parameters for layer in layers.values()):
        return  # a layer too small for one rank at this ratio
    assert allocation.num_stored <= allocation.budget


@given(layers=several(layer_gains(), num=6), storage=storages)
def test_keeping_everything_loses_nothing(layers, storage):
    allocation = allocate(layers, retained_ratio=1.0, storage=storage)
    assert total_gain(layers, allocation) == pytest.approx(
        sum(layer.dense_gain for layer in layers.values()), abs=GAIN_ROUNDING
    )


# -- optimality -------------------------------------------------------------------------------------------


@given(gains=st.lists(spectra(4), min_size=3, max_size=3), ratio=ratios)
@example(gains=torch.tensor([4 * [1.0], 4 * [1.0], [1.0, 0.5, 0.2, 0.1]]).double(), ratio=0.2)  # ties
def test_equal_costs_and_concave_gains_are_allocated_optimally(gains, ratio):
    """Every rank costs 16 + 16, and unions of at most 4 dimensions never pay for the dense 16 * 16."""
    layers = {str(i): LayerGains(16, 16, gains[i], float(gains[i].sum())) for i in range(3)}
    budget = int(ratio * 3 * 256)
    assume(budget >= 3 * 32)
    allocation = allocate(layers, retained_ratio=ratio, rank_floor=0.0)
    best = oracles.best_allocation([candidates(layer, "factored") for layer in layers.values()], budget)
    assert total_gain(layers, allocation) == pytest.approx(best, abs=GAIN_ROUNDING)


@given(layer=layer_gains(), adaptation_rank=st.integers(0, 6))
def test_ranks_that_are_left_to_the_task_gain_nothing(layer, adaptation_rank):
    shared = layer.with_adaptation(adaptation_rank)
    full_rank = min(layer.out_features, layer.in_features)
    for rank in range(1, full_rank + 1):
        remaining = rank - capped_adaptation_rank(adaptation_rank, rank)
        if remaining > len(layer.gains):
            assert rank > len(shared.gains)
            continue
        assert float(shared.gains[:rank].sum()) == pytest.approx(float(layer.gains[:remaining].sum()))
    assert shared.dense_gain == layer.dense_gain


@pytest.mark.parametrize("adaptation_rank", [0, 5, 32])
def test_ranks_that_gain_nothing_do_not_end_the_climb(adaptation_rank):
    """A flat spectrum: staying dense is best for each parameter, but not affordable."""
    layer = LayerGains(64, 64, torch.ones(64, dtype=torch.float64), 64.0).with_adaptation(adaptation_rank)
    found = allocate({"layer": layer}, retained_ratio=0.5)
    assert found.ranks["layer"] in (15, 16)  # of 16 ranks that are paid for, the last may be the task's


@given(layers=several(layer_gains()), ratio=ratios, storage=storages)
def test_any_allocation_is_within_one_item_of_the_optimum(layers, ratio, storage):
    budget = math.floor(ratio * sum(layer.num_parameters for layer in layers.values()))
    choices = [candidates(layer, storage) for layer in layers.values()]
    assume(sum(choice[0].cost for choice in choices) <= budget)
    allocation = allocate(layers, retained_ratio=ratio, storage=storage, rank_floor=0.0)
    best, reached = oracles.best_allocation(choices, budget), total_gain(layers, allocation)
    assert reached <= best + GAIN_ROUNDING
    assert reached >= best - oracles.largest_item(choices) - GAIN_ROUNDING


@given(layers=several(layer_gains()), ratio=ratios, storage=storages)
def test_no_affordable_step_to_a_next_rank_is_left(layers, ratio, storage):
    allocation = allocate(layers, retained_ratio=ratio, storage=storage)
    left = allocation.budget - allocation.num_stored
    for name, layer in layers.items():
        rank = allocation.ranks[name]
        if rank < len(layer.gains):
            step = cost(layer, rank + 1, storage) - cost(layer, rank, storage)
            assert step > left or gain(layer, rank + 1) == gain(layer, rank)


def test_a_layer_with_a_flat_spectrum_stays_dense_where_factors_do_not_pay():
    """At 0.75, 'steep' needs one rank; half the ranks of 'flat' would cost as much as all of it."""
    flat = LayerGains(8, 8, torch.ones(8, dtype=torch.float64), 8.0)
    steep = LayerGains(8, 8, torch.tensor([8.0] + 7 * [0.0], dtype=torch.float64), 8.0)
    for storage in ("factored", "pivoted"):
        allocation = allocate(
            {"flat": flat, "steep": steep},
            retained_ratio=0.75,
            storage=storage,
            rank_floor=0.25,
        )
        assert allocation.ranks == {"flat": 8, "steep": 1}


def test_energy_outside_the_union_counts_for_staying_dense():
    gains = torch.tensor([1.0, 0.1], dtype=torch.float64)
    inside = LayerGains(8, 8, gains, 1.1)
    missing = LayerGains(8, 8, gains, 5.0)
    allocation = allocate({"inside": inside, "missing": missing}, retained_ratio=0.75)
    assert allocation.ranks == {"inside": 2, "missing": 8}


# -- floors and fixed ranks -------------------------------------------------------------------------------


@given(layers=several(layer_gains(), num=6), ratio=ratios, storage=storages, floor=ratios)
def test_no_layer_falls_below_its_floor(layers, ratio, storage, floor):
    allocation = allocate(layers, retained_ratio=ratio, storage=storage, rank_floor=floor)
    for name, layer in layers.items():
        uniform = uniform_rank(ratio, layer.out_features, layer.in_features, storage)
        least = min(max(1, math.floor(floor * uniform)), len(layer.gains))
        assert allocation.ranks[name] >= least


@pytest.mark.parametrize("strategy", ["global", "uniform"])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("ratio", [0.02, 0.4, 0.6, 0.8, 0.97])
def test_ranks_are_multiples_where_layers_are_large_enough(strategy, storage, ratio):
    spectrum = torch.arange(320, 0, -1).double()
    layers = {
        "wide": LayerGains(320, 900, spectrum, float(spectrum.sum())),
        "square": LayerGains(256, 256, 7 * spectrum[:256] ** 2, 7 * float((spectrum[:256] ** 2).sum())),
        "small": LayerGains(255, 600, spectrum[:255], float(spectrum[:255].sum())),
    }
    allocation = allocate(layers, retained_ratio=ratio, strategy=strategy, storage=storage, rank_multiple=8)
    exact = allocate(layers, retained_ratio=ratio, strategy=strategy, storage=storage)
    assert allocation.num_stored <= allocation.budget
    # One step of each layer may be left over.
    assert allocation.num_stored >= exact.num_stored - 8 * sum(
        layer.out_features + layer.in_features for layer in layers.values()
    )
    for name in ("wide", "square"):
        rank = allocation.ranks[name]
        assert rank % 8 == 0 or rank < 8 or rank == layers[name].full_rank
    if strategy == "uniform":
        assert allocation.ranks["small"] == exact.ranks["small"]
        assert all(0 <= exact.ranks[name] - rank < 8 for name, rank in allocation.ranks.items())


def test_without_a_floor_a_worthless_layer_keeps_one_rank():
    layers = {
        "good": LayerGains(16, 16, torch.ones(16, dtype=torch.float64), 16.0),
        "worthless": LayerGains(16, 16, torch.full((16,), 1e-9, dtype=torch.float64), 1.6e-8),
    }
    ranks = allocate(layers, retained_ratio=0.5, rank_floor=0.0).ranks
    assert ranks == {"good": 7, "worthless": 1}
    assert allocate(layers, retained_ratio=0.5, rank_floor=0.5).ranks == {"good": 6, "worthless": 2}


@pytest.mark.parametrize("strategy", ["global", "uniform"])
@pytest.mark.parametrize("fixed", [1, 5, 8])
def test_fixed_ranks_are_kept_and_paid_from_the_budget(strategy, fixed):
    gains = torch.logspace(0, -1, 16, dtype=torch.float64)
    layers = {name: LayerGains(16, 16, gains, float(gains.sum())) for name in "abc"}
    allocation = allocate(layers, retained_ratio=0.5, strategy=strategy, fixed_ranks={"b": fixed})
    assert list(allocation.ranks) == ["a", "b", "c"]
    assert allocation.ranks["b"] == fixed
    assert allocation.num_stored == total_cost(layers, allocation.ranks, "factored")
    assert allocation.num_stored <= allocation.budget
    if strategy == "global":  # what the fixed rank leaves, the others use up to one rank
        assert allocation.budget - allocation.num_stored < 32
    else:
        assert allocation.ranks["a"] == allocation.ranks["c"] == (384 - 32 * fixed) // 64


@pytest.mark.parametrize("strategy", ["global", "uniform"])
def test_fixed_ranks_that_spend_the_budget_are_refused(strategy):
    layers = {name: LayerGains(16, 16, torch.ones(16, dtype=torch.float64), 16.0) for name in "abc"}
    with pytest.raises(ValueError, match=r"`rank_pattern` spends.*384 parameters.*0 are left for 1"):
        allocate(layers, retained_ratio=0.5, strategy=strategy, fixed_ranks={"a": 7, "b": 5})


# -- invariance -------------------------------------------------------------------------------------------


@given(data=st.data(), layers=several(layer_gains(), num=5), ratio=ratios, storage=storages)
def test_order_of_layers_does_not_matter(data, layers, ratio, storage):
    shuffled = dict(data.draw(st.permutations(list(layers.items()))))
    one = allocate(layers, retained_ratio=ratio, storage=storage)
    other = allocate(shuffled, retained_ratio=ratio, storage=storage)
    assert other == one
    assert list(other.ranks) == list(shuffled)


@given(layers=several(layer_gains(), num=5), ratio=ratios, exponent=st.integers(-60, 60))
def test_scale_of_all_gains_does_not_matter(layers, ratio, exponent):
    scale = 2.0**exponent  # rounds nothing
    scaled = {
        name: LayerGains(layer.out_features, layer.in_features, scale * layer.gains, scale * layer.dense_gain)
        for name, layer in layers.items()
    }
    assert allocate(scaled, retained_ratio=ratio) == allocate(layers, retained_ratio=ratio)
