"""Merging, unloading, deleting and saving: of all layers, or of none."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from peft_jactus import JactusConfig
from peft_jactus.tuner.layer import JactusLayer
from tests.support.compressed_models import VOCABULARY, tiny_bert

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IDS = {"input_ids": torch.randint(2, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))}


def tiny_roberta():
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES)).eval()


def tuned(base, **options):
    config = JactusConfig(
        task_type="SEQ_CLS", target_modules="all-linear", decomposition="svd", retained_ratio=0.6, **options
    )
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "jactus_adapt_up" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, JactusLayer)}


def break_last_layer(model):
    """Make what the last layer would be merged into not finite."""
    last = list(layers_of(model).values())[-1]
    last.jactus_adapt_up["default"].data.fill_(torch.inf)
    last.jactus_adapt_down["default"].data.fill_(torch.inf)


@pytest.mark.parametrize("keep_base_weights", [False, True])
def test_a_head_of_several_layers_comes_out_as_it_was_trained(keep_base_weights):
    model = tuned(tiny_roberta(), keep_base_weights=keep_base_weights)
    with torch.no_grad():
        model.classifier.modules_to_save.default.dense.weight.add_(0.1)
        expected = model(**IDS).logits
    plain = model.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert type(plain.classifier).__name__ == "RobertaClassificationHead"
    torch.testing.assert_close(plain(**IDS).logits, expected)


@pytest.mark.parametrize("keep_base_weights", [False, True])
@pytest.mark.parametrize("what", ["merge_adapter", "merge_and_unload"])
def test_a_layer_that_cannot_be_merged_leaves_all_as_they_were(what, keep_base_weights, tmp_path):
    model = tuned(tiny_roberta(), keep_base_weights=keep_base_weights)
    break_last_layer(model)
    before, places = copy.deepcopy(model.state_dict()), places_of_modules(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        getattr(model, what)(safe_merge=True)
    assert places_of_modules(model) == places
    assert not any(layer.merged for layer in layers_of(model).values())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("jactus_adapt_up" in name for name in saved) == len(layers_of(model))


def places_of_modules(model):
    return {name: id(module) for name, module in model.named_modules() if not name.endswith("base_layer")}


def test_several_adapters_without_dense_weights_are_merged_in_no_layer():
    model = tuned(tiny_bert(), keep_base_weights=True)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    first = next(iter(layers_of(model).values()))
    last = list(layers_of(model).values())[-1]
    last.free_base_weights()  # as if it had been lost
    with pytest.raises(ValueError, match="merge several adapters"):
        model.merge_adapter(["default", "second"])
    assert not first.merged
    with pytest.raises(ValueError, match="merge several adapters"):
        model.merge_and_unload(adapter_names=["default", "second"])
    assert not first.merged
    assert layers_of(model)


def test_what_was_merged_before_stays_merged():
    model = tuned(tiny_bert(), keep_base_weights=True)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.merge_adapter(["default"])
    merged = model(**IDS).logits
    for layer in layers_of(model).values():
        layer.jactus_adapt_up["second"].data.fill_(torch.inf)
    with (
        pytest.raises(ValueError, match="NaNs detected"),
        pytest.warns(UserWarning, match="Already following adapters"),
    ):
        model.merge_adapter(["default", "second"], safe_merge=True)
    assert {tuple(layer.merged_adapters) for layer in layers_of(model).values()} == {("default",)}
    torch.testing.assert_close(model(**IDS).logits, merged)


def test_an_adapter_whose_layers_are_gone_is_not_saved(tmp_path):
    model = tuned(tiny_roberta())
    num_layers = len(layers_of(model))
    model.merge_and_unload()
    with pytest.raises(RuntimeError, match=rf"'default' cannot be saved: {num_layers} of its {num_layers} layers"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_one_of_several_adapters_is_saved_whole(tmp_path):
    model = tuned(tiny_bert(), keep_base_weights=True)
    model.add_adapter("second", JactusConfig(target_modules=["query"], decomposition="svd", keep_base_weights=True))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        loaded = PeftModel.from_pretrained(tiny_bert(), folder)
        assert layers_of(loaded)


def test_adapters_of_other_kinds_are_not_looked_at(tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")
