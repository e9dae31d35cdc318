"""Compressed checkpoints in 8 and 4 bits a number, as a user sees them."""

import contextlib
import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_jactus import (
    DamagedCheckpointError,
    NumericalWarning,
    calibrate,
    export_remote_code,
    loading_options,
    rank_summary,
)
from peft_jactus.deployment.export import compressed_copy
from peft_jactus.deployment.layers import FORMS, FactorizedLinear
from peft_jactus.deployment.quantized_linear import QuantizedLinear
from peft_jactus.parse import RouterConfig, routed_copy
from tests.deployment.test_export import config_of, export, layers_of, load, relative_error, tensors_in
from tests.support.compressed_models import (
    batches_for,
    jactus_config,
    logits_of,
    perturb_cores_,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
)
from tests.tuner.test_persistence import finish, in_fresh_process

pytest.importorskip("bitsandbytes")

BUILDERS = [tiny_bert, tiny_vit, tiny_llama, tiny_gpt2, tiny_t5]
STORAGES = list(FORMS)
BITS = [8, 4]
# Of the logits of models that are 32 wide, whose weights are noise: there is nothing that rounding could spare.
ERRORS = {8: 0.02, 4: 0.15}


def adapted(build=tiny_llama, **fields):
    """Return a model with an adapter, and its statistics."""
    model = build()
    config = jactus_config(model, **fields)
    statistics = calibrate(model, config, batches_for(model), progress_bar=False)
    model = get_peft_model(model, config)
    perturb_cores_(model)
    return model.eval(), statistics


def few_bits(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}


@pytest.fixture(scope="module")
def llama():
    return adapted()


# -- written and loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_of_few_bits_loads_as_it_was_made(tmp_path, build, storage, bits):
    model, statistics = adapted(build, storage=storage)
    folder = export(model, tmp_path / "few", bits=bits, statistics=statistics)
    loaded = load(build, folder)
    expected = compressed_copy(model, bits=bits, statistics=statistics)
    assert torch.equal(logits_of(loaded), logits_of(expected))
    assert relative_error(logits_of(loaded), logits_of(model)) < ERRORS[bits]
    assert {part.bits for part in few_bits(loaded).values()} == {bits}
    assert rank_summary(loaded) == rank_summary(model)
    again = load(build, save(loaded, tmp_path / "again"))
    assert torch.equal(logits_of(again), logits_of(loaded))
    assert layers_of(tmp_path / "again") == layers_of(folder)


def save(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", BITS)
def test_a_fresh_process_loads_it_and_generates(tmp_path, llama, bits):
    model, statistics = llama
    folder = export(model, tmp_path / "few", bits=bits, statistics=statistics, dtype=torch.bfloat16)
    loaded = load(tiny_llama, folder)
    ids = torch.arange(2, 7).unsqueeze(0)
    expected = loaded.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    report = finish(
        in_fresh_process(
            """
            import json, sys, torch, peft_jactus
            from transformers import AutoModelForCausalLM
            model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
            ids = torch.arange(2, 7).unsqueeze(0)
            tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
            print(json.dumps({"tokens": tokens.tolist(), "dtype": str(model.dtype)}))
            """,
            folder,
        )
    )
    assert json.loads(report.splitlines()[-1]) == {"tokens": expected.tolist(), "dtype": "torch.bfloat16"}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bits", BITS)
def test_weights_take_their_bits_and_a_scale_for_each_64(tmp_path, storage, bits):
    model, statistics = adapted(storage=storage)
    folder = export(model, tmp_path / "few", bits=bits, statistics=statistics, dtype=torch.bfloat16)
    tensors = tensors_in(folder)
    stored = sum(row.num_stored for row in rank_summary(model).rows)
    names = tuple(f"{name}." for name in layers_of(folder))
    codes = sum(
        t.nbytes for name, t in tensors.items() if name.startswith(names) and t.dtype in (torch.int8, torch.uint8)
    )
    scales = sum(t.nbytes for name, t in tensors.items() if name.endswith(".scale"))
    num_parts = sum(name.endswith(".scale") for name in tensors)
    assert stored * bits / 8 <= codes <= stored * bits / 8 + num_parts / 2
    assert 2 * stored / 64 <= scales <= 2 * stored / 64 + 2 * num_parts


@pytest.mark.parametrize("bits", BITS)
def test_layers_that_stay_dense_have_few_bits_too(tmp_path, bits):
    model, statistics = adapted(tiny_gpt2, rank_pattern={r".*c_attn": 999})
    loaded = load(tiny_gpt2, export(model, tmp_path / "few", bits=bits, statistics=statistics))
    assert isinstance(loaded.transformer.h[0].attn.c_attn, QuantizedLinear)
    assert relative_error(logits_of(loaded), logits_of(model)) < ERRORS[bits]
    with loading_options(dense=True):
        dense = load(tiny_gpt2, tmp_path / "few")
    assert relative_error(logits_of(dense), logits_of(loaded)) < 1e-5
    assert not few_bits(dense)
    assert not dense.is_quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_scales_and_outputs(tmp_path, llama, dtype):
    model, statistics = llama
    folder = export(model, tmp_path / "few", bits=4, statistics=statistics, dtype=dtype)
    loaded = load(tiny_llama, folder)
    assert loaded.dtype == logits_of(loaded).dtype == dtype
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype, torch.uint8, torch.int32}
    other = load(tiny_llama, folder, dtype=torch.bfloat16)
    assert logits_of(other).dtype == torch.bfloat16
    assert relative_error(logits_of(other), logits_of(loaded)) < 0.02


def tiny_llama_of_like_tokens():
    """Inputs with a common direction, as those of trained models have."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.1 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("bits", BITS)
def test_what_layers_see_makes_few_bits_lose_less(tmp_path, bits):
    model, statistics = adapted(tiny_llama_of_like_tokens)
    with contextlib.ExitStack() as stack:
        if bits == 4:
            stack.enter_context(
                pytest.warns(NumericalWarning, match="4 bits without `statistics` round each number independently")
            )
        without = export(model, tmp_path / "without", bits=bits)
    folders = (without, export(model, tmp_path / "with", bits=bits, statistics=statistics))
    errors = [relative_error(logits_of(load(tiny_llama, folder)), logits_of(model)) for folder in folders]
    assert errors[1] < 0.95 * errors[0]


def test_the_card_says_it(tmp_path, llama):
    model, statistics = llama
    card = (export(model, tmp_path / "few", bits=4, statistics=statistics) / "README.md").read_text()
    assert "4 bits per number" in card
    assert "pip install peft-jactus bitsandbytes" in card
    plain = (export(model, tmp_path / "plain") / "README.md").read_text()
    assert "bits per number" not in plain


# -- used -------------------------------------------------------------------------------------------------


def trainer_for(model, folder):
    rows = [
        {key: t[0] for key, t in batch.items()} for batch in batches_for(tiny_llama(), num_batches=8, batch_size=1)
    ]
    arguments = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows)


@pytest.mark.parametrize("bits", BITS)
def test_weights_of_few_bits_are_not_trained_without_a_word(tmp_path, llama, bits):
    model, statistics = llama
    loaded = load(tiny_llama, export(model, tmp_path / "few", bits=bits, statistics=statistics))
    assert loaded.is_quantized
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_for(loaded, tmp_path / "trainer")


@pytest.mark.parametrize("bits", BITS)
def test_lora_trains_on_top(tmp_path, llama, bits):
    model, statistics = llama
    loaded = load(tiny_llama, export(model, tmp_path / "few", bits=bits, statistics=statistics))
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    lora = LoraConfig(r=4, target_modules=sorted(few_bits(loaded)), task_type="CAUSAL_LM")
    on_top = get_peft_model(loaded, lora)
    trainer = trainer_for(on_top, tmp_path / "trainer")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    with on_top.disable_adapter():
        assert torch.equal(logits_of(on_top), logits_of(load(tiny_llama, tmp_path / "few")))
    with pytest.raises(RuntimeError, match=r"has its weight in 8 or 4 bits: .* Keep the adapter unmerged"):
        on_top.merge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in on_top.unload().state_dict().items())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bits", BITS)
def test_compiles_to_one_graph_and_exports(tmp_path, storage, bits):
    torch._dynamo.reset()
    model, statistics = adapted(tiny_bert, storage=storage)
    loaded = load(tiny_bert, export(model, tmp_path / "few", bits=bits, statistics=statistics))
    ids = batches_for(loaded)[0]["input_ids"]
    expected = loaded(ids).logits
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, expected)
    exported = torch.export.export(loaded, (ids,))
    torch.testing.assert_close(exported.module()(ids).logits, expected)


def test_experts_are_made_of_the_weights_that_there_are(tmp_path, llama):
    model, statistics = llama
    loaded = load(tiny_llama, export(model, tmp_path / "few", bits=8, statistics=statistics))
    routed = routed_copy(loaded, RouterConfig(active_ratio=0.5, expert_size=4), progress_bar=False)
    assert not any(isinstance(part, QuantizedLinear) for layer in factorized(routed) for part in layer.modules())
    routed.rank_router.active_ratio = 1.0
    assert relative_error(logits_of(routed), logits_of(loaded)) < 1e-5


def factorized(model):
    return [layer for layer in model.modules() if isinstance(layer, FactorizedLinear)]


# -- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 16, True, "4", 4.0])
def test_other_numbers_of_bits_are_refused(tmp_path, llama, bits):
    with pytest.raises(ValueError, match=re.escape(f"`bits` must be one of (8, 4), or None; got {bits!r}")):
        export(llama[0], tmp_path / "few", bits=bits)
    assert not (tmp_path / "few").exists()


def test_statistics_of_another_model_are_refused(tmp_path, llama):
    _, others = adapted(tiny_bert)
    with pytest.raises(ValueError, match=r"`statistics` has nothing of \['model.layers.0.self_attn.q_proj'"):
        export(llama[0], tmp_path / "few", bits=4, statistics=others)


def test_missing_bitsandbytes_is_said_before_any_work(tmp_path, llama, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="4 bits need bitsandbytes: `pip install bitsandbytes`"):
        export(llama[0], tmp_path / "few", bits=4, statistics=llama[1])
    export(llama[0], tmp_path / "eight", bits=8)


def test_code_of_its_own_cannot_read_few_bits(tmp_path, llama):
    folder = export(llama[0], tmp_path / "few", bits=8)
    with pytest.raises(ValueError, match="has weights in 8 or 4 bits, which vLLM's code would not read"):
        export_remote_code(folder, tmp_path / "remote")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "describes a pivoted layer"),
        ({"bits": 2}, r"\.bits` must be null or one of \(8, 4\)"),
        ({"bits": True}, r"\.bits` must be null or one of \(8, 4\)"),
        ({"bits": None}, "describes a pivoted layer"),
        ({"features": [32, 31]}, r"the features \(32, 31\); its weight is 32 x 32"),
        ({"features": [32]}, r"\.features` must be two positive integers"),
        ({"features": [32, -32]}, r"\.features` must be two positive integers"),
        ({"features": None}, r"\.features` must be two positive integers"),
        ({"rank": 9}, "describes a pivoted layer of rank 9"),
    ],
)
def test_damaged_forms_are_refused(tmp_path, llama, changes, message):
    folder = export(llama[0], tmp_path / "few", bits=8)
    config = config_of(folder)
    config["quantization_config"]["layers"]["model.layers.0.self_attn.q_proj"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((DamagedCheckpointError, ValueError), match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_flipped_code_is_found(tmp_path, llama):
    folder = export(llama[0], tmp_path / "few", bits=8)
    content = bytearray((folder / "model.safetensors").read_bytes())
    name = b"model.layers.0.mlp.down_proj"
    assert name in content
    content[-3000] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="not what was saved"), loading_options(verify=True):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_of_few_bits_is_a_linear_layer():
    layer = QuantizedLinear(20, 12, 4, bias=True)
    assert isinstance(layer, nn.Linear)
    assert repr(layer) == "QuantizedLinear(in_features=20, out_features=12, bias=True, bits=4)"
    assert layer(torch.randn(3, 20)).shape == (3, 12)
