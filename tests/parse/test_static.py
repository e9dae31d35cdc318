"""The choice for the average prompt as a plain compressed model."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_jactus import rank_summary
from peft_jactus.parse import RouterConfig, initialize_router_, routed_copy, static_copy
from peft_jactus.parse.installation import router_of
from peft_jactus.parse.layer import RoutedLinear
from tests.parse.test_models import MODELS, inputs_of, run
from tests.support.compressed_models import batches_for, tiny_llama
from tests.support.routed_models import routed, static


def chosen_experts(model, fixed):
    """Return ``(experts,)``: which experts of a routed model are in a static one's weights, in full."""
    table = model.rank_router.table
    chosen = torch.zeros(len(table))
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedLinear):
            terms = torch.einsum("or,ri->roi", layer.up.weight, layer.down.weight).flatten(1).double()
            weight = fixed.get_submodule(name).dense_weight().double().flatten()
            gates = torch.linalg.lstsq(terms.mT, weight[:, None]).solution.squeeze(1)
            torch.testing.assert_close(gates, gates.round(), rtol=0, atol=1e-3)
            first, last = table.spans[layer.position]
            chosen[first:last] = gates[:: table.expert_size].round().float()
    return chosen


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("fields", [{}, {"allocation": "uniform"}, {"router_kind": "mlp"}], ids=str)
def test_it_is_the_routed_model_with_the_best_experts_for_the_average_prompt(make, fields):
    model = routed(make(), **fields)
    router, inputs = model.rank_router, inputs_of(model)
    fixed = static_copy(model, 0.6)
    chosen = chosen_experts(model, fixed)
    with router.gated(chosen.expand(len(next(iter(inputs.values()))), -1)):
        torch.testing.assert_close(run(fixed, **inputs), run(model, **inputs), rtol=0, atol=1e-5)

    if router.router_config.allocation == "global":
        scores = router(router.input_mean[None])[0].detach()
        always = [first + int(scores[first:last].argmax()) for first, last in router.table.spans]
        taken = chosen.bool().index_fill(0, torch.tensor(always), value=False)
        # In the order of the scores, but for the last few, that filled up what was left of the budget.
        threshold = scores[taken].sort().values[int(taken.sum()) // 10]
        assert (scores[~chosen.bool()] <= threshold).all()


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.75])
def test_what_it_stores_meets_the_ratio(ratio):
    model = routed(tiny_llama())
    fixed = static_copy(model, ratio)
    assert not any(isinstance(layer, RoutedLinear) for layer in fixed.modules())
    largest_expert = 2 * 80 / sum(row.num_dense for row in rank_summary(fixed).rows)  # terms, and features
    assert ratio - largest_expert < rank_summary(fixed).retained_ratio <= ratio


def test_what_is_asked_counts_the_layers_that_are_not_routed_too():
    dense = tiny_llama()
    config = RouterConfig(active_ratio=0.5, expert_size=2)
    model = routed_copy(static(dense, allocation="global", retained_ratio=0.9), config, progress_bar=False)
    rows = rank_summary(model).rows
    whole = sum(row.num_dense for row in rows if row.stays_dense)
    targeted = sum(row.num_dense for row in rows)
    assert 0 < whole < targeted
    summary = rank_summary(static_copy(model, 0.4))
    assert summary.asked_ratio == pytest.approx((0.4 * (targeted - whole) + whole) / targeted)
    assert summary.asked_ratio - 2 * 80 / targeted < summary.retained_ratio <= summary.asked_ratio


def test_the_default_ratio_is_the_routers_and_the_routed_model_stays_as_it_is():
    model = routed(tiny_llama(), active_ratio=0.5)
    inputs = inputs_of(model)
    before = run(model, **inputs)
    fixed = static_copy(model)
    assert 0.4 < rank_summary(fixed).retained_ratio <= 0.5
    assert torch.equal(run(model, **inputs), before)
    assert fixed.get_input_embeddings().weight is model.get_input_embeddings().weight


def test_it_is_a_checkpoint_without_a_router(tmp_path):
    fixed = static_copy(routed(tiny_llama(), active_ratio=0.6))
    inputs = inputs_of(fixed)
    fixed.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["retained_ratio"] == 0.6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert router_of(loaded) is None
    assert "router" not in (tmp_path / "config.json").read_text()
    assert torch.equal(run(loaded, **inputs), run(fixed, **inputs))


def test_scores_from_a_few_batches_are_enough():
    model = routed(tiny_llama())
    model.rank_router.weight.data.zero_()
    initialize_router_(model, batches_for(model), seed=0, progress_bar=False)
    fixed = static_copy(model, 0.6)
    assert torch.isfinite(run(fixed, **inputs_of(fixed))).all()


def test_a_model_without_a_router_is_refused():
    with pytest.raises(ValueError, match=r"no router.*routed_copy"):
        static_copy(static(tiny_llama()))


def test_layers_with_an_adapter_on_their_parts_are_refused():
    model = routed(tiny_llama())
    get_peft_model(model, LoraConfig(target_modules=["down", "up"]))
    with pytest.raises(ValueError, match="down"):
        static_copy(model, 0.6)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(ValueError, match="`retained_ratio` must be in"):
        static_copy(routed(tiny_llama()), ratio)


def test_a_ratio_below_one_expert_in_each_layer_is_refused():
    with pytest.raises(ValueError, match="active_ratio"):
        static_copy(routed(tiny_llama()), 0.01)
