"""Merging, unloading, deleting, switching and adding adapters: in all layers, or in none."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
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


def two_adapters(base=None):
    model = tuned(tiny_roberta() if base is None else base, keep_base_weights=True)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    return model


def state_of(model):
    """What an operation on adapters can change."""
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": {name for name, parameter in model.named_parameters() if parameter.requires_grad},
        "adapters": (dict(model.peft_config), model.active_adapter, model.base_model.active_adapter),
        "base": dict(model.get_base_model().peft_config),
        "tied": model.get_base_model().config.tie_word_embeddings,
        "layers": [
            (
                list(layer.active_adapters),
                list(layer.merged_adapters),
                layer.disable_adapters,
                layer._get_available_adapters(),
                dict(getattr(layer, "r", {})),
                set(getattr(layer, "_adapters", ())),
            )
            for layer in layers
        ],
    }


def assert_same_state(model, before):
    after = state_of(model)
    for tensors in (before, after):
        tensors["tensors"] = {name: tensor.tolist() for name, tensor in tensors["tensors"].items()}
    assert after == before


OPERATIONS = {
    "delete the active one": lambda model: model.delete_adapter("default"),
    "delete another": lambda model: model.delete_adapter("second"),
    "set": lambda model: model.set_adapter("second"),
    "set several": lambda model: model.base_model.set_adapter(["second"]),
    "freeze": lambda model: model.set_requires_grad("default", requires_grad=False),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "merge": lambda model: model.merge_adapter(),
    "unload": lambda model: model.unload(),
    "merge and unload": lambda model: model.merge_and_unload(),
}
# What an operation calls in each layer.
CALLS = {
    "delete": "delete_adapter",
    "set": "set_adapter",
    "freeze": "set_requires_grad",
    "disable": "enable_adapters",
    "merge": "merge",
    "unload": "get_base_layer",
}


# PEFT warns at every such call.
deletes_the_active_one = pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")


@deletes_the_active_one
@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_an_operation_that_fails_in_the_last_layer_leaves_the_model_as_it_was(operation, monkeypatch):
    model = two_adapters()
    expected, before = model(**IDS).logits, state_of(model)
    with monkeypatch.context() as broken:
        broken.setattr(list(layers_of(model).values())[-1], CALLS[operation.split()[0]], fail)
        with pytest.raises(OSError, match="no such layer"):
            OPERATIONS[operation](model)
    assert_same_state(model, before)
    assert torch.equal(model(**IDS).logits, expected)
    OPERATIONS[operation](model)  # and now it can be done


@deletes_the_active_one
@pytest.mark.parametrize("operation", ["delete the active one", "set"])
def test_an_operation_that_fails_in_the_head_leaves_the_model_as_it_was(operation, monkeypatch):
    model = two_adapters()
    before = state_of(model)
    head = model.get_base_model().classifier
    monkeypatch.setattr(head, CALLS[operation.split()[0]], fail)
    with pytest.raises(OSError, match="no such layer"):
        OPERATIONS[operation](model)
    assert_same_state(model, before)


def fail(*_args, **_kwargs):
    raise OSError("no such layer")


def test_a_warning_that_is_an_error_leaves_the_adapter_to_delete():
    model = two_adapters()
    before = state_of(model)
    with pytest.raises(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert_same_state(model, before)


def test_a_warning_that_is_an_error_leaves_the_active_adapter():
    model = two_adapters()
    model.merge_adapter()
    before = state_of(model)
    with pytest.raises(UserWarning, match="Adapter cannot be set when the model is merged"):
        model.set_adapter("second")
    assert_same_state(model, before)


def test_unmerging_that_fails_leaves_all_layers_merged(monkeypatch):
    model = two_adapters()
    model.merge_adapter()
    before = state_of(model)
    monkeypatch.setattr(list(layers_of(model).values())[-1], "unmerge", fail)
    with pytest.raises(OSError, match="no such layer"):
        model.unmerge_adapter()
    assert_same_state(model, before)


# PEFT's, on the way; the test is of its warning at the end.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
def test_a_warning_at_the_end_of_merging_that_is_an_error_leaves_the_adapter():
    model = get_peft_model(
        tied_llama(), JactusConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], decomposition="svd")
    )
    before = state_of(model)
    with pytest.raises(UserWarning, match="Input and output embeddings are no longer tied"):
        model.merge_and_unload()
    assert_same_state(model, before)


def tied_llama():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, pad_token_id=0))
    return model.eval()


def test_a_further_adapter_that_cannot_be_computed_leaves_the_model_as_it_was(monkeypatch):
    model = tuned(tiny_roberta(), keep_base_weights=True)
    before = state_of(model)
    config = JactusConfig(
        task_type="SEQ_CLS", target_modules="all-linear", decomposition="svd", keep_base_weights=True
    )
    with monkeypatch.context() as broken:
        broken.setattr(list(layers_of(model).values())[-1], "update_layer", fail)
        with pytest.raises(OSError, match="no such layer"):
            model.add_adapter("second", config)
    assert_same_state(model, before)
    model.add_adapter("second", config)


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
