"""A model's own `_init_weights`, which `from_pretrained` calls for each module, does not know the deployed layers."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FunnelConfig,
    FunnelForSequenceClassification,
    xLSTMConfig,
    xLSTMForCausalLM,
)
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaPreTrainedModel

from peft_jactus import JactusConfig, calibrate, compressed_copy, export_compressed
from peft_jactus.deployment.layers import FORMS
from tests.support.compressed_models import (
    VOCABULARY,
    causal_batches,
    classification_batches,
    logits_of,
    perturb_cores_,
    tiny_llama,
    trained,
)

STORAGES = list(FORMS)


@pytest.fixture(autouse=True)
def llama_initialises_by_shapes(monkeypatch):
    """Let the parent of layers draw their weights, by the shape of these, as that of Blt does."""
    of_llama = LlamaPreTrainedModel._init_weights

    def init_weights(self, module):
        of_llama(self, module)
        if isinstance(module, LlamaMLP):
            init.normal_(module.down_proj.weight, std=module.down_proj.weight.shape[1] ** -0.5)
            init.normal_(module.up_proj.weight, std=module.up_proj.weight.size(0) ** -0.5)

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", init_weights)


def tiny_xlstm():
    """Sets the bias of every linear layer in a gate: parts of a deployed layer are linear, and may have none."""
    config = xLSTMConfig(vocab_size=VOCABULARY, hidden_size=128, num_heads=2, num_blocks=1, chunk_size=4)
    return xLSTMForCausalLM(config).eval()


def tiny_funnel():
    """Takes height and width from the weight of all that has "Linear" in the name of its class."""
    sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1], "num_decoder_layers": 1}
    return FunnelForSequenceClassification(FunnelConfig(vocab_size=VOCABULARY, num_labels=3, **sizes)).eval()


MODELS = {
    "xlstm": (tiny_xlstm, AutoModelForCausalLM, causal_batches, "CAUSAL_LM"),
    "funnel": (tiny_funnel, AutoModelForSequenceClassification, classification_batches, "SEQ_CLS"),
    "llama": (tiny_llama, AutoModelForCausalLM, causal_batches, "CAUSAL_LM"),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_initialises_by_its_own_rules_loads_with_all_that_was_exported(tmp_path, name, storage):
    build, auto, make_batches, task = MODELS[name]
    model, batches = build(), list(make_batches(2))
    config = JactusConfig(task_type=task, target_modules="all-linear", retained_ratio=0.5, storage=storage)
    calibrate(model, config, batches, leave_unusable_dense=True, progress_bar=False)
    model = get_peft_model(model, config).eval()
    perturb_cores_(model)
    export_compressed(model, tmp_path / "compressed", progress_bar=False)
    expected = compressed_copy(model)
    loaded = auto.from_pretrained(tmp_path / "compressed")
    assert list(map(type, loaded.modules())) == list(map(type, expected.modules()))
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(logits_of(loaded, batches[0]), logits_of(expected, batches[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_deployed_layer_has_the_shape_of_its_dense_weight(tmp_path, storage):
    model = tiny_llama()
    shapes = {name: layer.weight.shape for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    export_compressed(trained(model, storage=storage), tmp_path / "compressed", progress_bar=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert {name: loaded.get_submodule(name).weight.shape for name in shapes} == shapes
