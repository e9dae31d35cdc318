"""Models that accelerate spreads over devices, with layers offloaded to CPU memory or disk, as `device_map` does."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_jactus import JactusConfig, calibrate
from peft_jactus.parse import RouterConfig, routed_copy
from tests.support.compressed_models import batches_for, tiny_llama
from tests.support.routed_models import static

DEVICE_MAPS = {
    "all on disk": {"": "disk"},
    "some on disk": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    | {"model.norm": "cpu", "lm_head": "disk", "model.rotary_emb": "cpu"},
}


def compressed(model, batches, **options):
    config = JactusConfig(task_type="CAUSAL_LM", target_modules="all-linear", retained_ratio=0.6)
    statistics = calibrate(model, config, batches, progress_bar=False, **options)
    return get_peft_model(model, config), statistics


@pytest.fixture(params=DEVICE_MAPS)
def offloaded(request, tmp_path):
    """A function that loads the model of a folder spread out."""

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(
            folder, device_map=DEVICE_MAPS[request.param], offload_folder=tmp_path / "offloaded"
        )

    return load


@pytest.mark.parametrize("options", [{}, {"max_statistics_memory": 40_000}])
def test_an_offloaded_model_compresses_to_the_same(options, offloaded, tmp_path):
    dense = tiny_llama()
    dense.save_pretrained(tmp_path / "dense")
    batches = batches_for(dense, num_batches=2)
    model = offloaded(tmp_path / "dense")
    assert any(parameter.is_meta for parameter in model.parameters())
    model, statistics = compressed(model, batches, **options)
    expected, expected_statistics = compressed(dense, batches, **options)
    for name, layer in expected_statistics.items():
        assert torch.equal(statistics[name].input.scatter, layer.input.scatter)
        assert torch.equal(statistics[name].gradient.scatter, layer.gradient.scatter)
    with torch.no_grad():
        torch.testing.assert_close(model(**batches[0]).logits, expected(**batches[0]).logits)

    model(**batches[0]).loss.backward()
    trained = [parameter for name, parameter in model.named_parameters() if "jactus_adapt_up" in name]
    assert trained
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
    for found, name in ((model, "one"), (expected, "other")):
        found.save_pretrained(tmp_path / name)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_an_adapter_says_that_it_does_not_load_onto_an_offloaded_model(offloaded, tmp_path):
    dense = tiny_llama()
    dense.save_pretrained(tmp_path / "dense")
    model, _ = compressed(dense, batches_for(dense, num_batches=2))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(TypeError, match="onto a model without offloaded layers"):
        PeftModel.from_pretrained(offloaded(tmp_path / "dense"), tmp_path / "adapter")


@torch.no_grad()
def test_a_routed_copy_of_an_offloaded_model_finds_its_tensors(tmp_path):
    static(tiny_llama()).save_pretrained(tmp_path / "compressed")
    device_map = {"model": "cpu", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "compressed", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert model.lm_head.weight.is_meta
    routed = routed_copy(model, RouterConfig(active_ratio=1.0), progress_bar=False)
    batch = batches_for(model)[0]
    torch.testing.assert_close(routed(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)
