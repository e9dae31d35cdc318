"""A router that reads the output of the first block: what it reads, and that the rest is as with embeddings."""

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from peft_jactus.errors import RoutingWarning
from peft_jactus.parse import RouterConfig, conversion, inputs, routed_copy
from peft_jactus.parse.inputs import first_block, prompt_states
from peft_jactus.parse.installation import remove_router
from tests.parse.test_changed_caches import dynamic, sliding, tokens
from tests.parse.test_changed_caches import static as static_cache
from tests.parse.test_models import MODELS, inputs_of, run
from tests.support.compressed_models import tiny_bert, tiny_gpt2, tiny_llama
from tests.support.routed_models import padded, prompts, routed, static, with_cache


def reading_the_first_block(make=tiny_llama, **fields):
    return routed(make(), router_input="first_block", **fields)


def read_by(model):
    """Return a list that gets what the router reads, for each choice."""
    router, read = model.rank_router, []
    choose = router.choose

    def spy(pooled):
        read.append(pooled)
        return choose(pooled)

    router.choose = spy
    return read


@torch.no_grad()
def outputs_of_first_block(model, **batch):
    """Return them from a run of the whole model with all its ranks."""
    rows = len(next(iter(batch.values())))
    with model.rank_router.gated(torch.ones(rows, len(model.rank_router.table))):
        return model(**batch, output_hidden_states=True).hidden_states[1]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_the_mean_output_of_the_first_block_is_read_whatever_runs_then(make, ratio):
    model = reading_the_first_block(make, active_ratio=ratio)
    batch, read = inputs_of(model), read_by(model)
    run(model, **batch)
    expected = outputs_of_first_block(model, **batch)
    mask = batch.get("attention_mask", torch.ones(expected.shape[:2])).unsqueeze(2)
    expected = (expected * mask).sum(1) / mask.sum(1)
    assert len(read) == 1
    torch.testing.assert_close(read[0].float(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_a_router_is_trained_on_what_it_reads_when_it_serves(make):
    model = reading_the_first_block(make)
    batch, read = inputs_of(model), read_by(model)
    run(model, **batch)
    mask = batch.get("attention_mask")
    states = prompt_states(model, {**batch, "labels": torch.zeros(1)}, "first_block")
    mask = torch.ones(states.shape[:2]) if mask is None else mask
    pooled = (states.double() * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(read[0], pooled, rtol=0, atol=1e-6)
    run(model, **batch)  # nothing is left of the call that ended after the first block
    assert len(read) == 2
    assert torch.equal(read[0], read[1])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_padding_is_not_read(make):
    model = reading_the_first_block(make)
    rows, read = prompts(16), read_by(model)
    batch = padded(rows, side="right" if make is tiny_bert else "left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    run(model, **batch, position_ids=positions)
    for prompt in rows:
        run(model, input_ids=prompt.unsqueeze(0))
    torch.testing.assert_close(read[0], torch.cat(read[1:]), rtol=0, atol=1e-5)


def test_padding_that_becomes_nan_is_not_read():
    states = torch.ones(2, 3, 4)
    states[0, 0] = torch.nan
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(inputs.pool_states(states, mask), torch.ones(2, 4, dtype=torch.float64))


def test_order_matters_to_the_first_block():
    model = reading_the_first_block()
    read, prompt = read_by(model), tokens(8)
    run(model, input_ids=prompt)
    run(model, input_ids=prompt.flip(1))
    assert not torch.allclose(read[0], read[1], atol=1e-4)


@pytest.mark.parametrize("make", [dynamic, static_cache, sliding])
def test_each_part_of_a_prompt_is_read_by_itself(make):
    model = reading_the_first_block()
    read, cache, parts = read_by(model), make(model), (tokens(6), tokens(3, seed=1), tokens(1, seed=2))
    for part in parts:
        run(model, input_ids=part, **with_cache(model, cache))
    assert len(read) == 2  # not for the generated token
    alone = [outputs_of_first_block(model, input_ids=part).sum(1) for part in parts[:2]]
    torch.testing.assert_close(read[0].float(), alone[0] / 6, rtol=0, atol=1e-5)
    torch.testing.assert_close(read[1].float(), (alone[0] + alone[1]) / 9, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [dynamic, static_cache])
def test_padding_in_any_part_of_a_prompt_is_not_read(make):
    model = reading_the_first_block()
    rows = [prompt for prompt in prompts(16, 10) if len(prompt) > 6][:4]
    batch = padded([*rows, prompts(1, 10, seed=1)[0][:3]])  # the last row is only padding in the first part
    ids, mask = batch.values()
    read = read_by(model)
    model.generate(**batch, **with_cache(model, make(model)), max_new_tokens=1, prefill_chunk_size=4, pad_token_id=0)
    total = torch.zeros(len(ids), model.config.hidden_size)
    for row, (prompt, kept) in enumerate(zip(ids, mask, strict=True)):
        for part, is_kept in zip(prompt.split(4), kept.bool().split(4), strict=True):
            if is_kept.any():
                total[row] += outputs_of_first_block(model, input_ids=part[is_kept].unsqueeze(0))[0].sum(0)
    torch.testing.assert_close(read[-1].float(), total / mask.sum(1, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_generating_for_a_padded_batch_is_as_for_its_prompts_alone(make, options):
    model = reading_the_first_block(make)
    rows = prompts(8)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    together = model.generate(**padded(rows), **settings)
    for row, prompt in enumerate(rows):
        ids = prompt.unsqueeze(0)
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert torch.equal(together[row, -6:], alone[0, -6:])


def test_embeddings_are_read_as_their_tokens_are():
    model = reading_the_first_block()
    read, ids = read_by(model), tokens(8)
    expected = run(model, input_ids=ids)
    assert torch.equal(run(model, inputs_embeds=model.get_input_embeddings()(ids)), expected)
    assert torch.equal(read[0], read[1])


def test_an_error_in_the_first_block_leaves_nothing_behind():
    model = reading_the_first_block()
    ids = tokens(8)
    expected = run(model, input_ids=ids)
    block = first_block(model)
    handle = block.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, input_ids=ids)
    with pytest.raises(ZeroDivisionError):
        prompt_states(model, {"input_ids": ids}, "first_block")
    handle.remove()
    assert torch.equal(run(model, input_ids=ids), expected)
    remove_router(model)
    assert not block._forward_pre_hooks


def test_a_model_without_known_blocks_is_refused_before_any_work(monkeypatch):
    model = static(tiny_llama())
    monkeypatch.setattr(PreTrainedModel, "get_decoder", lambda self: nn.Linear(2, 2))
    monkeypatch.setattr(conversion, "_in_order", lambda *_: pytest.fail("work was done"))
    config = RouterConfig(active_ratio=0.5, expert_size=2, router_input="first_block")
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has no block .* Set `router_input='embeddings'`"):
        routed_copy(model, config, progress_bar=False)


def test_a_call_that_does_not_reach_the_first_block_says_so(monkeypatch):
    model = reading_the_first_block()
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])  # without the hook
    model.model.layers[0]._forward_pre_hooks.clear()
    with pytest.warns(RoutingWarning, match="nothing was routed and all ranks ran"):
        run(model, input_ids=tokens(8))
    monkeypatch.setattr(inputs, "first_block", lambda model: nn.Identity())
    with pytest.warns(RoutingWarning), pytest.raises(RuntimeError, match="its first block was not"):
        prompt_states(model, {"input_ids": tokens(8)}, "first_block")
