"""A routed model serves: in batches, with a key-value cache, in threads, and for encoders."""

import copy
import threading

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from peft_jactus.errors import RoutingWarning
from peft_jactus.parse import RankRouter
from peft_jactus.parse.installation import remove_router
from tests.support.compressed_models import batches_for, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from tests.support.routed_models import cache_of, padded, prompts, routed, static, with_cache

MODELS = [tiny_llama, tiny_gpt2, tiny_bert, tiny_vit]


def inputs_of(model):
    return {name: value for name, value in batches_for(model)[0].items() if name != "labels"}


@torch.no_grad()
def run(model, **inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("make", MODELS)
def test_all_experts_are_the_static_model_exactly(make):
    model = routed(make(), active_ratio=0.5)
    inputs = inputs_of(model)
    part = run(model, **inputs)
    model.rank_router.active_ratio = 1.0
    everything = run(model, **inputs)
    remove_router(model)
    assert torch.equal(everything, run(model, **inputs))
    assert not torch.allclose(part, everything, atol=1e-4)


@pytest.mark.parametrize("make", MODELS)
def test_all_experts_are_the_compressed_model_that_was_routed(make):
    dense = make()
    model = routed(dense, active_ratio=1.0)
    inputs = inputs_of(model)
    torch.testing.assert_close(run(model, **inputs), run(static(dense), **inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_patterns_run_what_gates_of_zero_and_one_run(make):
    model = routed(make())
    inputs = inputs_of(model)
    chosen = []
    router = model.rank_router
    choose = router.choose

    def spy(pooled):
        chosen.append(router.select(pooled))
        return choose(pooled)

    router.choose = spy
    logits = run(model, **inputs)
    assert len(chosen) == 1
    assert len(chosen[0].unique(dim=0)) > 1
    with router.gated(chosen[0].float()):
        torch.testing.assert_close(run(model, **inputs), logits, rtol=0, atol=1e-5)


def test_a_left_padded_batch_is_as_its_prompts_alone():
    model = routed(tiny_llama(), cache_bytes=2**20)
    rows = prompts(16)
    batch = padded(rows)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = run(model, **batch, position_ids=positions)
    assert model.rank_router.cache_info().patterns == len(rows)
    model.rank_router.clear_cache()
    for row, prompt in enumerate(rows):
        alone = run(model, input_ids=prompt.unsqueeze(0))
        torch.testing.assert_close(together[row, -len(prompt) :], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}]
)
def test_generating_for_a_left_padded_batch_is_as_for_its_prompts_alone(make, options):
    model = routed(make())
    rows = prompts(16)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    together = model.generate(**padded(rows), **options)[:, -8:]
    info = model.rank_router.cache_info()
    assert info.misses >= len(rows)  # each prompt is routed once, and not again while decoding
    assert info.misses + info.hits == len(rows) * options.get("num_beams", 1)
    model.rank_router.clear_cache()
    num = options.get("num_return_sequences", 1)
    for row, prompt in enumerate(rows):
        ids = prompt.unsqueeze(0)
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[:, -8:]
        assert torch.equal(together[row * num : (row + 1) * num], alone)


def test_decoding_keeps_the_experts_of_the_prompt():
    model = routed(tiny_llama(), reroute_continuations=False)
    ids = prompts(1, 12)[0].unsqueeze(0)
    selected = model.rank_router.select(model.get_input_embeddings()(ids[:, :6]).mean(1))
    with model.rank_router.gated(selected.float()):
        expected = run(model, input_ids=ids)
    with torch.no_grad():
        start = model(input_ids=ids[:, :6], use_cache=True)
        cache = cache_of(start)
        rest = [model(input_ids=ids[:, 6:7], **with_cache(model, cache))]
        copied = copy.deepcopy(cache)
        rest.append(model(input_ids=ids[:, 7:12], **with_cache(model, copied)))
    logits = torch.cat([start.logits, *(part.logits for part in rest)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def distinct_prompts(model, length):
    """Return two prompts for which other experts run."""
    rows = [prompt[:length] for prompt in prompts(16, length) if len(prompt) >= length]
    chosen = [model.rank_router.select(model.get_input_embeddings()(row).mean(0, keepdim=True)) for row in rows]
    other = next(row for row, selected in enumerate(chosen) if not torch.equal(selected, chosen[0]))
    return rows[0], rows[other]


def reorder(cache, rows):
    cache.reorder_cache(rows)


def select(cache, rows):
    cache.batch_select_indices(rows)


@pytest.mark.parametrize("change", [reorder, select])
def test_experts_move_with_the_rows_of_a_cache(change):
    model = routed(tiny_llama())
    rows = torch.stack(distinct_prompts(model, 4))
    following = torch.tensor([[7], [8]])
    with torch.no_grad():
        cache = cache_of(model(input_ids=rows, use_cache=True))
        assert len(cache.jactus_patterns.batch._groups) == 2
        change(cache, torch.tensor([1, 0]))
        together = model(input_ids=following, **with_cache(model, copy.deepcopy(cache))).logits
        for place, row in enumerate((1, 0)):
            alone = cache_of(model(input_ids=rows[row : row + 1], use_cache=True))
            expected = model(input_ids=following[place : place + 1], **with_cache(model, alone)).logits
            torch.testing.assert_close(together[place : place + 1], expected, rtol=0, atol=1e-5)


def test_experts_are_repeated_and_picked_with_the_rows_of_a_cache():
    model = routed(tiny_llama())
    rows = torch.stack(distinct_prompts(model, 4))
    with torch.no_grad():
        cache = cache_of(model(input_ids=rows, use_cache=True))
        first, second = cache.jactus_patterns.batch.patterns
        cache.batch_repeat_interleave(2)
        assert cache.jactus_patterns.batch.patterns == (first, first, second, second)
        cache.batch_select_indices(torch.tensor([False, True, True, False]))
        assert cache.jactus_patterns.batch.patterns == (first, second)
        assert type(cache).__name__ == "DynamicCache"
        assert isinstance(cache, transformers.DynamicCache)


def test_what_follows_a_cached_system_prompt_is_routed_by_both():
    model = routed(tiny_llama())
    system, question = distinct_prompts(model, 6)
    whole = torch.cat([system, question]).unsqueeze(0)
    with torch.no_grad():
        cache = cache_of(model(input_ids=system.unsqueeze(0), use_cache=True))
        model(input_ids=question.unsqueeze(0), **with_cache(model, cache))
        (pattern,) = cache.jactus_patterns.batch.patterns
        embeddings = model.get_input_embeddings()(whole)
    assert torch.equal(pattern.selected, model.rank_router.select(embeddings.double().mean(1))[0])


def test_chunks_of_a_prompt_end_with_its_own_choice_whatever_their_length():
    model = routed(tiny_llama())
    ids = torch.cat(distinct_prompts(model, 6)).unsqueeze(0)
    expected = model.rank_router.select(model.get_input_embeddings()(ids).double().mean(1))[0]
    with torch.no_grad():
        for lengths in ([12], [6, 6], [2, 4, 6], [5, 3, 4]):
            cache = None
            for chunk in ids.split(lengths, dim=1):
                options = {"use_cache": True} if cache is None else with_cache(model, cache)
                cache = cache_of(model(input_ids=chunk, **options))
            assert torch.equal(cache.jactus_patterns.batch.patterns[0].selected, expected)


def test_by_default_no_output_depends_on_earlier_prompts():
    model = routed(tiny_llama(), seed=1, cache_bytes=2**20)
    rows = prompts(16)
    alone = []
    for row in rows:
        model.rank_router.clear_cache()
        alone.append(run(model, input_ids=row.unsqueeze(0)))
    for _ in range(2):
        for row, expected in zip(rows, alone, strict=True):
            assert torch.equal(run(model, input_ids=row.unsqueeze(0)), expected)
    assert model.rank_router.cache_info().hits


def test_a_cache_of_other_rows_is_refused():
    model = routed(tiny_llama())
    rows = torch.stack([prompt[:3] for prompt in prompts(3)])
    with torch.no_grad():
        cache = cache_of(model(input_ids=rows, use_cache=True))
        with pytest.raises(ValueError, match=r"filled by a batch of 3 rows.*now used with 2 rows"):
            model(input_ids=rows[:2, :1], **with_cache(model, cache))
    assert model.rank_router._state.active is None
    assert model.rank_router._state.call is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_chooses_for_each_input(side):
    model = routed(tiny_bert())
    rows = prompts(8)
    batch = padded(rows, side=side)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = run(model, **batch, position_ids=positions)
    assert model.rank_router.cache_info().misses == len(rows)
    model.rank_router.clear_cache()
    if side == "right":  # its pooler reads the first position
        for row, prompt in enumerate(rows):
            alone = run(model, input_ids=prompt.unsqueeze(0))
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_embeddings_route_as_their_tokens_do():
    model = routed(tiny_llama())
    batch = padded(prompts(4))
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    by_tokens = run(model, **batch)
    by_embeddings = run(model, inputs_embeds=embeddings, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(by_embeddings, by_tokens, rtol=0, atol=1e-6)


def test_a_prompt_takes_the_pattern_of_a_similar_one():
    model = routed(tiny_llama(), cache_similarity=0.5)
    ids = prompts(1, 14)[0].unsqueeze(0)
    other = ids.clone()
    other[0, 3] = 5
    run(model, input_ids=ids)
    run(model, input_ids=other)
    assert (model.rank_router.cache_info().hits, model.rank_router.cache_info().misses) == (1, 1)


def test_remembered_factors_take_no_more_than_the_dense_weights():
    model = routed(tiny_llama(), active_ratio=0.4)
    for prompt in prompts(16):
        run(model, input_ids=prompt.unsqueeze(0))
    info = model.rank_router.cache_info()
    dense = 4 * int(model.rank_router.table.dense_costs.sum())
    assert 0.7 * dense < info.num_bytes <= dense
    assert info.entries == info.patterns == 2


def test_leading_experts_are_not_copied():
    model = routed(tiny_llama())
    router = model.rank_router
    with torch.no_grad():
        for first, last in router.table.spans:
            router.bias[first:last] = torch.linspace(0, -1000, last - first)
    ids = prompts(1)[0].unsqueeze(0)
    selected = router.select(model.get_input_embeddings()(ids).mean(1))
    with router.gated(selected.float()):
        expected = run(model, input_ids=ids)
    torch.testing.assert_close(run(model, input_ids=ids), expected, rtol=0, atol=1e-5)
    info = router.cache_info()
    assert (info.patterns, info.num_bytes) == (1, 0)


def test_another_budget_needs_no_other_router():
    model = routed(tiny_llama())
    inputs = inputs_of(model)
    pooled = model.get_input_embeddings()(inputs["input_ids"]).mean(1)
    router = model.rank_router
    for ratio in (0.9, 0.6, 0.4):
        router.active_ratio = ratio
        selected = router.select(pooled)
        assert (router.table.active_ratio(selected) <= ratio).all()
        assert (router.table.active_ratio(selected) > ratio - 0.05).all()
        with router.gated(selected.float()):
            expected = run(model, **inputs)
        torch.testing.assert_close(run(model, **inputs), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"`active_ratio` must be in \(0, 1\]; got 0"):
        router.active_ratio = 0
    with pytest.raises(ValueError, match="is too small: one expert in each layer"):
        router.active_ratio = 0.01
    assert router.active_ratio == 0.4


def test_a_copied_model_runs_for_itself():
    model = routed(tiny_llama())
    inputs = inputs_of(model)
    before = run(model, **inputs)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in copied.rank_router.layers:
            layer.up.weight.zero_()
    copied.rank_router.clear_cache()
    assert copied.rank_router.cache_info().entries == 0
    assert not torch.allclose(run(copied, **inputs), before)
    assert torch.equal(run(model, **inputs), before)
    assert {id(module) for module in copied.modules()} >= {id(layer) for layer in copied.rank_router.layers}


@pytest.mark.parametrize("change", ["train", "to", "load_state_dict"])
def test_patterns_are_forgotten_when_weights_may_change(change):
    model = routed(tiny_llama())
    inputs = inputs_of(model)
    model.rank_router.active_ratio = 0.8
    run(model, **inputs)
    assert model.rank_router.cache_info().entries
    if change == "train":
        model.train()
    elif change == "to":
        model.to(torch.float64)
    else:
        model.load_state_dict(model.state_dict())
    assert model.rank_router.cache_info().entries == 0
    assert all(layer._product is None for layer in model.rank_router.layers)


def test_gradients_reach_the_factors_of_chosen_experts_alone():
    model = routed(tiny_llama())
    ids = prompts(1)[0].unsqueeze(0)
    expected = run(model, input_ids=ids)
    logits = model(input_ids=ids).logits  # gradients are on
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    logits.square().sum().backward()
    router = model.rank_router
    selected = router.select(model.get_input_embeddings()(ids).mean(1))[0]
    for layer in router.layers:
        has_gradient = layer.down.weight.grad.abs().sum(1) > 0
        runs = torch.zeros_like(has_gradient)
        runs[router.table.term_index(layer.position, selected)] = True
        assert torch.equal(has_gradient, runs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["", "model"])
def test_gradients_of_blocks_that_run_again_with_other_ranks_are_refused(reentrant, name):
    model = routed(tiny_llama()).train()
    called, ids = model.get_submodule(name), prompts(1)[0].unsqueeze(0)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    with pytest.raises(
        ValueError, match=r"uses gradient checkpointing, .*`model.activation_checkpointing_disable\(\)`"
    ):
        called(input_ids=ids, use_cache=False)
    assert model.rank_router._state.call is None
    with torch.no_grad():
        called(input_ids=ids, use_cache=False)
    model.eval()(input_ids=ids).logits.sum().backward()  # then nothing runs again
    model.train().activation_checkpointing_disable()
    called(input_ids=ids, use_cache=False)


def test_lora_on_the_parts_is_routed_too():
    model = routed(tiny_llama())
    ids = padded(prompts(4))
    before = run(model, **ids)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["up", "down"], r=2)).eval()
    torch.testing.assert_close(run(adapted, **ids), before, rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    changed = run(adapted, **ids)
    assert not torch.allclose(changed, before, atol=1e-3)
    merged = adapted.merge_and_unload()
    merged.rank_router.clear_cache()
    torch.testing.assert_close(run(merged, **ids), changed, rtol=0, atol=1e-4)


def test_an_error_in_the_model_leaves_nothing_behind():
    model = routed(tiny_llama())
    inputs = inputs_of(model)
    before = run(model, **inputs)

    def fail(*args):
        raise ZeroDivisionError

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run(model, **inputs)
    handle.remove()
    assert model.rank_router._state.active is None
    assert model.rank_router._state.call is None
    assert torch.equal(run(model, **inputs), before)


# In the base model, before it, and after it, where torch runs no hooks at the end of the call.
@pytest.mark.parametrize("name", ["model.layers.1.mlp", "model.embed_tokens", "model", "lm_head"])
@pytest.mark.parametrize("gates", [False, True])
def test_an_interrupted_call_has_no_part_in_the_next_one(name, gates):
    model = routed(tiny_llama())
    first, second = ({"input_ids": prompt.unsqueeze(0)} for prompt in prompts(2))
    before = run(model, **second)
    assert not torch.allclose(before, run_with_experts_of(model, first, **second), atol=1e-3)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.get_submodule(name).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, **first)
    handle.remove()
    if gates:
        run_with_experts_of(model, second, **second)
    assert torch.equal(run(model, **second), before)
    assert model.rank_router._state.active is None
    assert model.rank_router._state.call is None


@pytest.mark.parametrize("name", ["model.layers.1.mlp", "model.embed_tokens", "model.norm", "lm_head"])
def test_an_interrupted_call_has_no_part_in_the_next_one_of_the_base_model(name):
    model = routed(tiny_llama())
    first, second = (prompt.unsqueeze(0) for prompt in prompts(2))

    @torch.no_grad()
    def states():
        return model.model(input_ids=second).last_hidden_state

    def interrupt(*args):
        raise KeyboardInterrupt

    before = states()
    handle = model.get_submodule(name).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, input_ids=first)
    handle.remove()
    for _ in range(2):
        assert torch.equal(states(), before)
        assert model.rank_router._state.active is None
        assert model.rank_router._state.call is None


@torch.no_grad()
def run_with_experts_of(model, prompt, **inputs):
    selected = model.rank_router.select(model.get_input_embeddings()(prompt["input_ids"]).mean(1))
    with model.rank_router.gated(selected.float()):
        return run(model, **inputs)


def test_a_call_that_could_not_be_routed_says_so():
    model = routed(tiny_bert())
    inputs = inputs_of(model)
    with torch.no_grad():
        other = model.bert.embeddings.word_embeddings
        model.bert.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(other.weight)
        with pytest.warns(RoutingWarning, match="nothing was routed and all ranks ran"):
            logits = model(**inputs).logits
    remove_router(model)
    assert torch.equal(logits, run(model, **inputs))


def test_removing_the_router_leaves_no_hook():
    model = routed(tiny_llama())
    remove_router(model)
    assert not any(isinstance(module, RankRouter) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_threads_do_not_see_each_others_experts():
    model = routed(tiny_llama(), cache_entries=4)
    rows = [prompt.unsqueeze(0) for prompt in prompts(8)]
    expected = [run(model, input_ids=ids) for ids in rows]
    differences, failures = [], []

    def serve(number):
        try:
            for turn in range(30):
                row = (number * 5 + turn) % len(rows)
                differences.append((run(model, input_ids=rows[row]) - expected[row]).abs().max())
        except Exception as error:  # noqa: BLE001  # a thread's exception is lost otherwise
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(differences) == 8 * 30
    assert max(differences) <= 1e-5
    info = model.rank_router.cache_info()
    assert info.entries <= 4
    assert info.hits + info.misses == 8 * 31


def test_inference_mode_leaves_nothing_that_only_it_can_use():
    model = routed(tiny_llama()).requires_grad_(False)
    model.rank_router.active_ratio = 0.9
    first, second = (prompt[:3].unsqueeze(0) for prompt in prompts(2))
    with torch.inference_mode():
        expected = model(input_ids=first).logits.clone()
    run(model, input_ids=second)
    embeddings = model.get_input_embeddings()(first).requires_grad_(True)
    logits = model(inputs_embeds=embeddings).logits
    assert model.rank_router.cache_info().hits == 1
    logits.sum().backward()
    assert embeddings.grad.abs().max() > 0
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_many_patterns_run_as_gates_once_that_reads_less():
    model = routed(tiny_llama())
    rows = prompts(8)
    batch = padded(rows)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    layer = model.rank_router.layers[0]
    calls = []
    gated = layer.gated
    layer.gated = lambda *inputs: calls.append(inputs) or gated(*inputs)
    run(model, **batch, position_ids=positions)
    assert len(calls) == 1  # all rows at once
    run(model, input_ids=rows[0].unsqueeze(0))
    assert len(calls) == 1  # gathered factors


def test_autocast_does_not_round_scores():
    router = routed(tiny_llama()).rank_router
    pooled = torch.randn(4, router.input_mean.numel(), generator=torch.Generator().manual_seed(0))
    expected = router(pooled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(pooled), expected)
