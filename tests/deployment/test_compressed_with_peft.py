"""A compressed model as the base of other methods: LoRA from PEFT, and int8 weights from torchao."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peft_jactus import loading_options, rank_summary
from peft_jactus.deployment.layers import FactorizedLinear
from tests.deployment.test_export import (
    FLOAT32_ERROR,
    assert_same_tensors,
    config_of,
    export,
    load,
    relative_error,
    state_of,
    tensors_in,
    wide_bert,
)
from tests.support.compressed_models import (
    batches_for,
    logits_of,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    trained,
)
from tests.tuner.test_persistence import finish, in_fresh_process

PARTS = {"factored": ["down", "up"], "pivoted": ["rows", "columns", "others"]}


def exported(folder, build, storage, **options):
    model = trained(build() if callable(build) else build, storage=storage, adaptation_rank=0)
    return export(model, folder, **options)


def train(model, *, steps=2):
    batch = batches_for(model.get_base_model())[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


def with_lora(base, target_modules):
    task = "SEQ_CLS" if "Bert" in type(base).__name__ else "CAUSAL_LM"
    return get_peft_model(base, LoraConfig(task_type=task, target_modules=target_modules, r=2, init_lora_weights=True))


def lora_layers(model):
    return {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}


LOAD_IN_FRESH_PROCESS = """
    import json, sys
    from pathlib import Path
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    import peft_jactus
    from tests.support.compressed_models import logits_of, trained

    equal = {}
    for folder in map(Path, sys.argv[1:]):
        auto_class = AutoModelForSequenceClassification if "bert" in folder.name else AutoModelForCausalLM
        base = auto_class.from_pretrained(folder / "compressed")
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
        equal[folder.name] = torch.equal(logits_of(model), load_file(folder / "logits.safetensors")["logits"])
    print("EQUAL" + json.dumps(equal))
"""


def test_lora_on_compressed_layers_trains_and_loads_in_a_fresh_process(tmp_path):
    folders = []
    for build in (tiny_bert, tiny_llama, tiny_gpt2):
        for storage, parts in PARTS.items():
            for targets in (parts, "all-linear"):
                folder = tmp_path / f"{build.__name__}-{storage}-{'all' if targets == 'all-linear' else 'parts'}"
                base = load(build, exported(folder / "compressed", build, storage))
                before = state_of(base)
                names = {name for name, layer in base.named_modules() if isinstance(layer, FactorizedLinear)}
                model = with_lora(base, targets)
                adapted = {name.removeprefix("base_model.model.") for name in lora_layers(model)}
                assert {name.rpartition(".")[0] for name in adapted} >= names
                start = logits_of(model.eval())
                train(model)
                assert relative_error(logits_of(model), start) > 1e-3
                frozen = {
                    name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
                    for name, tensor in state_of(model).items()
                    if "lora" not in name and "modules_to_save" not in name
                }
                body = {
                    name: tensor for name, tensor in before.items() if not name.startswith(("classifier", "score"))
                }
                assert_same_tensors({name: frozen[name] for name in body}, body)
                model.save_pretrained(folder / "adapter")
                save_file({"logits": logits_of(model)}, folder / "logits.safetensors")
                folders.append(folder)
    output = finish(in_fresh_process(LOAD_IN_FRESH_PROCESS, *folders))
    equal = json.loads(re.search("^EQUAL(.*)$", output, re.MULTILINE).group(1))
    assert len(equal) == len(folders)
    assert [name for name, is_equal in equal.items() if not is_equal] == []


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("storage", list(PARTS))
def test_merged_lora_is_saved_as_a_compressed_checkpoint_of_the_same_size(tmp_path, build, storage):
    first = exported(tmp_path / "first", build, storage)
    model = with_lora(load(build, first), PARTS[storage])
    train(model)
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert relative_error(logits_of(merged), expected) <= FLOAT32_ERROR
    merged.save_pretrained(tmp_path / "second")
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_in(first).items()}
    assert {name: (t.shape, t.dtype) for name, t in tensors_in(tmp_path / "second").items()} == shapes
    assert config_of(tmp_path / "second")["quantization_config"] == config_of(first)["quantization_config"]
    with loading_options(verify=True):
        again = load(build, tmp_path / "second")
    assert torch.equal(logits_of(again), logits_of(merged))


@pytest.mark.parametrize("storage", PARTS)
def test_dense_layers_are_not_made_from_under_lora_which_they_would_lose(tmp_path, storage):
    lora = with_lora(load(tiny_bert, exported(tmp_path / "compressed", tiny_bert, storage)), "all-linear")
    train(lora)
    expected = logits_of(lora)
    with pytest.raises(ValueError, match=r"has an adapter, which dense layers would lose.*`merge_and_unload`"):
        lora.dequantize()
    assert torch.equal(logits_of(lora), expected)
    dense = lora.merge_and_unload().dequantize()
    assert not [module for module in dense.modules() if isinstance(module, FactorizedLinear)]
    assert relative_error(logits_of(dense), expected) <= FLOAT32_ERROR


def test_lora_trains_on_a_bfloat16_checkpoint(tmp_path):
    base = load(tiny_llama, exported(tmp_path / "compressed", tiny_llama, "pivoted", dtype=torch.bfloat16))
    model = with_lora(base, "all-linear")
    start = logits_of(model.eval())
    train(model)
    assert start.dtype == torch.bfloat16
    assert torch.isfinite(logits_of(model)).all()
    assert relative_error(logits_of(model), start) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tiny_llama, tmp_path / "compressed"), tmp_path / "adapter")
    assert torch.equal(logits_of(again.eval()), logits_of(model))


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
def test_lora_trains_with_checkpointed_activations(tmp_path):
    base = load(tiny_llama, exported(tmp_path / "compressed", tiny_llama, "pivoted"))
    model = with_lora(base, "all-linear")
    plain, checkpointed = ({}, {})
    for gradients in (plain, checkpointed):
        if gradients is checkpointed:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        model.train()
        model.zero_grad()
        model(**batches_for(base)[0]).loss.backward()
        gradients |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert plain
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_model_with_lora_still_shows_its_ranks(tmp_path):
    base = load(tiny_bert, exported(tmp_path / "compressed", tiny_bert, "pivoted"))
    expected = rank_summary(base)
    model = with_lora(base, "all-linear")
    assert rank_summary(model) == rank_summary(model.get_base_model()) == expected


def test_disabling_lora_gives_the_compressed_model(tmp_path):
    base = load(tiny_bert, exported(tmp_path / "compressed", tiny_bert, "pivoted"))
    expected = logits_of(base)
    model = with_lora(base, "all-linear")
    train(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    assert not torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("storage", list(PARTS))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchao_quantises_the_parts_to_int8(tmp_path, storage):
    quantization = pytest.importorskip("torchao.quantization")
    model = load(wide_bert, exported(tmp_path / "compressed", wide_bert, storage))
    targeted = [name for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)]
    layers = [layer for name in targeted for layer in model.get_submodule(name).modules() if type(layer) is nn.Linear]
    assert len(layers) == 2 * len(targeted)
    before = sum(layer.weight.nbytes for layer in layers)
    inputs = [torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0)) for layer in layers]
    with torch.no_grad():
        expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    # By part: what rounding does to the logits of a random model depends on the signs of singular vectors.
    with torch.no_grad():
        for layer, x, output in zip(layers, inputs, expected, strict=True):
            assert relative_error(layer(x), output) < 0.02
    assert torch.isfinite(logits_of(model)).all()
    assert all(layer.weight.qdata.dtype == torch.int8 for layer in layers)
    after = sum(layer.weight.qdata.nbytes + layer.weight.scale.nbytes for layer in layers)
    assert after < 0.3 * before
