import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_jactus.parse.config import RouterConfig
from peft_jactus.parse.experts import ExpertTable, LayerShape, relaxed_gates, select_experts, soft_gates
from tests.support import oracles
from tests.support.strategies import randn, seeds

GAIN_ROUNDING = 1e-9  # relative, sums of a few gains

allocations = st.sampled_from(["global", "uniform"])
temperatures = st.sampled_from([0.2, 0.5, 1.0])
expert_sizes = st.integers(1, 3)
twentieths = st.integers(0, 20).map(lambda number: number / 20)


@st.composite
def any_shapes(draw):
    """Layers of which some would cost more than dense, if all their terms ran."""
    return LayerShape(*(draw(st.integers(1, 8)) for _ in range(3)))


@st.composite
def cheap_shapes(draw, multiple_of=1):
    """Layers whose factors cost no more than the dense weight."""
    m, n = draw(st.integers(4 * multiple_of, 14)), draw(st.integers(4 * multiple_of, 14))
    return LayerShape(m, n, multiple_of * draw(st.integers(1, m * n // (m + n) // multiple_of)))


def tables(shapes, *, num=4):
    return st.builds(ExpertTable, st.lists(shapes, min_size=1, max_size=num), expert_sizes)


any_tables = tables(any_shapes())
cheap_tables = tables(cheap_shapes())


@st.composite
def score_batches(draw, table, *, rows=3):
    """``(rows, experts)``: with many ties, or with next to none."""
    scores = 2 * randn(draw(seeds), rows, len(table))
    return scores.round() if draw(st.booleans()) else scores


def distinct_scores(seed, table, *, rows=3):
    """Without ties, and so that the sum with an integer is exact."""
    return (randn(seed, rows, len(table)) * 2**20).round() / 2**20


def members(table, allocation):
    """By budget, the layers that it pays for."""
    numbers = range(len(table.layers))
    return [list(numbers)] if allocation == "global" else [[number] for number in numbers]


def largest_expert(table, number):
    layer = table.layers[number]
    cost = min(table.expert_size, layer.rank) * (layer.out_features + layer.in_features)
    return min(cost, layer.out_features * layer.in_features)


def budgets_between(table, allocation, share):
    """From one expert in each layer, at ``share`` 0, to all dense weights, at 1."""
    budgets = []
    for numbers in members(table, allocation):
        least = sum(largest_expert(table, number) for number in numbers)
        dense = sum(table.layers[number].out_features * table.layers[number].in_features for number in numbers)
        budgets.append(least + share * (dense - least))
    return torch.tensor(budgets, dtype=torch.float64)


def expert_costs(table):
    """By layer, the cost of each expert, counted term by term."""
    return [
        [
            sum(layer.out_features + layer.in_features for term in range(layer.rank) if term // table.expert_size == i)
            for i in range(-(-layer.rank // table.expert_size))
        ]
        for layer in table.layers
    ]


def layer_cost(table, number, chosen):
    """Cost of a layer whose experts are chosen or not, as a list: factors, or the dense weight where that is less."""
    layer = table.layers[number]
    factors = sum(cost for cost, runs in zip(expert_costs(table)[number], chosen, strict=True) if runs)
    return min(factors, layer.out_features * layer.in_features)


def flat(parts):
    return list(itertools.chain.from_iterable(parts))


def by_layer(table, row):
    parts, values = [], row.tolist()
    for costs in expert_costs(table):
        parts.append(values[: len(costs)])
        values = values[len(costs) :]
    assert not values
    return parts


def total_cost(table, row, numbers):
    parts = by_layer(table, row)
    return sum(layer_cost(table, number, parts[number]) for number in numbers)


def total_gain(table, scores, chosen):
    return float((scores.exp() * torch.tensor(flat(expert_costs(table))) * chosen).sum())


# -- the table --------------------------------------------------------------------------------------------


@given(table=any_tables)
def test_experts_are_consecutive_terms_of_one_layer_and_only_the_last_is_smaller(table):
    sizes, layer_of, spans = [], [], []
    for number, layer in enumerate(table.layers):
        terms = list(range(layer.rank))
        experts = [terms[start : start + table.expert_size] for start in range(0, layer.rank, table.expert_size)]
        spans.append((len(sizes), len(sizes) + len(experts)))
        sizes += [len(expert) for expert in experts]
        layer_of += [number] * len(experts)
    assert table.spans == spans
    assert table.sizes.tolist() == sizes
    assert table.layer_of.tolist() == layer_of
    assert len(table) == len(sizes)
    for first, last in spans:
        assert set(sizes[first : last - 1]) <= {table.expert_size}


@given(table=any_tables)
def test_costs_are_parameters_and_no_layer_costs_more_than_its_dense_weight(table):
    costs = expert_costs(table)
    dense = [layer.out_features * layer.in_features for layer in table.layers]
    assert table.costs.tolist() == flat(costs)
    assert table.dense_costs.tolist() == dense
    assert table.all_costs.tolist() == [min(sum(own), all_of_it) for own, all_of_it in zip(costs, dense, strict=True)]
    assert table.has_dense_option == any(sum(own) > all_of_it for own, all_of_it in zip(costs, dense, strict=True))


@given(data=st.data(), table=any_tables, seed=seeds)
def test_terms_run_with_the_gate_of_their_expert(data, table, seed):
    gates = randn(seed, 2, len(table))
    selected = gates[0] > data.draw(st.sampled_from([-9.0, 0.0, 9.0]))  # all, some, none
    for number, layer in enumerate(table.layers):
        first = table.spans[number][0]
        owners = [first + term // table.expert_size for term in range(layer.rank)]
        assert table.term_gates(number, gates).equal(gates[:, owners])
        running = [term for term, owner in enumerate(owners) if selected[owner]]
        assert table.term_index(number, selected).tolist() == running
        assert table.term_gates(number, selected.unsqueeze(0))[0].nonzero().flatten().tolist() == running


@given(table=any_tables, seed=seeds)
def test_active_ratio_is_what_runs_over_what_the_dense_layers_have(table, seed):
    selected = randn(seed, 3, len(table)) > 0
    numbers = range(len(table.layers))
    dense = sum(layer.out_features * layer.in_features for layer in table.layers)
    expected = [total_cost(table, row, numbers) / dense for row in selected]
    assert table.active_ratio(selected).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_table_made_on_the_meta_device_has_numbers():
    layers = [LayerShape(6, 5, 4), LayerShape(3, 3, 3)]
    with torch.device("meta"):
        table = ExpertTable(layers, 3)
    assert table.costs.tolist() == [33, 11, 18]
    assert table.budgets(1.0, "global").tolist() == [39]
    assert table.term_index(0, torch.tensor([False, True, True])).tolist() == [3]


# -- budgets ----------------------------------------------------------------------------------------------


@given(table=any_tables, allocation=allocations, ratio=twentieths)
def test_budgets_are_a_share_of_the_dense_weights_and_never_too_small_for_one_expert_each(table, allocation, ratio):
    least, most = budgets_between(table, allocation, 0.0), budgets_between(table, allocation, 1.0)
    if all(ratio * most >= least):
        assert table.budgets(ratio, allocation).tolist() == pytest.approx((ratio * most).tolist(), rel=1e-12)
    else:
        with pytest.raises(ValueError, match="is too small: one expert in each layer takes"):
            table.budgets(ratio, allocation)


@pytest.mark.parametrize(("allocation", "needed"), [("global", "0.623"), ("uniform", "0.800")])
def test_a_budget_below_one_expert_in_each_layer_is_refused_with_the_least_one(allocation, needed):
    """One expert takes 20 of 25, 10 of 25 and 26 of 40."""
    table = ExpertTable([LayerShape(5, 5, 5), LayerShape(5, 5, 1), LayerShape(8, 5, 5)], 2)
    message = rf"`active_ratio`=0\.5 is too small: one expert .* takes {needed}\. Raise it, or lower `expert_size`"
    with pytest.raises(ValueError, match=message):
        table.budgets(0.5, allocation)


def test_a_budget_of_exactly_one_expert_in_each_layer_is_enough():
    table = ExpertTable([LayerShape(4, 4, 2), LayerShape(8, 8, 4)], 1)
    budgets = table.budgets(24 / 80, "global")
    scores = torch.tensor([[0.0, 1.0, 4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    assert select_experts(scores, table, budgets, "global").tolist() == [[False, True, True, False, False, False]]


# -- the choice -------------------------------------------------------------------------------------------


@given(data=st.data(), table=any_tables, allocation=allocations, share=twentieths)
def test_a_choice_has_an_expert_in_each_layer_and_never_costs_more_than_the_budget(data, table, allocation, share):
    scores = data.draw(score_batches(table))
    budgets = budgets_between(table, allocation, share)
    selected = select_experts(scores, table, budgets, allocation)
    assert selected.dtype == torch.bool
    for row in selected:
        assert all(any(part) for part in by_layer(table, row))
        for numbers, budget in zip(members(table, allocation), budgets.tolist(), strict=True):
            assert total_cost(table, row, numbers) <= budget


@given(data=st.data(), table=any_tables, allocation=allocations, share=twentieths)
def test_the_best_expert_of_each_layer_runs(data, table, allocation, share):
    scores = data.draw(score_batches(table))
    selected = select_experts(scores, table, budgets_between(table, allocation, share), allocation)
    for row, chosen in zip(scores, selected, strict=True):
        for own_scores, runs in zip(by_layer(table, row), by_layer(table, chosen), strict=True):
            assert runs[own_scores.index(max(own_scores))]


@given(data=st.data(), table=any_tables, allocation=allocations)
def test_the_whole_budget_runs_every_expert(data, table, allocation):
    scores = data.draw(score_batches(table))
    assert select_experts(scores, table, table.budgets(1.0, allocation), allocation).all()


@given(data=st.data(), table=cheap_tables, allocation=allocations, share=twentieths)
def test_without_a_dense_option_the_choice_is_the_greedy_one(data, table, allocation, share):
    scores = data.draw(score_batches(table))
    budgets = budgets_between(table, allocation, share)
    selected = select_experts(scores, table, budgets, allocation)
    for row, chosen in zip(scores.tolist(), selected.tolist(), strict=True):
        assert chosen == greedy_choice(row, table, budgets.tolist(), allocation)


def greedy_choice(scores, table, budgets, allocation):
    costs = flat(expert_costs(table))
    chosen = [False] * len(costs)
    for numbers, budget in zip(members(table, allocation), budgets, strict=True):
        left, others = budget, []
        for number in numbers:
            experts = list(range(*table.spans[number]))
            best = max(experts, key=lambda expert: scores[expert])  # the first of equal ones
            chosen[best] = True
            left -= costs[best]
            others += [expert for expert in experts if expert != best]
        others.sort(key=lambda expert: -scores[expert])  # stable
        while others and costs[others[0]] <= left:
            expert = others.pop(0)
            chosen[expert] = True
            left -= costs[expert]
        for expert in others:
            if costs[expert] <= left:
                chosen[expert] = True
                left -= costs[expert]
    return chosen


def test_what_the_best_ones_leave_is_spent_to_the_last_parameter():
    """Experts of 16 and of 8: after one of each, the second of 16 is better, but 8 are left."""
    table = ExpertTable([LayerShape(8, 8, 3), LayerShape(4, 4, 2)], 1)
    scores = torch.tensor([[3.0, 2.0, -1.0, 1.0, 0.0]], dtype=torch.float64)
    selected = select_experts(scores, table, torch.tensor([32.0], dtype=torch.float64), "global")
    assert selected.tolist() == [[True, False, False, True, True]]


@given(data=st.data(), table=cheap_tables, allocation=allocations, shares=st.tuples(twentieths, twentieths))
def test_without_a_dense_option_a_larger_budget_never_gains_less(data, table, allocation, shares):
    scores = data.draw(score_batches(table, rows=1))
    less, more = (
        total_gain(table, scores, select_experts(scores, table, budgets_between(table, allocation, share), allocation))
        for share in sorted(shares)
    )
    assert more >= less * (1 - GAIN_ROUNDING)


@given(seed=seeds, num_layers=st.integers(1, 3), size=expert_sizes, share=twentieths)
def test_experts_of_equal_cost_are_chosen_optimally(seed, num_layers, size, share):
    table = ExpertTable([LayerShape(18, 18, 3 * size)] * num_layers, size)
    scores = randn(seed, 1, len(table))
    budget = budgets_between(table, "global", share / 2)
    selected = select_experts(scores, table, budget, "global")
    best = best_gain(scores[0], table, float(budget))
    assert total_gain(table, scores, selected) == pytest.approx(best, rel=GAIN_ROUNDING)


def best_gain(scores, table, budget):
    """Of all choices with an expert in each layer that cost no more than the budget."""
    gains = []
    for choice in itertools.product([False, True], repeat=len(table)):
        chosen = torch.tensor(choice)
        if all(any(part) for part in by_layer(table, chosen)):
            cost = total_cost(table, chosen, range(len(table.layers)))
            gains.append(total_gain(table, scores, chosen) if cost <= budget else 0.0)
    return max(gains)


@given(seed=seeds, shapes=st.lists(any_shapes(), min_size=1, max_size=3), size=st.integers(1, 2), share=twentieths)
def test_with_a_dense_option_the_choice_is_within_one_item_of_the_optimum(seed, shapes, size, share):
    """Ragged experts are left out, so that the optimum has the best one of each layer as well."""
    table = ExpertTable(
        [LayerShape(shape.out_features, shape.in_features, size * shape.rank) for shape in shapes], size
    )
    scores = 2 * randn(seed, 1, len(table))
    budget = budgets_between(table, "global", share)
    choices = [dense_or_best_experts(table, n, own) for n, own in enumerate(by_layer(table, scores[0]))]
    reached = total_gain(table, scores, select_experts(scores, table, budget, "global"))
    best = oracles.best_allocation(choices, float(budget))
    assert reached <= best * (1 + GAIN_ROUNDING)
    assert reached >= best * (1 - GAIN_ROUNDING) - oracles.largest_item(choices)


def dense_or_best_experts(table, number, scores):
    costs, dense = expert_costs(table)[number], layer_cost(table, number, [True] * len(scores))
    gains = sorted((math.exp(score) * costs[0] for score in scores), reverse=True)
    points = [oracles.Candidate(k, k * costs[0], sum(gains[:k])) for k in range(1, len(gains) + 1)]
    return [point for point in points if point.cost < dense] + [oracles.Candidate(None, dense, sum(gains))]


def test_a_layer_of_equal_experts_runs_dense_where_factors_do_not_pay():
    """All 8 experts of the first layer cost as much as 4 of them; of the others, one is worth most of their layer."""
    table = ExpertTable([LayerShape(8, 8, 8), LayerShape(8, 8, 3)], 1)
    scores = torch.tensor([8 * [0.0] + [3.0, -1.0, -1.0]], dtype=torch.float64)
    selected = select_experts(scores, table, table.budgets(80 / 128, "global"), "global")
    assert selected.tolist() == [9 * [True] + 2 * [False]]


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_what_a_dense_layer_leaves_goes_to_the_best_experts_that_fit(allocation):
    """The dense item never fits: what is left is for 3 experts, of nearly equal scores."""
    table = ExpertTable([LayerShape(8, 8, 8)], 1)
    scores = torch.tensor([[1.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]], dtype=torch.float64)
    selected = select_experts(scores, table, table.budgets(48 / 64, allocation), allocation)
    assert selected.nonzero()[:, 1].tolist() == [0, 6, 7]


def test_of_two_equal_layers_one_runs_dense_if_the_budget_is_for_one():
    """An untrained router gives zeros. 24 parameters: 16 for a dense layer, 8 for an expert of the other."""
    table = ExpertTable([LayerShape(4, 4, 4)] * 2, 1)
    selected = select_experts(torch.zeros(1, 8), table, table.budgets(24 / 32, "global"), "global")
    assert sorted(sum(part) for part in by_layer(table, selected[0])) == [1, 4]


# -- invariance of the choice -----------------------------------------------------------------------------


@given(table=any_tables, allocation=allocations, share=twentieths, seed=seeds, constant=st.integers(-50, 50))
def test_a_constant_added_to_all_scores_changes_nothing(table, allocation, share, seed, constant):
    scores = distinct_scores(seed, table)
    budgets = budgets_between(table, allocation, share)
    shifted = select_experts(scores + constant, table, budgets, allocation)
    assert shifted.equal(select_experts(scores, table, budgets, allocation))


@given(data=st.data(), table=any_tables, allocation=allocations, share=twentieths)
def test_rows_of_a_batch_are_chosen_for_on_their_own(data, table, allocation, share):
    scores = data.draw(score_batches(table))
    budgets = budgets_between(table, allocation, share)
    alone = [select_experts(row.unsqueeze(0), table, budgets, allocation) for row in scores]
    assert select_experts(scores, table, budgets, allocation).equal(torch.cat(alone))


@given(data=st.data(), table=any_tables, share=twentieths)
def test_layers_with_budgets_of_their_own_are_chosen_for_on_their_own(data, table, share):
    scores = data.draw(score_batches(table, rows=2))
    together = select_experts(scores, table, budgets_between(table, "uniform", share), "uniform")
    for layer, (first, last) in zip(table.layers, table.spans, strict=True):
        alone = ExpertTable([layer], table.expert_size)
        budgets = budgets_between(alone, "global", share)
        assert select_experts(scores[:, first:last], alone, budgets, "global").equal(together[:, first:last])


# -- soft and relaxed gates -------------------------------------------------------------------------------


def slow_soft_gates(scores, table, budgets, allocation, temperature):
    """One row: for each budget, the threshold at which the gates spend it, by halving an interval in Python."""
    costs, gates = flat(expert_costs(table)), [1.0] * len(scores)
    for numbers, budget in zip(members(table, allocation), budgets, strict=True):
        experts = [expert for number in numbers for expert in range(*table.spans[number])]
        if sum(costs[expert] for expert in experts) <= budget:
            continue
        low, high = -1e3, 1e3
        for _ in range(100):
            middle = (low + high) / 2
            for expert in experts:
                gates[expert] = 1 / (1 + math.exp(min((middle - scores[expert]) / temperature, 700.0)))
            if sum(costs[expert] * gates[expert] for expert in experts) > budget:
                low = middle
            else:
                high = middle
    return gates


@given(seed=seeds, table=any_tables, allocation=allocations, share=twentieths, temperature=temperatures)
def test_soft_gates_are_sigmoids_that_spend_each_budget(seed, table, allocation, share, temperature):
    scores, budgets = randn(seed, 2, len(table)), budgets_between(table, allocation, share)
    gates = soft_gates(scores, table, budgets, allocation, temperature=temperature)
    expected = [slow_soft_gates(row, table, budgets.tolist(), allocation, temperature) for row in scores.tolist()]
    assert_close(gates, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    costs = expert_costs(table)
    for row in gates:
        parts = by_layer(table, row)
        for numbers, budget in zip(members(table, allocation), budgets.tolist(), strict=True):
            spent = sum(gate * cost for n in numbers for gate, cost in zip(parts[n], costs[n], strict=True))
            assert spent == pytest.approx(min(budget, sum(sum(costs[number]) for number in numbers)), abs=1e-6)


@given(seed=seeds, table=cheap_tables, allocation=allocations, temperature=temperatures)
def test_soft_gates_are_one_where_everything_fits(seed, table, allocation, temperature):
    scores, budgets = randn(seed, 2, len(table)), table.budgets(1.0, allocation)
    gates = soft_gates(scores, table, budgets, allocation, temperature=temperature)
    assert_close(gates, torch.ones_like(gates), rtol=0, atol=1e-8)
    gates = soft_gates(scores.float(), table, budgets, allocation, temperature=temperature)
    assert gates.equal(torch.ones_like(gates))


@settings(max_examples=20)  # each takes 0.1 s
@given(seed=seeds, table=tables(any_shapes(), num=2), allocation=allocations, share=twentieths)
def test_the_gradient_of_soft_gates_goes_through_the_threshold(seed, table, allocation, share):
    scores, budgets = randn(seed, 2, len(table)).requires_grad_(), budgets_between(table, allocation, share)

    def gates(scores):
        return soft_gates(scores, table, budgets, allocation, temperature=0.7)

    # The threshold is exact to 1e-11; a wider step keeps that out of the differences.
    assert torch.autograd.gradcheck(gates, scores, eps=1e-4, atol=1e-5)


@given(seed=seeds, table=any_tables, share=twentieths)
def test_a_higher_score_lowers_the_gates_of_all_others(seed, table, share):
    assume(len(table) > 1)
    budgets = budgets_between(table, "global", share)
    assume(float(budgets) < 0.99 * sum(sum(own) for own in expert_costs(table)))
    scores = randn(seed, 1, len(table))
    (jacobian,) = torch.autograd.functional.jacobian(
        lambda row: soft_gates(row.unsqueeze(0), table, budgets, "global", temperature=1.0), scores[0]
    )
    assert (jacobian.diagonal() > 0).all()
    assert (jacobian - jacobian.diagonal().diag()).fill_diagonal_(-1).lt(0).all()
    assert_close(table.costs.double() @ jacobian, torch.zeros_like(scores[0]), rtol=0, atol=1e-9)  # spent as before


@given(seed=seeds, table=any_tables, allocation=allocations, share=twentieths, temperature=temperatures)
def test_relaxed_gates_have_the_value_of_the_choice_and_the_gradient_of_soft_gates(
    seed, table, allocation, share, temperature
):
    scores, weights = randn(seed, 2, 2, len(table))
    scores.requires_grad_()
    budgets = budgets_between(table, allocation, share)
    relaxed = relaxed_gates(scores, table, budgets, allocation, temperature=temperature)
    soft = soft_gates(scores, table, budgets, allocation, temperature=temperature)
    assert relaxed.equal(select_experts(scores, table, budgets, allocation).double())
    gradient, expected = (torch.autograd.grad((gates * weights).sum(), scores)[0] for gates in (relaxed, soft))
    assert gradient.equal(expected)


# -- what a config may hold -------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        *(("active_ratio", value, r"be in \(0, 1\]") for value in (0, 0.0, -1, 1.5, True, "x", None, NAN, math.inf)),
        *(("cache_similarity", value, r"be in \(0, 1\]") for value in (0, -0.5, 1.01, True, "x", None, NAN)),
        *(("expert_size", value, "be an integer of at least 1") for value in (0, -1, 1.0, True, "x", None)),
        *(("hidden_features", value, "be an integer of at least 1") for value in (0, -1, 1.0, True, "x", None)),
        *(("cache_entries", value, "be an integer of at least 0") for value in (-1, 1.0, False, "x", None)),
        *(("cache_bytes", value, "be null or not negative") for value in (-1, 1.0, False, "x")),
        *(("allocation", value, r"be one of \('global', 'uniform'\)") for value in ("x", "Global", 1, None, [])),
        *(("router_kind", value, r"be one of \('linear', 'mlp'\)") for value in ("x", "", 1, None, [])),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_it_must_be(name, value, must):
    message = rf"^`{name}` must {must}; got .*{str(value).strip('[]')}.*\.$"
    with pytest.raises(ValueError, match=message):
        RouterConfig(**{name: value})
    with pytest.raises(ValueError, match=message):
        RouterConfig.parse({name: value})


@pytest.mark.parametrize("values", [{"active_ratio": 0.5, "ratio": 0.5}, {1: 2}, [], None, "active_ratio"])
def test_what_is_no_table_of_known_fields_is_not_parsed(values):
    with pytest.raises(ValueError, match=r"^must have no other fields than \['active_ratio', .*\]; got "):
        RouterConfig.parse(values)


@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "active_ratio": st.sampled_from([1, 1.0, 1e-3]),
            "expert_size": st.integers(1, 99),
            "allocation": allocations,
            "router_kind": st.sampled_from(["linear", "mlp"]),
            "hidden_features": st.integers(1, 99),
            "cache_entries": st.integers(0, 99),
            "cache_bytes": st.integers(0, 99),
            "cache_similarity": st.sampled_from([1, 0.5]),
        },
    )
)
def test_a_config_survives_being_written_and_read(values):
    config = RouterConfig(**values)
    assert RouterConfig.parse(config.to_dict()) == config
    assert RouterConfig().to_dict() | values == config.to_dict()
