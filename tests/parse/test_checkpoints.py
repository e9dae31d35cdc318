"""A router travels with its checkpoint."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from peft_jactus import DamagedCheckpointError, export_compressed, loading_options, rank_summary
from peft_jactus.cli.inspect import inspect_folder
from peft_jactus.deployment.extensions import find_extension
from peft_jactus.deployment.remote_code import export_remote_code
from peft_jactus.parse import RankRouter, RouterConfig, conversion, routed_copy
from peft_jactus.parse.installation import ROUTER_FIELD, ROUTER_NAME, RouterExtension, router_of
from tests.parse.test_models import inputs_of, run
from tests.support.compressed_models import compressed, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit, trained
from tests.support.routed_models import routed, static

CLASSES = {
    tiny_llama: AutoModelForCausalLM,
    tiny_gpt2: AutoModelForCausalLM,
    tiny_bert: AutoModelForSequenceClassification,
    tiny_vit: AutoModelForImageClassification,
}


@pytest.fixture
def saved(tmp_path):
    model = routed(tiny_llama())
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize("fields", [{}, {"router_kind": "mlp"}, {"router_input": "first_block"}], ids=str)
def test_a_loaded_model_routes_as_the_saved_one(make, fields, tmp_path):
    model = routed(make(), active_ratio=0.6, allocation="uniform", **fields)
    inputs = inputs_of(model)
    model.rank_router.active_ratio = 0.5
    expected = run(model, **inputs)
    model.save_pretrained(tmp_path)
    loaded = CLASSES[make].from_pretrained(tmp_path)
    assert loaded.rank_router.router_config == model.rank_router.router_config
    assert torch.equal(run(loaded, **inputs), expected)
    assert loaded.rank_router.cache_info().misses == len(expected)


def test_saving_again_changes_nothing(saved, tmp_path_factory):
    _, folder = saved
    again = tmp_path_factory.mktemp("again")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(load_file(again / "model.safetensors")[name], tensor)
    configs = [json.loads((place / "config.json").read_text())["quantization_config"] for place in (folder, again)]
    assert configs[0] == configs[1]
    assert configs[0]["router"]["expert_size"] == 2


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("fields", [{}, {"router_kind": "mlp"}], ids=str)
def test_the_summary_counts_what_is_stored_and_the_router_on_a_line_of_its_own(make, fields, tmp_path):
    dense = make()
    model = routed(dense, **fields)
    model.save_pretrained(tmp_path)
    held = {name: tensor.numel() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    names = [row.name for row in rank_summary(model).rows]
    marks = len([name for name in names if held.pop(f"{name}.weight") == 1])  # in the place of the dense weight
    assert marks == len(names)
    factors = sum(held[f"{name}.{part}.weight"] for name in names for part in ("down", "up"))
    targeted = sum(dense.get_submodule(name).weight.numel() for name in names)
    assert factors > targeted  # two factors of pivoted ranks
    router = sum(size for name, size in held.items() if name.startswith("rank_router."))
    stored, whole = sum(held.values()), dense.num_parameters()
    for summary in (rank_summary(model), inspect_folder(tmp_path).summary):
        assert summary.retained_ratio == factors / targeted
        assert summary.model_ratio == stored / whole
        *_, of_layers, of_router, of_model = str(summary).splitlines()
        assert f" keep {factors:,} of {targeted:,} parameters: {factors / targeted:.1%}" in of_layers
        assert of_router == f"The router has {router:,} parameters, which the dense model does not have."
        assert of_model == f"The whole model keeps {stored:,} of {whole:,}: {stored / whole:.1%}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fields", [{}, {"router_kind": "mlp"}], ids=str)
def test_a_router_stays_float32_and_moves_whatever_its_model_is_converted_to(dtype, fields):
    model = routed(tiny_llama(), **fields)
    inputs = inputs_of(model)
    before = {name: tensor.clone() for name, tensor in model.rank_router.state_dict().items()}
    pooled = torch.randn(4, model.config.hidden_size)
    scores = model.rank_router(pooled)
    expected = run(model, **inputs)
    model.to(dtype)
    assert {layer.down.weight.dtype for layer in model.rank_router.layers} == {dtype}
    for name, tensor in model.rank_router.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == torch.float32
    assert torch.equal(model.rank_router(pooled), scores)
    if dtype == torch.float64:
        torch.testing.assert_close(run(model, **inputs), expected.double(), rtol=0, atol=1e-4)
    model.to(device="meta", dtype=torch.float32)
    assert all(tensor.is_meta for tensor in (*model.rank_router.parameters(), *model.rank_router.buffers()))


def test_a_bfloat16_model_keeps_its_router_in_float32(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.rank_router.weight.dtype == torch.float32
    assert loaded.rank_router.layers[0].down.weight.dtype == torch.bfloat16
    inputs = inputs_of(model)
    pooled = model.get_input_embeddings()(inputs["input_ids"]).mean(1)
    loaded_pooled = loaded.get_input_embeddings()(inputs["input_ids"]).float().mean(1)
    overlap = (model.rank_router.select(pooled) == loaded.rank_router.select(loaded_pooled)).float().mean()
    assert overlap > 0.9
    torch.testing.assert_close(run(loaded, **inputs).float(), run(model, **inputs), rtol=0, atol=0.1)


def test_verifying_and_the_base_class(saved):
    model, folder = saved
    with loading_options(verify=True):
        base = AutoModel.from_pretrained(folder)
    ids = inputs_of(model)["input_ids"]
    with torch.no_grad():
        expected = model.model(input_ids=ids).last_hidden_state
        assert torch.equal(base(input_ids=ids).last_hidden_state, expected)
    assert base.rank_router.cache_info().misses == len(ids)


@pytest.mark.parametrize("how", ["loading_options", "dequantize"])
def test_dense_layers_have_no_router(saved, how, tmp_path_factory):
    model, folder = saved
    if how == "dequantize":
        dense = AutoModelForCausalLM.from_pretrained(folder)
        dense.dequantize()
    else:
        with loading_options(dense=True):
            dense = AutoModelForCausalLM.from_pretrained(folder)
    assert router_of(dense) is None
    assert not dense._forward_hooks
    inputs = inputs_of(model)
    model.rank_router.active_ratio = 1.0
    torch.testing.assert_close(run(dense, **inputs), run(model, **inputs), rtol=0, atol=1e-5)
    if how == "loading_options":
        plain = tmp_path_factory.mktemp("plain")
        dense.save_pretrained(plain)
        assert not [name for name in load_file(plain / "model.safetensors") if "router" in name]


def _edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert_size": 4}, DamagedCheckpointError, "rank_router: config.json describes a router of"),
        ({"router_kind": "mlp"}, DamagedCheckpointError, "rank_router: config.json describes a router of"),
        ({"active_ratio": 0}, ValueError, r"quantization_config.router`: `active_ratio` must be in \(0, 1\]; got 0"),
        ({"active_ratio": 1.5}, ValueError, r"`active_ratio` must be in \(0, 1\]; got 1.5"),
        ({"expert_size": True}, ValueError, "`expert_size` must be an integer of at least 1; got True"),
        ({"surprise": 1}, ValueError, "must have no other fields than"),
    ],
)
def test_a_router_that_does_not_fit_is_refused(saved, change, error, message):
    _, folder = saved
    _edit(folder, lambda config: config["router"].update(change))
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_tensors_of_another_models_router_are_refused(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["rank_router.bias"] = tensors["rank_router.bias"].flip(0)
    save_file(tensors, file, metadata={"format": "pt"} | _metadata(file))
    with pytest.raises(DamagedCheckpointError, match=r"are not what was saved: \['rank_router.bias'\]"):
        AutoModelForCausalLM.from_pretrained(folder)


def _metadata(file):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as reader:
        return reader.metadata()


def test_vllm_export_refuses_a_router(saved, tmp_path_factory):
    _, folder = saved
    with pytest.raises(ValueError, match="has a router, which"):
        export_remote_code(folder, tmp_path_factory.mktemp("remote") / "out")


def test_transformers_does_not_compile_a_routed_model(saved):
    model, folder = saved
    for routed_model in (routed_copy(static(tiny_llama()), RouterConfig(active_ratio=0.5, expert_size=2)), model):
        assert not routed_model.hf_quantizer.is_compileable
    assert not AutoModelForCausalLM.from_pretrained(folder).hf_quantizer.is_compileable
    assert static(tiny_llama()).hf_quantizer.is_compileable


def test_saving_forgets_prompts_whose_factors_it_lays_out_anew(saved):
    model, _ = saved
    inputs = inputs_of(model)
    expected = run(model, **inputs)
    assert model.rank_router.cache_info().entries
    model.state_dict()
    assert model.rank_router.cache_info().entries == 0
    torch.testing.assert_close(run(model, **inputs), expected)


def test_what_add_router_cannot_use(monkeypatch):
    monkeypatch.setattr(conversion, "structural_copy", lambda model: pytest.fail("work has begun"))
    dense = tiny_llama()
    config = RouterConfig(active_ratio=0.5, expert_size=2)
    with pytest.raises(ValueError, match="has no factorised layers"):
        routed_copy(dense, config)
    with pytest.raises(ValueError, match="has a JACTUS adapter, not deployed layers"):
        routed_copy(compressed(dense), config)
    adapted = get_peft_model(static(tiny_llama()), LoraConfig(target_modules="all-linear")).get_base_model()
    with pytest.raises(ValueError, match="has an adapter, which routed layers would lose"):
        routed_copy(adapted, config)
    model = static(tiny_llama())
    with pytest.raises(ValueError, match="`decomposition`='svd-llm' needs `statistics` of every factorised layer"):
        routed_copy(model, config, decomposition="svd-llm")
    with pytest.raises(ValueError, match="are offloaded"):
        routed_copy(copy.deepcopy(model).to("meta"), config)
    with pytest.raises(ValueError, match=r"`decomposition` must be one of .*got 'svd_llm'"):
        routed_copy(model, config, decomposition="svd_llm")
    with pytest.raises(ValueError, match="is too small: one expert in each layer"):
        routed_copy(model, RouterConfig(active_ratio=0.01), progress_bar=False)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration cannot be routed"):
        routed_copy(static(tiny_t5()), config)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has a router already"):
        routed_copy(routed_copy(model, config, progress_bar=False), config)
    assert not any(isinstance(module, RankRouter) for module in model.modules())


def test_inspecting_names_the_router(saved):
    _, folder = saved
    text = str(inspect_folder(folder))
    assert re.search(
        r"router +linear on embeddings, experts of 2 ranks; runs 50% of the dense parameters \(global\)", text
    )


def test_the_loader_knows_the_router_by_the_names_that_it_has():
    entry = find_extension(ROUTER_FIELD)
    assert entry.module_name == ROUTER_NAME
    assert isinstance(entry.load(), RouterExtension)


def test_who_never_routes_never_imports_what_routes(tmp_path):
    folder = export_compressed(trained(tiny_llama()), tmp_path / "compressed", progress_bar=False)
    script = (
        "import sys, peft_jactus, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "model.save_pretrained(sys.argv[2])\n"
        "print([name for name in sys.modules if name.startswith('peft_jactus.parse')])"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "again")]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
