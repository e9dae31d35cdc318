"""Models that cannot be routed are refused: positions before rows, so that rows would run others' ranks; no tokens."""

import pytest
import torch
import transformers
from peft import get_peft_model

from peft_jactus import JactusConfig
from peft_jactus.deployment import compressed_copy
from peft_jactus.parse import RouterConfig, conversion, installation, routed_copy
from tests.support.compressed_models import VOCABULARY, tiny_llama
from tests.support.routed_models import randomize_, routed

CONFIG = RouterConfig(active_ratio=0.5, expert_size=2)
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def xlnet():
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    return transformers.XLNetModel(transformers.XLNetConfig(**sizes, dropout=0.0))


def longformer():
    config = transformers.LongformerConfig(**SIZES, num_attention_heads=4, attention_window=4)
    return transformers.LongformerModel(config)


def mlcd():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MLCDVisionConfig(**sizes, image_size=8, patch_size=4)
    return transformers.MLCDVisionModel(config)


def clip():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text, vision = {"vocab_size": VOCABULARY, **sizes}, {"image_size": 8, "patch_size": 4, **sizes}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


def swin():
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinModel(config)


@pytest.fixture(params=[xlnet, longformer, mlcd])
def make(request):
    return request.param


def static(model, **fields):
    config = JactusConfig(target_modules="all-linear", decomposition="svd", adaptation_rank=0, **fields)
    return compressed_copy(get_peft_model(model.eval(), config)).eval()


@pytest.mark.filterwarnings("ignore:The targeted layers have")
def test_a_model_that_is_known_to_be_so_is_refused_before_any_work(make, monkeypatch):
    monkeypatch.setattr(conversion, "structural_copy", lambda model: pytest.fail("work has begun"))
    with pytest.raises(TypeError, match=r"cannot be routed: inputs of \['.*'\] have the sequence first"):
        routed_copy(static(make()), CONFIG)


def test_a_model_whose_other_layers_are_not_so_can_be_routed_without_these():
    config = RouterConfig(active_ratio=0.5, expert_size=2, router_input="first_block")
    model = routed_copy(static(mlcd(), exclude_modules=["out_proj"]), config, progress_bar=False).eval()
    randomize_(model.rank_router)
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # as many as positions
    with torch.no_grad():
        alone = torch.cat([model(image[None])[0] for image in images])
        torch.testing.assert_close(model(images)[0], alone, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The targeted layers have")
@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_that_is_not_known_to_be_so_says_it_when_it_is_called(rows, monkeypatch):
    monkeypatch.setattr(installation, "_SEQUENCE_FIRST", {}, raising=False)
    model = routed_copy(static(xlnet()), CONFIG, progress_bar=False).eval()
    ids = torch.randint(3, VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=rf"called with {rows} rows, but what its router reads has 8.*`static_copy`"):
        model(input_ids=ids)
    assert model.rank_router._state.call is None


def test_continuous_batching_says_that_it_cannot_be_used():
    model = routed(tiny_llama())
    outputs = model.generate_batch(
        [[2, 3, 4]],
        generation_config=transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
        progress_bar=False,
    )
    (output,) = outputs.values()
    assert output.generated_tokens == []
    assert "`generate_batch` always has such a cache, so it cannot be used." in output.error


@pytest.mark.filterwarnings("ignore:The targeted layers have")
def test_a_model_with_several_inputs_is_refused():
    with pytest.raises(TypeError, match=r"CLIPModel cannot be routed.*that have input embeddings"):
        routed_copy(static(clip()), CONFIG)


@pytest.mark.filterwarnings("ignore:The targeted layers have")
def test_a_model_whose_embeddings_return_no_states_says_so():
    model = routed_copy(static(swin()), CONFIG, progress_bar=False).eval()
    with pytest.raises(TypeError, match=r"which is a tuple here and not a tensor.*`static_copy`"):
        model(pixel_values=torch.zeros(1, 3, 16, 16))
