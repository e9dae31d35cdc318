"""Assisted generation of a routed model gives what plain generation gives, whoever makes the drafts."""

import copy
import inspect
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from peft_jactus.parse.installation import remove_router
from tests.support.compressed_models import tiny_gpt2, tiny_llama
from tests.support.routed_models import cache_of, padded, prompts, routed, with_cache

NUM_NEW = 12


def repetitive_prompts(num=6):
    """Return prompts in which a look-up finds drafts, so that the first call has some, too."""
    return [torch.cat([prompt, prompt[:3], prompt]).unsqueeze(0) for prompt in prompts(num)]


def generate(model, ids, *, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    outputs = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=mask, **options, **outputs)


def assert_equal(output, expected):
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(output.logits), torch.cat(expected.logits), rtol=0, atol=1e-5)


def assistance(kind, model):
    """Return options of `generate`; the drafts are often wrong."""
    if kind == "look-up":
        return {"prompt_lookup_num_tokens": 3}
    if kind == "early exit":
        return {"assistant_early_exit": 1}
    if kind == "itself":
        return {"assistant_model": copy.deepcopy(model)}
    make = {"LlamaForCausalLM": tiny_llama, "GPT2LMHeadModel": tiny_gpt2}[type(model).__name__]
    return {"assistant_model": make() if kind == "dense" else routed(make(), seed=5, active_ratio=0.4)}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("kind", ["look-up", "dense", "routed", "itself"])
@pytest.mark.parametrize("reroute", [True, False])
@pytest.mark.parametrize("router_input", ["embeddings", "first_block"])
def test_assisted_generation_is_plain_generation(make, kind, reroute, router_input):
    model = routed(make(), reroute_continuations=reroute, router_input=router_input)
    options = assistance(kind, model)
    for ids in repetitive_prompts():
        assert_equal(generate(model, ids, **options), generate(model, ids))


def test_a_model_that_assists_itself_with_its_first_layers_generates_as_alone():
    model = routed(tiny_llama())
    for ids in repetitive_prompts():
        assert_equal(generate(model, ids, **assistance("early exit", model)), generate(model, ids))


@pytest.mark.parametrize("router_input", ["embeddings", "first_block"])
@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_without_a_cache_the_prompt_alone_chooses_too(router_input, where):
    model = routed(tiny_llama(), router_input=router_input)
    batch = padded([ids[0] for ids in repetitive_prompts()])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = generate(model, ids, mask=mask)
    if where == "argument":
        options = {"use_cache": False}
    elif where == "config":
        options = {"generation_config": GenerationConfig(use_cache=False)}
    else:
        options, model.generation_config.use_cache = {}, False
    assert_equal(generate(model, ids, mask=mask, **options), expected)


def test_drafts_are_asked_for_by_a_config_too():
    model = routed(tiny_llama())
    model.generation_config.eos_token_id = None
    rows = repetitive_prompts()
    plain = [generate(model, ids).sequences for ids in rows]
    config = GenerationConfig(max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=3)
    for ids, expected in zip(rows, plain, strict=True):
        assert torch.equal(model.generate(inputs=ids, generation_config=config), expected)
    model.generation_config = config
    for ids, expected in zip(rows, plain, strict=True):
        assert torch.equal(model.generate(ids), expected)


def test_text_after_assisted_generation_is_routed_as_after_plain_generation():
    model = routed(tiny_llama())
    ids, following = repetitive_prompts()[0], prompts(1, 8, seed=3)[0].unsqueeze(0)
    logits = []
    for options in ({"prompt_lookup_num_tokens": 3}, {}):
        cache = cache_of(generate(model, ids, **options))
        cache.crop(ids.shape[1] + NUM_NEW - 3 - cache.get_seq_length())  # some drafts may be there, or not
        with torch.no_grad():
            logits.append(model(input_ids=following, **with_cache(model, cache)).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_assisted_generation_goes_on_from_a_filled_cache_as_plain_generation():
    model = routed(tiny_llama())
    ids = repetitive_prompts()[0]
    outputs = []
    for options in ({"prompt_lookup_num_tokens": 3}, {}):
        with torch.no_grad():
            cache = cache_of(model(input_ids=ids, use_cache=True))
        mask = torch.ones(1, 2 * ids.shape[1], dtype=torch.long)
        outputs.append(generate(model, ids, mask=mask, **with_cache(model, cache), **options))
    assert_equal(*outputs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_generates_for_itself(copied):
    model = routed(tiny_llama())
    ids = repetitive_prompts()[0]
    expected = generate(model, ids)
    again = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal(generate(again, ids, prompt_lookup_num_tokens=3), expected)


def test_an_adapted_model_generates_as_it_does_alone():
    model = get_peft_model(routed(tiny_llama()), LoraConfig(target_modules=["up", "down"], r=2)).eval()
    for ids in repetitive_prompts(3):
        options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NUM_NEW}
        options |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(model.generate(**options, prompt_lookup_num_tokens=3), model.generate(**options))


def test_generate_looks_as_it_did():
    model = routed(tiny_llama())
    assert inspect.signature(model.generate) == inspect.signature(tiny_llama().generate)
    assert model.generate.__doc__ == type(model).generate.__doc__
    remove_router(model)
    assert "generate" not in vars(model)


def test_an_error_while_generating_leaves_nothing_behind():
    model = routed(tiny_llama())
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        generate(model, torch.cat([repetitive_prompts()[0]] * 2), prompt_lookup_num_tokens=3)
    assert model.rank_router._state.generation is None
