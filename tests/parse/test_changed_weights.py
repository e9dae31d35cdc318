"""Weights that are changed in place, in evaluation mode: nothing that was computed from earlier ones is used."""

import copy
import pickle

import pytest
import torch

from peft_jactus.parse.inputs import prompt_states
from tests.parse.test_models import run
from tests.support.compressed_models import tiny_llama
from tests.support.routed_models import cache_of, prompts, routed, with_cache

IDS = torch.stack([prompt[:3] for prompt in prompts(4)])


@torch.no_grad()
def change_(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(0.3 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))


def run_anew(model, **inputs):
    """Run a copy, which remembers nothing."""
    copied = copy.deepcopy(model)
    copied.rank_router.clear_cache()
    return run(copied, **inputs)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_step_of_the_router_chooses_anew_for_remembered_prompts(kind):
    model = routed(tiny_llama(), router_kind=kind, cache_bytes=2**20)
    router = model.rank_router
    before = run(model, input_ids=IDS)
    optimizer = torch.optim.SGD(router.parameters(), lr=5e3)
    scores = router(model.get_input_embeddings()(IDS).mean(1))
    (scores * torch.linspace(-1, 1, scores.shape[1])).sum().backward()
    optimizer.step()
    after = run(model, input_ids=IDS)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(after, run_anew(model, input_ids=IDS))


def test_another_standardisation_chooses_anew_for_remembered_prompts():
    model = routed(tiny_llama(), cache_bytes=2**20, cache_similarity=0.9)
    before = run(model, input_ids=IDS)
    model.rank_router.input_mean.copy_(model.get_input_embeddings()(IDS).mean((0, 1)))
    after = run(model, input_ids=IDS)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(after, run_anew(model, input_ids=IDS))


@pytest.mark.parametrize("ratio", [0.4, 0.5])
def test_the_first_block_is_read_with_the_weights_that_it_has(ratio):
    model = routed(tiny_llama(), router_input="first_block", cache_bytes=2**20, active_ratio=ratio)
    for _ in range(2):
        before = run(model, input_ids=IDS)
    change_(model.model.layers[0].parameters())
    after = run(model, input_ids=IDS)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(after, run_anew(model, input_ids=IDS))


def test_a_router_is_trained_on_the_first_block_with_the_weights_that_it_has():
    model = routed(tiny_llama(), router_input="first_block")
    prompt_states(model, {"input_ids": IDS}, "first_block")
    change_(model.model.layers[0].parameters())
    states = prompt_states(model, {"input_ids": IDS}, "first_block")
    model.rank_router.clear_cache()
    assert torch.equal(states, prompt_states(model, {"input_ids": IDS}, "first_block"))


def test_a_token_after_a_filled_cache_runs_with_the_weights_that_there_are():
    model = routed(tiny_llama(), cache_bytes=2**20)
    with torch.no_grad():
        cache = cache_of(model(input_ids=IDS[:1], use_cache=True))
    (pattern,) = cache.jactus_patterns.batch.patterns
    change_(model.parameters())
    given = copy.deepcopy(cache)
    with model.rank_router.gated(pattern.selected.float().unsqueeze(0)):
        expected = run(model, input_ids=IDS[:1, :1], **with_cache(model, given))
    after = run(model, input_ids=IDS[:1, :1], **with_cache(model, cache))
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_layer_computes_with_its_own_weights(duplicate):
    model = routed(tiny_llama(), active_ratio=1.0)
    run(model, input_ids=IDS)
    layers = [layer for layer in model.rank_router.layers if layer._product is not None]
    assert layers
    x = torch.randn(2, layers[0].in_features, generator=torch.Generator().manual_seed(0))
    change_(layers[0].parameters())
    copied = duplicate(layers[0])
    assert copied._product is None
    with torch.no_grad():
        torch.testing.assert_close(copied(x), copied.up(copied.down(x)), rtol=0, atol=1e-6)
