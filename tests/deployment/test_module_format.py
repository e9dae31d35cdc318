"""Families whose files transformers writes with weights merged or turned: their checkpoints hold what modules hold."""

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from peft_jactus import JactusConfig, calibrate, loading_options
from peft_jactus.deployment.layers import FORMS
from peft_jactus.parse import RouterConfig, routed_copy
from tests.deployment.test_export import FLOAT32_ERROR, config_of, export
from tests.support.compressed_models import (
    VOCABULARY,
    causal_batches,
    classification_batches,
    image_batches,
    perturb_cores_,
    tiny_llama,
)

STORAGES = list(FORMS)
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
_TEXT = {"vocab_size": VOCABULARY, "intermediate_size": 48, "max_position_embeddings": 32, **_SIZES}


class TurnedLlama(transformers.LlamaForCausalLM):
    """A Llama in whose files the query weights, which are square, are transposed."""


TURN = WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", operations=[Transpose(0, 1)])


@pytest.fixture(autouse=True, scope="module")
def turned_files():
    conversion_mapping.register_checkpoint_conversion_mapping(TurnedLlama.__name__, [TURN], overwrite=True)


def nomic_bert():
    return transformers.NomicBertForSequenceClassification(transformers.NomicBertConfig(**_TEXT))


def gte():
    return transformers.GteForSequenceClassification(transformers.GteConfig(**_TEXT))


def gated_dinov2():
    config = transformers.Dinov2Config(image_size=8, patch_size=4, mlp_ratio=2, use_swiglu_ffn=True, **_SIZES)
    return transformers.Dinov2ForImageClassification(config)


def turned_llama():
    return TurnedLlama(tiny_llama().config)


BATCHES = {
    nomic_bert: classification_batches,
    gte: classification_batches,
    gated_dinov2: image_batches,
    turned_llama: causal_batches,
}


def built(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def logits_of(model, build):
    batch = next(BATCHES[build]())
    del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits


def trained(build, **fields):
    model = built(build)
    heads = [name for name in ("score", "classifier") if hasattr(model, name)]
    fields = {"retained_ratio": 0.6, "exclude_modules": heads, "modules_to_save": heads, **fields}
    config = JactusConfig(**{"target_modules": "all-linear", **fields})
    calibrate(model, config, BATCHES[build](), progress_bar=False)
    model = get_peft_model(model, config).eval()
    perturb_cores_(model)
    return model


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("build", BATCHES)
def test_what_was_exported_loads_and_is_saved_again(build, storage, tmp_path):
    model = trained(build, storage=storage)
    expected = logits_of(model, build)
    export(model, tmp_path / "compressed")
    assert config_of(tmp_path / "compressed")["quantization_config"]["original_format"] is False
    loaded = type(built(build)).from_pretrained(tmp_path / "compressed")
    torch.testing.assert_close(logits_of(loaded, build), expected, rtol=0, atol=FLOAT32_ERROR)
    loaded.save_pretrained(tmp_path / "again")
    with loading_options(verify=True):
        again = type(loaded).from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again, build), logits_of(loaded, build))


@pytest.mark.parametrize("build", BATCHES)
def test_a_dense_checkpoint_of_it_has_the_form_of_the_family(build, tmp_path):
    built(build).save_pretrained(tmp_path / "family")
    model = trained(build)
    expected = logits_of(model, build)
    export(model, tmp_path / "compressed")
    with loading_options(dense=True):
        dense = type(built(build)).from_pretrained(tmp_path / "compressed")
    dense.save_pretrained(tmp_path / "dense")
    dequantized = type(dense).from_pretrained(tmp_path / "compressed").dequantize()
    dequantized.save_pretrained(tmp_path / "dequantized")
    names = load_file(tmp_path / "family" / "model.safetensors").keys()
    for folder in ("dense", "dequantized"):
        assert load_file(tmp_path / folder / "model.safetensors").keys() == names
        again = type(dense).from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits_of(again, build), expected, rtol=0, atol=FLOAT32_ERROR)


def test_a_layer_that_is_not_compressed_may_be_turned(tmp_path):
    model = trained(turned_llama, exclude_modules=["q_proj"])
    expected = logits_of(model, turned_llama)
    export(model, tmp_path / "compressed")
    assert "original_format" not in config_of(tmp_path / "compressed")["quantization_config"]  # it is the usual case
    loaded = TurnedLlama.from_pretrained(tmp_path / "compressed")
    torch.testing.assert_close(logits_of(loaded, turned_llama), expected, rtol=0, atol=FLOAT32_ERROR)
    for original in (False, True, False):
        loaded.save_pretrained(tmp_path / "again", save_original_format=original)
        again = TurnedLlama.from_pretrained(tmp_path / "again")
        assert torch.equal(logits_of(again, turned_llama), logits_of(loaded, turned_llama))


def test_a_routed_model_of_such_a_family_loads(tmp_path):
    export(trained(turned_llama, storage="factored"), tmp_path / "compressed")
    config = RouterConfig(active_ratio=0.6, expert_size=2)
    model = routed_copy(TurnedLlama.from_pretrained(tmp_path / "compressed"), config, progress_bar=False)
    model.save_pretrained(tmp_path / "routed")
    loaded = TurnedLlama.from_pretrained(tmp_path / "routed")
    assert torch.equal(logits_of(loaded, turned_llama), logits_of(model, turned_llama))


def test_a_marker_that_is_none_is_refused(tmp_path):
    export(trained(nomic_bert), tmp_path / "compressed")
    path = tmp_path / "compressed" / "config.json"
    path.write_text(path.read_text().replace('"original_format": false', '"original_format": 0'))
    with pytest.raises(ValueError, match=r"`quantization_config\.original_format` must be true or false; got 0"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "compressed")


def test_names_under_which_transformers_finds_no_module_again_are_not_written(tmp_path):
    """A dense checkpoint of this class loses the weights of its language model when it is loaded."""
    text = {**_TEXT, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
    vision = {"image_size": 8, "patch_size": 4, "intermediate_size": 48, **_SIZES}
    config = transformers.ShieldGemma2Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    auto = transformers.AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
    settings = JactusConfig(target_modules="all-linear", decomposition="svd", retained_ratio=0.6, adaptation_rank=0)
    compressed = get_peft_model(model, settings).eval()
    ids = next(causal_batches())["input_ids"]
    with torch.no_grad():
        expected = compressed(input_ids=ids).logits
        export(compressed, tmp_path)
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=FLOAT32_ERROR)
    assert not any(info.values())
