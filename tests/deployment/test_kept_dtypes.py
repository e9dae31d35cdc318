"""Models that keep some of their parts in float32: so do their compressed checkpoints."""

import pytest
import torch
import transformers
from peft import get_peft_model

from peft_jactus.deployment.export import compressed_copy
from peft_jactus.deployment.layers import FactorizedLinear
from tests.deployment.test_export import export, relative_error, tensors_in
from tests.support.compressed_models import VOCABULARY, jactus_config, logits_of, perturb_cores_, tiny_t5

# Two products in float16 instead of one; seen: 1e-3.
FLOAT16_ERROR = 5e-3
# The same in bfloat16, of most tokens: one that is between two experts may change to the other. Seen: 0.02.
BFLOAT16_ERROR = 0.06


def tiny_deepseek():
    """Chooses experts by offsets that differ less than bfloat16 can tell apart, as in published checkpoints."""
    config = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=8,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        qk_nope_head_dim=16,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.DeepseekV3ForCausalLM(config)
        gate = model.model.layers[1].mlp.gate
        gate.e_score_correction_bias.copy_(5 + 0.01 * torch.randn(8))
        gate.weight.mul_(0.01)
    return model


def loaded_in(dtype, build, folder):
    build().save_pretrained(folder)
    return type(build()).from_pretrained(folder, dtype=dtype).eval()


def adapted(base, **fields):
    model = get_peft_model(base, jactus_config(base, decomposition="svd", **fields)).eval()
    perturb_cores_(model)
    return model


def wo_layers(model):
    return {name: module for name, module in model.named_modules() if name.endswith(".wo")}


def test_a_float16_model_keeps_float32_outside_of_the_compressed_layers(tmp_path):
    base = loaded_in(torch.float16, tiny_t5, tmp_path / "base")
    kept = {f"{name}.weight": layer.weight.detach().clone() for name, layer in wo_layers(base).items()}
    assert {weight.dtype for weight in kept.values()} == {torch.float32}
    model = adapted(base, target_modules=["q", "v"])
    tensors = tensors_in(export(model, tmp_path / "compressed"))
    for name, weight in kept.items():
        assert tensors[name].dtype == torch.float32
        assert torch.equal(tensors[name], weight)
    assert tensors["shared.weight"].dtype == torch.float16
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "compressed")
    assert relative_error(logits_of(loaded), logits_of(model)) < FLOAT16_ERROR
    copied = compressed_copy(model)
    assert {layer.weight.dtype for layer in wo_layers(copied).values()} == {torch.float32}
    assert torch.equal(logits_of(copied), logits_of(loaded))


@pytest.mark.parametrize("storage", ["pivoted", "factored"])
def test_compressed_layers_that_a_float16_model_runs_in_float32_stay_so(tmp_path, storage):
    model = adapted(loaded_in(torch.float16, tiny_t5, tmp_path / "base"), target_modules=["wo"], storage=storage)
    expected = {name: layer.get_dense_weight("default") for name, layer in wo_layers(model.get_base_model()).items()}
    export(model, tmp_path / "compressed")
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "compressed")
    assert any(isinstance(layer, FactorizedLinear) for layer in wo_layers(loaded).values())
    for name, layer in wo_layers(loaded).items():
        weight = layer.dense_weight() if isinstance(layer, FactorizedLinear) else layer.weight
        assert layer.weight.dtype == torch.float32
        assert relative_error(weight.detach(), expected[name]) < 1e-4  # rounded to float16: 3e-4
    in_8_bits = compressed_copy(model, bits=8)
    scales = {name: buffer.dtype for name, buffer in in_8_bits.named_buffers() if name.endswith("scale")}
    assert set(scales.values()) == {torch.float32}


def test_a_dtype_that_is_asked_for_spares_what_from_pretrained_spares(tmp_path):
    model = adapted(tiny_t5(), target_modules=["q", "v"])
    for dtype in (torch.float16, torch.bfloat16):
        expected = loaded_in(dtype, tiny_t5, tmp_path / f"base-{dtype}").state_dict()
        tensors = tensors_in(export(model, tmp_path / str(dtype), dtype=dtype))
        shared = tensors.keys() & expected.keys()
        assert [name for name in shared if ".wo." in name]
        assert {name: tensors[name].dtype for name in shared} == {name: expected[name].dtype for name in shared}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_routing_of_a_bfloat16_model_does_not_change(tmp_path, dtype):
    base = loaded_in(torch.bfloat16, tiny_deepseek, tmp_path / "base")
    offsets = base.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    model = adapted(base, modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:  # as the Trainer trains it
            parameter.data = parameter.data.float()
    model.get_base_model().lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    tensors = tensors_in(export(model, tmp_path / "compressed", dtype=dtype))
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    loaded = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "compressed")
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, offsets)
    errors = (logits_of(loaded) - logits_of(model)).norm(dim=-1) / logits_of(model).norm(dim=-1)
    assert errors.median() < BFLOAT16_ERROR
