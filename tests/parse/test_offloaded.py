"""A routed model whose weights are elsewhere between calls: accelerate offloads them to CPU memory or disk."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModelForCausalLM

from peft_jactus.parse import initialize_router_, static_copy
from tests.parse.test_models import run
from tests.support.compressed_models import batches_for, tiny_llama
from tests.support.routed_models import padded, prompts, routed

PLACES = {
    "all on disk": {"": "disk"},
    "some on disk": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    | {"model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "rank_router": "cpu"},
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("ratio", [0.5, 1.0])
@pytest.mark.parametrize("router_input", ["embeddings", "first_block"])
def test_a_model_on_disk_runs_as_one_in_memory(places, ratio, router_input, tmp_path):
    model = routed(tiny_llama(), router_input=router_input)
    model.rank_router.active_ratio = ratio
    model.save_pretrained(tmp_path / "routed")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "routed", device_map=PLACES[places], offload_folder=tmp_path / "offloaded"
    )
    batch = padded(prompts(4))
    for _ in range(2):  # of the second time, patterns are remembered
        torch.testing.assert_close(run(offloaded, **batch), run(model, **batch), rtol=0, atol=1e-6)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(offloaded.generate(**batch, **options), model.generate(**batch, **options))


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 0.95, 1.0])
def test_a_model_that_is_offloaded_after_it_has_run_uses_nothing_of_before(offload_buffers, ratio):
    model = routed(tiny_llama(), cache_bytes=2**20)
    model.rank_router.active_ratio = ratio
    batch = padded(prompts(4))
    expected = run(model, **batch)
    cpu_offload(model, offload_buffers=offload_buffers, execution_device=torch.device("cpu"))
    for _ in range(2):
        torch.testing.assert_close(run(model, **batch), expected, rtol=0, atol=1e-6)
    assert model.rank_router.cache_info().num_bytes == 0


def test_weights_that_are_in_pieces_until_a_part_is_called_are_not_read_before():
    model = routed(tiny_llama())
    batch = padded(prompts(4))
    expected = run(model, **batch)
    for layer in model.rank_router.layers:
        for part in (layer.down, layer.up):
            keep_elsewhere(part)
    torch.testing.assert_close(run(model, **batch), expected, rtol=0, atol=1e-6)


def keep_elsewhere(part):
    """Let a part have its weight while it is called, as under ZeRO-3."""
    whole, nothing = part.weight, nn.Parameter(torch.zeros(0))
    part.register_forward_pre_hook(lambda part, _: setattr(part, "weight", whole))
    part.register_forward_hook(lambda part, *_: setattr(part, "weight", nothing))
    part.weight = nothing


def test_what_needs_the_values_says_that_they_are_offloaded():
    model = routed(tiny_llama())
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"q_proj.* are offloaded. Load the model without `device_map`"):
        static_copy(model, 0.6)
    with pytest.raises(ValueError, match=r"'rank_router'\] are offloaded. Load the model without `device_map`"):
        initialize_router_(model, batches_for(model), progress_bar=False)
