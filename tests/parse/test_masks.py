"""The router reads the positions that a mask keeps, whatever the form of the mask."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, StaticCache

from tests.parse.test_models import run
from tests.support.compressed_models import VOCABULARY, tiny_llama
from tests.support.routed_models import padded, prompts, routed, with_cache


@pytest.fixture(scope="module", params=["embeddings", "first_block"])
def router_input(request):
    return request.param


@pytest.fixture(scope="module")
def model(router_input):
    return routed(tiny_llama(), router_input=router_input)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def sliding_model(request, router_input):
    """A model of which no layer sees all."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MistralConfig(**sizes, **heads, sliding_window=4, pad_token_id=0, attn_implementation=request.param)
        return routed(MistralForCausalLM(config).eval(), router_input=router_input)


def static_cache(model):
    return StaticCache(config=model.config, max_cache_len=24)


@pytest.mark.parametrize("rest", [0, 1])
def test_a_mask_may_be_as_long_as_a_static_cache(model, rest):
    batch = padded(prompts(4))
    ids, mask = batch.values()
    expected, got = static_cache(model), static_cache(model)
    longer = torch.nn.functional.pad(mask, (0, 24 - mask.shape[1]), value=rest)  # what is in no cache yet
    for start, end in ((0, 6), (6, 11), (11, 12)):
        part = ids[:, start:end]
        whole = longer.clone()
        whole[:, end:] = rest
        logits = run(model, input_ids=part, attention_mask=whole, **with_cache(model, got))
        wanted = run(model, input_ids=part, attention_mask=mask[:, :end], **with_cache(model, expected))
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("padding_sees", ["nothing", "itself", "all"])
def test_what_padding_sees_does_not_count(model, padding_sees):
    """In a mask with a row for each position, as users make it for packed or padded rows."""
    ids, mask = padded(prompts(4), side="left").values()
    length = mask.shape[1]
    ids = torch.where(mask == 0, 7, ids)  # a token that would change the choice
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, :]
    if padding_sees == "itself":
        seen |= torch.eye(length, dtype=torch.bool)
    if padding_sees == "all":
        seen |= ~seen.any(-1, keepdim=True)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = run(model, input_ids=ids, attention_mask=mask, position_ids=places)
    wide = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    logits = run(model, input_ids=ids, attention_mask=wide, position_ids=places)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_prompt_is_read_whole_where_each_layer_sees_a_window_of_it(sliding_model, chunk):
    model, rows = sliding_model, prompts(4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"prefill_chunk_size": chunk}
    read, choose = [], model.rank_router.choose
    model.rank_router.choose = lambda pooled: read.append(pooled) or choose(pooled)
    expected = model.generate(**padded(rows), **options)
    num_parts = len(read)
    static = model.generate(**padded(rows), **options, cache_implementation="static")
    del model.rank_router.choose
    assert len(read) == 2 * num_parts
    torch.testing.assert_close(read[-1], read[num_parts - 1], rtol=0, atol=1e-6)
    assert torch.equal(static, expected)
