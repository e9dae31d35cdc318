"""Whatever is done to a key-value cache, what follows is routed by the tokens that are in it, or an error says so."""

import copy
import pickle

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache, xLSTMConfig, xLSTMForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from peft_jactus.parse.inputs import block_output
from tests.support.compressed_models import VOCABULARY, tiny_llama
from tests.support.routed_models import cache_of, padded, prompts, routed, with_cache


@pytest.fixture(scope="module", params=["embeddings", "first_block"])
def model(request):
    return routed(tiny_llama(), router_input=request.param)


def tokens(length, *, rows=1, seed=0):
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def dynamic(model):
    return DynamicCache(config=model.config)


def static(model):
    return StaticCache(config=model.config, max_cache_len=32)


def sliding(model):
    return Cache(layers=[DynamicSlidingWindowLayer(sliding_window=40) for _ in range(model.config.num_hidden_layers)])


@torch.no_grad()
def run(model, cache, *parts, **options):
    """Run parts one after another on a cache; return the logits of the last."""
    for part in parts:
        logits = model(input_ids=part, **with_cache(model, cache), **options).logits
    return logits


def filled(model, *parts, make=dynamic):
    cache = make(model)
    run(model, cache, *parts)
    return cache


FIRST, SECOND, OTHER = (tokens(6, seed=seed) for seed in range(3))
ONE_BY_ONE = tokens(3, seed=3).split(1, dim=1)


@pytest.mark.parametrize("make", [dynamic, static, sliding])
@pytest.mark.parametrize("following", [OTHER, OTHER[:, :1]], ids=["text", "token"])
@pytest.mark.parametrize("cut", [[SECOND], ONE_BY_ONE, [SECOND, *ONE_BY_ONE]], ids=["text", "tokens", "both"])
def test_a_cut_cache_goes_on_as_one_that_never_had_more(model, make, following, cut):
    cache = filled(model, FIRST, *cut, make=make)
    cache.crop(-sum(part.shape[1] for part in cut))
    expected = run(model, filled(model, FIRST, make=make), following)
    assert torch.equal(run(model, cache, following), expected)


def test_a_cache_that_is_cut_to_nothing_is_a_new_one(model):
    cache = filled(model, FIRST, SECOND)
    cache.crop(-12)
    assert torch.equal(run(model, cache, OTHER), run(model, dynamic(model), OTHER))


@pytest.mark.parametrize("make", [dynamic, static, sliding])
@pytest.mark.parametrize("following", [OTHER, OTHER[:, :1]], ids=["text", "token"])
def test_a_cache_that_is_cut_inside_a_part_of_the_prompt_is_refused(model, make, following):
    # Keys and values of what is left were computed with ranks that the rest had a part in.
    cache = filled(model, FIRST, SECOND, make=make)
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"cut after 10 positions, inside a part of the prompt \(positions 6 to 12\)"):
        run(model, cache, following)
    cache.crop(-4)
    assert torch.equal(run(model, cache, following), run(model, filled(model, FIRST, make=make), following))


def test_whoever_asks_for_it_keeps_the_ranks_of_a_prompt_that_is_cut():
    model = routed(tiny_llama())
    cache = filled(model, FIRST)
    before = copy.deepcopy(cache)
    expected = run(model, before, OTHER[:, :1])
    cache.crop(-1)
    model.rank_router.reroute_continuations = False
    again = run(model, cache, FIRST[:, -1:], OTHER[:, :1])
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_rows_move_in_all_parts_of_the_prompts(model):
    first, second, other = (tokens(6, rows=2, seed=seed) for seed in range(10, 13))
    cache = filled(model, first, second)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, True, False]))
    cache.crop(-6)
    order = [1, 0]
    expected = run(model, filled(model, first[order]), other)
    torch.testing.assert_close(run(model, cache, other), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [dynamic, static, sliding])
def test_a_reset_cache_is_a_new_one(model, make):
    cache = filled(model, FIRST, SECOND, make=make)
    cache.reset()
    assert torch.equal(run(model, cache, OTHER), run(model, make(model), OTHER))


def test_a_reset_cache_that_something_else_has_filled_is_refused(model):
    cache = filled(model, FIRST, make=static)
    cache.reset()
    with model.rank_router.gated(torch.ones(1, len(model.rank_router.table))):
        run(model, cache, SECOND)
    with pytest.raises(ValueError, match="has 6 positions, but not from calls of this routed model"):
        run(model, cache, OTHER)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
def test_a_cut_copy_says_nothing_of_its_original(model, duplicate):
    cache = filled(model, FIRST, SECOND)
    copied = duplicate(cache)
    copied.crop(-6)
    assert torch.equal(run(model, copied, OTHER), run(model, filled(model, FIRST), OTHER))
    if duplicate is copy.deepcopy:
        assert torch.equal(run(model, cache, OTHER), run(model, filled(model, FIRST, SECOND), OTHER))
    else:  # both have the same keys and values
        with pytest.raises(ValueError, match="was changed without its own methods"):
            run(model, cache, OTHER)


def slice_layers(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :-6, :], layer.values[..., :-6, :]


def crop_layers(cache):
    for layer in cache.layers:
        layer.crop(-6)


def add_to_layers(cache):
    for layer in cache.layers:
        layer.update(layer.keys[..., :1, :], layer.values[..., :1, :])


@pytest.mark.parametrize("change", [slice_layers, crop_layers, add_to_layers])
@pytest.mark.parametrize("following", [OTHER, OTHER[:, :1]], ids=["text", "token"])
def test_a_cache_whose_layers_were_edited_is_refused(model, change, following):
    cache = filled(model, FIRST, SECOND)
    change(cache)
    with pytest.raises(
        ValueError, match=r"changed without its own methods.*had 12 positions and has \d+.*Change it with"
    ):
        run(model, cache, following)


def swap_in_place(layer):
    for tensor in (layer.keys, layer.values):
        tensor.copy_(tensor[[1, 0]])


def swap(layer):
    layer.keys, layer.values = layer.keys[[1, 0]], layer.values[[1, 0]]


@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize("change", [swap, swap_in_place, lambda layer: layer.reorder_cache(torch.tensor([1, 0]))])
def test_a_cache_whose_layers_have_other_rows_is_refused(model, make, change):
    cache = filled(model, tokens(6, rows=2), make=make)
    for layer in cache.layers:
        change(layer)
    for used in (cache, copy.deepcopy(cache)):
        with pytest.raises(ValueError, match="was changed without its own methods"):
            run(model, used, tokens(1, rows=2))
    cache.crop(0)
    with pytest.raises(ValueError, match="not from calls of this routed model"):
        run(model, cache, tokens(1, rows=2))


def test_a_cache_whose_edited_layers_were_cut_then_is_refused(model):
    cache = filled(model, FIRST, SECOND)
    slice_layers(cache)
    cache.crop(-1)
    with pytest.raises(ValueError, match="has 5 positions, but not from calls of this routed model"):
        run(model, cache, OTHER)


def repeat_layers(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)


@pytest.mark.parametrize(
    ("reroute", "message"),
    [
        (True, "changed without its own methods"),
        (False, "batch of 2 rows.*now used with 4 .*`batch_repeat_interleave`"),
    ],
)
def test_rows_that_layers_repeat_are_refused_as_nobody_knows_which_is_which(reroute, message):
    model = routed(tiny_llama(), reroute_continuations=reroute)
    cache = filled(model, tokens(6, rows=2))
    repeat_layers(cache)
    with pytest.raises(ValueError, match=message):
        run(model, cache, tokens(1, rows=4))


@pytest.mark.parametrize("following", [OTHER, OTHER[:, :1]], ids=["text", "token"])
def test_a_single_row_that_layers_repeat_is_known(model, following):
    cache = filled(model, FIRST)
    expected = run(model, copy.deepcopy(cache), following)
    repeat_layers(cache)
    rows = run(model, cache, following.repeat(2, 1))
    torch.testing.assert_close(rows, expected.repeat(2, 1, 1), rtol=0, atol=1e-5)


def from_tensors(model):
    return DynamicCache([(layer.keys, layer.values) for layer in filled(model, FIRST).layers])


def of_another_model(model):
    return filled(copy.deepcopy(model), FIRST)


def of_given_experts(model):
    with model.rank_router.gated(torch.ones(1, len(model.rank_router.table))):
        return filled(model, FIRST)


def pickled(model):
    return pickle.loads(pickle.dumps(filled(model, FIRST)))


@pytest.mark.parametrize("make", [from_tensors, of_another_model, of_given_experts, pickled])
@pytest.mark.parametrize("following", [OTHER, OTHER[:, :1]], ids=["text", "token"])
def test_a_cache_of_unknown_tokens_is_refused_unless_what_follows_shall_choose(make, following):
    model = routed(tiny_llama())
    cache = make(model)
    with pytest.raises(
        ValueError, match=r"has 6 positions, but not from calls of this routed model.*Fill a new cache"
    ):
        run(model, cache, following)
    assert model.rank_router._state.call is None
    model.rank_router.reroute_continuations = False
    selected = model.rank_router.select(model.get_input_embeddings()(following).double().mean(1))
    with model.rank_router.gated(selected.float()):
        expected = run(model, make_again(cache), following)
    torch.testing.assert_close(run(model, cache, following), expected, rtol=0, atol=1e-5)


def make_again(cache):
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


def test_a_cache_that_loses_tokens_without_counting_them_is_refused(model):
    class Uncounted(DynamicCache):
        length = 0

        def get_seq_length(self, layer_idx=0):
            self.length = max(self.length, super().get_seq_length(layer_idx))
            return self.length

    cache = Uncounted()
    run(model, cache, FIRST, SECOND)
    cache.crop(-6)
    with pytest.raises(ValueError, match="but not from calls of this routed model"):
        run(model, cache, OTHER)


@pytest.mark.parametrize("make", [dynamic, static])
def test_padding_of_a_later_part_is_not_counted(make):
    model = routed(tiny_llama())
    rows = [prompt for prompt in prompts(16, 10) if len(prompt) > 6][:4]
    batch = padded([*rows, prompts(1, 10, seed=1)[0][:3]])
    ids, mask = batch.values()
    start, end = ids[:, :4], ids[:, 4:]
    options = {"max_new_tokens": 1, "prefill_chunk_size": 4, "pad_token_id": 0, "output_logits": True}
    cache = make(model)
    output = model.generate(
        **batch, **with_cache(model, cache), **options, return_dict_in_generate=True, do_sample=False
    )
    assert start.shape[1] + end.shape[1] == ids.shape[1]
    embeddings = model.get_input_embeddings()(ids).double() * mask.unsqueeze(2)
    pooled = embeddings.sum(1) / mask.sum(1, keepdim=True)
    chosen = torch.stack([pattern.selected for pattern in cache_of(output).jactus_patterns.batch.patterns])
    assert torch.equal(chosen, model.rank_router.select(pooled))


@pytest.fixture(scope="module", params=["embeddings", "first_block"])
def model_with_its_own_cache(request):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_heads": 4, "num_hidden_layers": 2}
    config = xLSTMConfig(**sizes, qk_dim_factor=1.0, v_dim_factor=1.0, chunk_size=16, max_inference_chunksize=64)
    model = xLSTMForCausalLM(config)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2:  # some start as zero
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return routed(model, router_input=request.param)


def test_a_cache_that_is_the_models_own_is_refused(model_with_its_own_cache):
    model, options = model_with_its_own_cache, {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with pytest.raises(TypeError, match=r"a (xLSTMCache|tuple), not a `Cache` .* `use_cache=False`"):
        model.generate(FIRST, **options)
    chosen, choose = [], model.rank_router.choose
    model.rank_router.choose = lambda pooled: chosen.append(pooled) or choose(pooled)
    continued = model.generate(FIRST, **options, use_cache=False)
    assert continued.shape[1] == FIRST.shape[1] + 4
    assert len(chosen) == 4
    for pooled in chosen[1:]:  # the prompt's, whatever follows it
        torch.testing.assert_close(pooled, chosen[0], rtol=0, atol=1e-5)


def test_a_block_does_not_fill_a_cache_that_is_none_of_transformers():
    def forward(hidden_states, layer_past):
        raise AssertionError("the block ran")

    block = torch.nn.Module()
    block.forward = forward
    with pytest.raises(TypeError, match="`layer_past` is a list, not a `Cache`"):
        block_output(block, (torch.zeros(1, 2, 4), []), {})
    with pytest.raises(TypeError, match="`layer_past` is a list, not a `Cache`"):
        block_output(block, (torch.zeros(1, 2, 4),), {"layer_past": []})
