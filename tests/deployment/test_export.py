"""Compressed checkpoints as a user sees them: written, loaded with `from_pretrained`, used, written again."""

import contextlib
import copy
import json
import re
import warnings
from collections import Counter
from pathlib import Path
from statistics import geometric_mean
from unittest import mock

import pytest
import tokenizers
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from peft_jactus import (
    LowRankLinear,
    NumericalWarning,
    PivotedLinear,
    calibrate,
    export_compressed,
    loading_options,
    rank_summary,
)
from peft_jactus.deployment.export import compressed_copy
from peft_jactus.deployment.integrity import digest_metadata
from peft_jactus.deployment.layers import FORMS, FactorizedLinear
from peft_jactus.tuner.layer import JactusLayer
from tests.support.compressed_models import (
    VOCABULARY,
    batches_for,
    compressed,
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

BUILDERS = [tiny_bert, tiny_vit, tiny_llama, tiny_gpt2, tiny_t5]
STORAGES = list(FORMS)
# One float32 product after another, in another order; seen: up to 5e-7.
FLOAT32_ERROR = 1e-5
AUTO_CLASSES = {
    tiny_bert: "AutoModelForSequenceClassification",
    tiny_vit: "AutoModelForImageClassification",
    tiny_llama: "AutoModelForCausalLM",
    tiny_gpt2: "AutoModelForCausalLM",
    tiny_t5: "AutoModelForSeq2SeqLM",
}


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def trained(build=tiny_bert, *, seed=0, **fields):
    model = compressed(build if isinstance(build, nn.Module) else build(), **fields)
    perturb_cores_(model, seed=seed)
    return model


def export(model, folder, *, plot=False, **options):
    """Export without the plot, which takes longer than all the rest of so small a model."""
    with contextlib.ExitStack() as stack:
        if not plot:
            stack.enter_context(mock.patch("peft_jactus.deployment.export.plot_ranks", side_effect=ImportError))
        return export_compressed(model, folder, progress_bar=False, **options)


def load(build_or_class, folder, **options):
    model_class = build_or_class if isinstance(build_or_class, type) else type(build_or_class())
    return model_class.from_pretrained(folder, **options)


def tensors_in(folder):
    """Return all tensors of a checkpoint, of however many files; none may be there twice."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    assert found
    return found


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def layers_of(folder):
    return config_of(folder)["quantization_config"]["layers"]


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    differing = [
        name
        for name, tensor in expected.items()
        if tensor.dtype != actual[name].dtype or not torch.equal(tensor, actual[name])
    ]
    assert differing == []


# -- in a fresh process -----------------------------------------------------------------------------------

LOAD_IN_FRESH_PROCESS = """
    import json, sys
    from pathlib import Path
    import torch, transformers
    from safetensors.torch import load_file
    import peft_jactus

    def forbidden(*args, **kwargs):
        raise AssertionError("loading must not decompose")

    torch.linalg.svd = torch.linalg.eigh = torch.linalg.qr = torch.linalg.lu_factor_ex = forbidden
    ways = {
        "plain": {},
        "device_map auto": {"device_map": "auto"},
        "device_map cpu": {"device_map": {"": "cpu"}},
        "verified": {},
    }
    report = {}
    for folder in map(Path, sys.argv[1:]):
        auto_class = getattr(transformers, (folder / "auto_class").read_text())
        batch = load_file(folder / "batch.safetensors")
        expected = batch.pop("logits").double()
        for way, options in ways.items():
            with peft_jactus.loading_options(verify=way == "verified"):
                model, info = auto_class.from_pretrained(
                    folder / "checkpoint", **options, output_loading_info=True
                )
            assert not model.training
            with torch.no_grad():
                logits = model(**batch).logits
            kinds = {type(module).__name__ for module in model.modules()}
            report.setdefault(folder.name, {})[way] = {
                "error": float((logits.double() - expected).norm() / expected.norm()),
                "dtype": str(logits.dtype),
                "info": {key: sorted(map(str, value)) for key, value in info.items() if value},
                "kinds": sorted(kind for kind in kinds if "Low" in kind or "Pivoted" in kind),
            }
    print("REPORT" + json.dumps(report))
"""


def prepare(folder, build, model, **options):
    """Export, and put what the fresh process needs beside the checkpoint."""
    folder.mkdir()
    export(model, folder / "checkpoint", **options)
    (folder / "auto_class").write_text(AUTO_CLASSES[build])
    batch = batches_for(model.get_base_model())[0]
    logits = logits_of(model, batch)
    del batch["labels"]
    save_file(
        {**{name: tensor.contiguous() for name, tensor in batch.items()}, "logits": logits},
        folder / "batch.safetensors",
    )


@pytest.fixture(scope="module")
def fresh_process_report(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    for build in BUILDERS:
        for storage in STORAGES:
            prepare(root / f"{build.__name__}-{storage}", build, trained(build, storage=storage))
        prepare(root / f"{build.__name__}-sharded", build, trained(build), max_shard_size="20KB")
    tied = tiny_llama_with_tied_embeddings()
    prepare(root / "tied", tiny_llama, trained(tied))
    heads = jactus_config(tiny_bert(), modules_to_save=["pooler", "classifier"], exclude_modules=["pooler"])
    model = tiny_bert()
    calibrate(model, heads, batches_for(model), progress_bar=False)
    model = get_peft_model(model, heads).eval()
    perturb_cores_(model)
    prepare(root / "heads", tiny_bert, model)
    folders = sorted(root.iterdir())
    output = finish(in_fresh_process(LOAD_IN_FRESH_PROCESS, *folders))
    return root, json.loads(re.search("^REPORT(.*)$", output, re.MULTILINE).group(1))


def tiny_llama_with_tied_embeddings():
    config = tiny_llama().config
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "name",
    [f"{build.__name__}-{what}" for build in BUILDERS for what in (*STORAGES, "sharded")] + ["tied", "heads"],
)
def test_a_fresh_process_gets_the_logits_of_the_adapter(fresh_process_report, name):
    _, report = fresh_process_report
    for way, result in report[name].items():
        assert result["error"] <= FLOAT32_ERROR, way
        assert result["info"] == {}, way
        assert result["dtype"] == "torch.float32"
        assert result["kinds"], way
    if name.endswith("factored"):
        assert report[name]["plain"]["kinds"] == ["LowRankLinear"]
    else:
        assert set(report[name]["plain"]["kinds"]) <= {"RowPivotedLinear", "ColumnPivotedLinear"}


@pytest.mark.parametrize("build", BUILDERS)
def test_shards_are_small_and_indexed(fresh_process_report, build):
    checkpoint = fresh_process_report[0] / f"{build.__name__}-sharded" / "checkpoint"
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_in(checkpoint))
    for file in files:
        with safe_open(file, "pt") as reader:
            assert len(list(reader.keys())) == 1 or sum(t.nbytes for t in load_file(file).values()) <= 20_000


def test_tied_embeddings_are_stored_once_and_tied_again(fresh_process_report):
    checkpoint = fresh_process_report[0] / "tied" / "checkpoint"
    assert "lm_head.weight" not in tensors_in(checkpoint)
    model = load(tiny_llama, checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def tiny_bert_with_lm_head():
    return transformers.BertForMaskedLM(tiny_bert().config).eval()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
@pytest.mark.parametrize(
    ("build", "head"),
    [(tiny_llama_with_tied_embeddings, "lm_head"), (tiny_gpt2, "lm_head"), (tiny_bert_with_lm_head, "decoder")],
)
@pytest.mark.parametrize("fields", [{"storage": "factored"}, {"storage": "pivoted"}, {"retained_ratio": 1.0}])
def test_a_head_that_was_compressed_is_no_longer_tied(tmp_path, build, head, fields):
    first = {"lm_head": "q_proj|c_attn", "decoder": "query"}[head]
    model = trained(build, target_modules=rf".*\.({first})|.*{head}", exclude_modules=None, task_type=None, **fields)
    export(model, tmp_path / "compressed")
    loaded = load(build, tmp_path / "compressed")
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=FLOAT32_ERROR)
    assert model.get_base_model().config.tie_word_embeddings
    assert not loaded.config.tie_word_embeddings
    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_in(tmp_path / "again"), tensors_in(tmp_path / "compressed"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_what_was_trained_whole_is_no_longer_tied(tmp_path, name):
    model = trained(tiny_llama_with_tied_embeddings, modules_to_save=[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    export(model, tmp_path / "compressed")
    loaded = load(tiny_llama, tmp_path / "compressed")
    assert not loaded.config.tie_word_embeddings
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= tensors_in(tmp_path / "compressed").keys()
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=FLOAT32_ERROR)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
def test_a_head_in_a_model_that_ties_more_is_refused(tmp_path):
    model = trained(tiny_t5, target_modules=["q", "lm_head"])
    with pytest.raises(ValueError, match=r"lm_head\.weight was tied.*encoder\.embed_tokens\.weight.*exclude_modules"):
        export(model, tmp_path / "compressed")
    assert not (tmp_path / "compressed").exists()


def tiny_bart():
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
        init_std=0.3,
    )
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("build", [tiny_bart, tiny_t5])
def test_weights_that_stay_one_are_all_stored_when_what_they_were_tied_to_was_trained_whole(tmp_path, build):
    base = build()
    fields = {"target_modules": r".*\.(q|q_proj)", "modules_to_save": ["shared"], "decomposition": "svd"}
    model = get_peft_model(base, jactus_config(base, **fields, task_type=None)).eval()
    perturb_cores_(model)
    export(model, tmp_path / "compressed")
    ids = torch.arange(2, 18).view(2, 8)
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(0), "labels": None}
    loaded, report = type(base).from_pretrained(tmp_path / "compressed", output_loading_info=True)
    assert not report["missing_keys"]
    assert relative_error(logits_of(loaded, batch), logits_of(model, batch)) <= FLOAT32_ERROR


def test_trained_heads_are_those_of_the_adapter(fresh_process_report):
    tensors = tensors_in(fresh_process_report[0] / "heads" / "checkpoint")
    assert {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"} <= tensors.keys()
    assert not torch.equal(tensors["classifier.weight"], tiny_bert().classifier.weight)
    assert not [name for name in tensors if "modules_to_save" in name or "original_module" in name]


# -- what is stored how -----------------------------------------------------------------------------------


def test_a_layer_whose_pivoted_parts_are_not_accurate_is_stored_as_what_is_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_jactus.deployment.export._MAX_PIVOTED_ERROR", 0.0)
    model = trained(tiny_llama, storage="pivoted", retained_ratio=0.8, adaptation_rank=0)
    with (
        pytest.warns(NumericalWarning, match="it is stored as one dense weight"),
        pytest.warns(NumericalWarning, match="it is stored factored, which takes"),
    ):
        export(model, tmp_path / "compressed", dtype=torch.bfloat16)
    assert {form["storage"] for form in layers_of(tmp_path / "compressed").values()} >= {"dense", "factored"}
    for name, form in layers_of(tmp_path / "compressed").items():
        layer = model.get_base_model().get_submodule(name)
        out_features, in_features = layer.out_features, layer.in_features
        if form["storage"] == "factored":
            assert form["rank"] * (out_features + in_features) < out_features * in_features


# -- on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{build.__name__}-{what}" for build in BUILDERS for what in (*STORAGES, "sharded")])
def test_no_file_holds_a_dense_targeted_weight(fresh_process_report, name):
    checkpoint = fresh_process_report[0] / name / "checkpoint"
    tensors, layers = tensors_in(checkpoint), layers_of(checkpoint)
    factorised = {layer for layer, form in layers.items() if form["storage"] != "dense"}
    assert factorised
    for layer in factorised:
        parts = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{layer}.")}
        assert parts[f"{layer}.weight"].shape == (1,)
        assert all(min(tensor.shape) <= layers[layer]["rank"] for tensor in parts.values() if tensor.dim() == 2)
    others = {key.rpartition(".")[0] for key in tensors if key.endswith(".weight") and tensors[key].dim() == 2}
    assert not factorised & others
    assert not [key for key in tensors if "jactus" in key or "base_layer" in key]
    files = {file.name for file in checkpoint.iterdir()}
    assert not [file for file in files if file.startswith("adapter")]


def wide_bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("retained_ratio", [0.3, 0.8])
def test_targeted_layers_take_the_retained_ratio_on_disk(tmp_path, storage, retained_ratio):
    dense = wide_bert()
    shapes = {name: module.weight.numel() for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    model = compressed(dense, storage=storage, retained_ratio=retained_ratio, decomposition="svd")
    perturb_cores_(model)
    for dtype in (torch.float32, torch.bfloat16):
        folder = export(model, tmp_path / str(dtype), dtype=dtype)
        layers = layers_of(folder)
        targeted = tuple(f"{name}." for name in layers)
        stored = sum(
            tensor.nbytes
            for name, tensor in tensors_in(folder).items()
            if name.startswith(targeted) and not name.endswith("bias")
        )
        dense_bytes = sum(shapes[name] for name in layers) * dtype.itemsize
        assert retained_ratio - 0.02 < stored / dense_bytes <= retained_ratio + 0.01
        size_of_files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert size_of_files == pytest.approx(sum(t.nbytes for t in tensors_in(folder).values()), rel=0.03)


def test_the_config_says_what_was_done(tmp_path):
    model = trained(storage="pivoted")
    folder = export(model, tmp_path / "compressed")
    written = config_of(folder)["quantization_config"]
    assert written["quant_method"] == "jactus"
    assert written["retained_ratio"] == 0.6
    settings = model.peft_config["default"]
    assert {name: form["rank"] for name, form in written["layers"].items()} == settings.layer_ranks
    assert {name: form["energy_kept"] for name, form in written["layers"].items()} == settings.layer_energy
    assert rank_summary(load(tiny_bert, folder)) == rank_summary(model)


def test_full_rank_layers_are_stored_dense(tmp_path):
    model = trained(tiny_gpt2, rank_pattern={r".*c_attn": 999})
    folder = export(model, tmp_path / "compressed")
    dense = {name for name, form in layers_of(folder).items() if form["storage"] == "dense"}
    assert dense == {f"transformer.h.{block}.attn.c_attn" for block in (0, 1)}
    loaded = load(tiny_gpt2, folder)
    assert type(loaded.transformer.h[0].attn.c_attn) is transformers.pytorch_utils.Conv1D
    assert relative_error(logits_of(loaded), logits_of(model)) <= FLOAT32_ERROR


# -- precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_a_float32_checkpoint_loads_as_bfloat16_as_if_it_had_been_exported_so(tmp_path, storage):
    model = trained(tiny_llama, storage=storage)
    wide, narrow = export(model, tmp_path / "wide"), export(model, tmp_path / "narrow", dtype=torch.bfloat16)
    loaded = load(tiny_llama, wide, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert_same_tensors(state_of(loaded), state_of(load(tiny_llama, narrow)))
    assert torch.equal(logits_of(loaded), logits_of(load(tiny_llama, narrow, dtype="auto")))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_bfloat16_checkpoint_loads_as_float32(tmp_path, storage):
    model = trained(storage=storage)
    folder = export(model, tmp_path / "narrow", dtype=torch.bfloat16)
    loaded = load(tiny_bert, folder, dtype=torch.float32)
    assert {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    stored = tensors_in(folder)
    assert_same_tensors(
        {name: t.float() if t.is_floating_point() else t for name, t in stored.items()},
        {name: tensor for name, tensor in state_of(loaded).items() if name in stored},
    )
    assert relative_error(logits_of(loaded), logits_of(model)) < 0.02


@pytest.mark.parametrize("storage", STORAGES)
def test_a_bfloat16_checkpoint_holds_16_bits_a_number(tmp_path, storage):
    tensors = tensors_in(export(trained(storage=storage), tmp_path / "narrow", dtype=torch.bfloat16))
    dtypes = Counter(tensor.dtype for tensor in tensors.values() if not tensor.dtype.is_floating_point or tensor.dim())
    assert set(dtypes) == {torch.bfloat16} | ({torch.int32} if storage == "pivoted" else set())


def test_a_float16_checkpoint_is_more_accurate_than_a_bfloat16_one(tmp_path):
    model = trained(storage="pivoted")
    errors = []
    for dtype in (torch.float16, torch.bfloat16):
        loaded = load(tiny_bert, export(model, tmp_path / str(dtype), dtype=dtype))
        assert loaded.dtype == dtype
        errors.append(relative_error(logits_of(loaded), logits_of(model)))
    assert errors[0] < 0.5 * errors[1]


def test_a_bfloat16_model_is_exported_as_bfloat16(tmp_path):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = compressed(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    perturb_cores_(model)
    folder = export(model, tmp_path / "compressed")
    assert config_of(folder)["dtype"] == "bfloat16"
    loaded = load(tiny_llama, folder)
    assert loaded.dtype == torch.bfloat16
    assert relative_error(logits_of(loaded), logits_of(model)) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_in_bfloat16_adapter_and_export_lose_little_more_than_the_dense_model(tmp_path, build):
    """Over a float32 copy of the same adapter; the parts round once more than one product does."""
    errors = {"dense": [], "adapter": [], "exported": []}
    for seed in range(3):
        dense = build(seed=seed).bfloat16()
        model = trained(build(seed=seed).bfloat16(), seed=seed, adaptation_rank=4)
        wide = logits_of(copy.deepcopy(model).float())
        loaded = load(build, export(model, tmp_path / str(seed)))
        errors["dense"].append(relative_error(logits_of(dense), logits_of(copy.deepcopy(dense).float())))
        errors["adapter"].append(relative_error(logits_of(model), wide))
        errors["exported"].append(relative_error(logits_of(loaded), wide))
    dense, *others = (geometric_mean(found) for found in errors.values())
    assert max(others) < 1.4 * dense


@torch.no_grad()
def test_of_as_many_bfloat16_numbers_the_pivoted_model_is_nearer_to_the_dense_one():
    ratios = []
    for build in BUILDERS:
        for seed in range(4):
            dense = build(seed=seed)
            batch = batches_for(dense, num_batches=1, batch_size=64, seed=7 + seed)[0]
            narrow = {key: t.bfloat16() if t.is_floating_point() else t for key, t in batch.items()}
            expected = logits_of(dense, batch)
            errors = {}
            for storage in STORAGES:
                model = compressed(build(seed=seed), storage=storage, retained_ratio=0.7, adaptation_rank=0)
                errors[storage] = relative_error(
                    logits_of(compressed_copy(model, dtype=torch.bfloat16), narrow), expected
                )
            ratios.append(errors["pivoted"] / errors["factored"])
    assert geometric_mean(ratios) < 0.9


@pytest.mark.parametrize("storage", STORAGES)
def test_training_all_of_a_bfloat16_checkpoint_stays_finite_and_follows_float32(tmp_path, storage):
    """Not so with parts in float16, where AdamW's epsilon of 1e-8 is zero, and this input has no gradient."""
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_llama()
        with torch.no_grad():
            base.model.embed_tokens.weight[:, 0] = 0
        folder = export(trained(base, storage=storage), tmp_path / str(dtype), dtype=dtype)
        model = load(tiny_llama, folder)
        rows = [{key: t[0] for key, t in batch.items()} for batch in batches_for(model, num_batches=24, batch_size=1)]
        arguments = TrainingArguments(
            tmp_path / "trainer", max_steps=20, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
            report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses[dtype] = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert losses[torch.float32][-1] < losses[torch.float32][0]
    torch.testing.assert_close(losses[torch.bfloat16], losses[torch.float32], rtol=0.02, atol=0)


@pytest.mark.parametrize("storage", STORAGES)
def test_training_in_float16_is_warned_of(tmp_path, storage):
    model = load(tiny_llama, export(trained(tiny_llama, storage=storage), tmp_path, dtype=torch.float16))
    with pytest.warns(UserWarning, match="in float16 is in training mode"):
        model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.eval()
        get_peft_model(model, LoraConfig(target_modules="all-linear", r=1)).train()


def test_a_bfloat16_checkpoint_of_an_earlier_version_loads(tmp_path):
    """Its pivoted parts were float16."""
    model = trained(tiny_llama, storage="pivoted")
    folder = export(model, tmp_path / "narrow", dtype=torch.bfloat16)
    wide = tensors_in(export(model, tmp_path / "wide"))
    parts = ("rows.weight", "columns.weight", "others.weight")
    tensors = {n: wide[n].half() if n.endswith(parts) else t for n, t in tensors_in(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"} | digest_metadata(tensors))
    loaded = load(tiny_llama, folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert relative_error(logits_of(loaded), logits_of(model)) < 0.02


# -- using the loaded model -------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5])
def test_generated_tokens_are_those_of_the_adapter(tmp_path, build):
    model = trained(build)
    loaded = load(build, export(model, tmp_path / "compressed"))
    inputs = {key: batches_for(loaded)[0][key][:2, :5] for key in ("input_ids", "attention_mask")}
    for options in ({}, {"num_beams": 3}):
        with warnings.catch_warnings():  # transformers on its own generation settings
            warnings.simplefilter("ignore")
            expected, found = (
                m.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **options)
                for m in (model, loaded)
            )
        assert torch.equal(expected, found), options
        assert len(expected.unique()) > 1


def word_tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {f"word{i}": i for i in range(4, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def test_a_pipeline_needs_nothing_but_the_directory(tmp_path):
    model = trained()
    folder = export(model, tmp_path / "compressed", processor=word_tokenizer())
    classify = transformers.pipeline("text-classification", str(folder), top_k=None, device="cpu")
    (scores,) = classify(["word7 word20 word33"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[7, 20, 33]])).logits
    found = torch.tensor([next(s["score"] for s in scores if s["label"] == f"LABEL_{i}") for i in range(3)])
    torch.testing.assert_close(found, logits.softmax(-1)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "storage", "dtype"),
    [
        *[(build, storage, torch.float32) for build in BUILDERS for storage in STORAGES],
        *[(build, "pivoted", torch.bfloat16) for build in (tiny_bert, tiny_t5)],
    ],
)
def test_saving_a_loaded_model_writes_the_same_checkpoint(tmp_path, build, storage, dtype):
    first = export(trained(build, storage=storage), tmp_path / "first", dtype=dtype)
    load(build, first).save_pretrained(tmp_path / "second")
    assert_same_tensors(tensors_in(tmp_path / "second"), tensors_in(first))
    assert config_of(tmp_path / "second")["quantization_config"] == config_of(first)["quantization_config"]
    with loading_options(verify=True):
        again = load(build, tmp_path / "second")
    assert_same_tensors(state_of(again), state_of(load(build, first)))


def test_the_base_class_loads_a_checkpoint_with_a_head(tmp_path):
    model = trained()
    folder = export(model, tmp_path / "compressed")
    body, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["missing_keys"]
    batch = {key: batches_for(model.get_base_model())[0][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model.get_base_model().bert(**batch).last_hidden_state
        assert relative_error(body(**batch).last_hidden_state, expected) <= FLOAT32_ERROR


def test_a_model_of_another_class_than_the_checkpoint_can_be_saved_and_loaded(tmp_path):
    body = AutoModel.from_pretrained(export(trained(), tmp_path / "compressed"))
    body.save_pretrained(tmp_path / "body")
    assert_same_tensors(state_of(AutoModel.from_pretrained(tmp_path / "body")), state_of(body))
    model = load(tiny_bert, tmp_path / "body")  # with a new head
    assert_same_tensors(state_of(model.bert), state_of(body))
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits_of(load(tiny_bert, tmp_path / "whole")), logits_of(model))


def test_copies_and_resized_embeddings_are_saved_like_the_model_itself(tmp_path):
    model = copy.deepcopy(load(tiny_llama, export(trained(tiny_llama), tmp_path / "compressed")))
    assert torch.equal(logits_of(model), logits_of(load(tiny_llama, tmp_path / "compressed")))
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    with loading_options(verify=True):
        assert torch.equal(logits_of(load(tiny_llama, tmp_path / "resized")), logits_of(model))


@pytest.mark.parametrize("storage", STORAGES)
def test_autocast_computes_and_trains_in_bfloat16(tmp_path, storage):
    model = load(tiny_llama, export(trained(tiny_llama, storage=storage), tmp_path / "compressed"))
    expected = logits_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_of(model)
        loss = model(**batches_for(model)[0]).loss
    loss.backward()
    assert 0 < relative_error(found, expected) < 0.02
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def training_arguments(folder):
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )


@pytest.mark.filterwarnings(
    "ignore:.*deprecated and will be removed in v6:FutureWarning"
)  # not before all 5.x know it
@pytest.mark.parametrize(
    ("storage", "gradient_checkpointing"), [("factored", False), ("pivoted", False), ("pivoted", True)]
)
def test_the_trainer_trains_all_factors_and_saves_what_it_trained(tmp_path, storage, gradient_checkpointing):
    model = load(tiny_bert, export(trained(storage=storage), tmp_path / "compressed"))
    before = state_of(model)
    rows = [{k: v[row] for k, v in batch.items()} for batch in batches_for(model, num_batches=2) for row in range(4)]
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainer = transformers.Trainer(model=model, args=training_arguments(tmp_path / "run"), train_dataset=rows)
    trainer.train()
    after = state_of(model)
    unchanged = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    markers = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)}
    assert {n for n in unchanged if not n.endswith(("_index", "position_ids", "token_type_ids"))} == markers
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-2"):
        with loading_options(verify=True):
            again = load(tiny_bert, folder)
        assert_same_tensors(state_of(again), after)
        assert torch.equal(logits_of(again), logits_of(model.eval()))


# -- without this package ---------------------------------------------------------------------------------

LOAD_WITHOUT_THE_PACKAGE = """
    import json, sys
    from pathlib import Path
    import torch, transformers
    from safetensors.torch import load_file

    report = {}
    for folder in map(Path, sys.argv[1:]):
        auto_class = getattr(transformers, (folder / "auto_class").read_text())
        batch = load_file(folder / "batch.safetensors")
        expected = batch.pop("logits").double()
        report[folder.name] = {}
        for checkpoint in sorted(path for path in folder.iterdir() if path.is_dir()):
            try:
                with torch.no_grad():
                    logits = auto_class.from_pretrained(checkpoint)(**batch).logits
            except (RuntimeError, ValueError) as error:
                report[folder.name][checkpoint.name] = type(error).__name__
            else:
                error = float((logits.double() - expected).norm() / expected.norm())
                report[folder.name][checkpoint.name] = error
    assert "peft_jactus" not in sys.modules
    print("REPORT" + json.dumps(report))
"""


def test_dense_copies_load_without_this_package_and_compressed_ones_are_errors(tmp_path):
    folders = []
    for build in BUILDERS:
        for storage in STORAGES:
            folders.append(tmp_path / f"{build.__name__}-{storage}")
            prepare(folders[-1], build, trained(build, storage=storage))
            checkpoint = folders[-1] / "checkpoint"
            load(build, checkpoint).dequantize().save_pretrained(folders[-1] / "dequantized")
            with loading_options(dense=True):
                dense = load(build, checkpoint)
            assert not [module for module in dense.modules() if isinstance(module, FactorizedLinear)]
            dense.save_pretrained(folders[-1] / "dense")
            for kind in ("dequantized", "dense"):
                assert "quantization_config" not in config_of(folders[-1] / kind)
    output = finish(in_fresh_process(LOAD_WITHOUT_THE_PACKAGE, *folders))
    report = json.loads(re.search("^REPORT(.*)$", output, re.MULTILINE).group(1))
    assert len(report) == len(folders)
    for name, outcomes in report.items():
        assert isinstance(outcomes.pop("checkpoint"), str), f"{name}: compressed, and loaded without an error"
        assert set(outcomes) == {"dequantized", "dense"}
        assert all(isinstance(error, float) and error <= FLOAT32_ERROR for error in outcomes.values()), (
            name,
            outcomes,
        )


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
def test_a_dense_copy_has_the_classes_of_the_base_model(tmp_path, build):
    model = trained(build)
    folder = export(model, tmp_path / "compressed")
    kinds = {name: type(module) for name, module in build().named_modules()}
    for compressed_model in (load(build, folder), compressed_copy(model)):
        dense = compressed_model.dequantize()
        assert {name: type(module) for name, module in dense.named_modules()} == kinds
        assert relative_error(logits_of(dense), logits_of(model)) <= FLOAT32_ERROR


# -- what can be exported ---------------------------------------------------------------------------------


def assert_exports(model, folder, expected, build=tiny_bert, **options):
    loaded = load(build, export(model, folder, **options))
    assert relative_error(logits_of(loaded), expected) <= FLOAT32_ERROR


def test_an_adapter_from_disk_is_exported(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = trained(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"))
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert_exports(PeftModel.from_pretrained(base, tmp_path / "adapter"), tmp_path / "from_peft", expected)
    native = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    native.load_adapter(str(tmp_path / "adapter"))
    assert_exports(native, tmp_path / "from_transformers", expected)
    assert_same_tensors(tensors_in(tmp_path / "from_transformers"), tensors_in(tmp_path / "from_peft"))


def test_untrained_cores_are_exported(tmp_path):
    model = compressed(tiny_llama(), adaptation_rank=0)
    assert_exports(model, tmp_path / "compressed", logits_of(model), tiny_llama)


def test_untrained_adaptation_ranks_are_exported_with_a_warning(tmp_path):
    model = compressed(tiny_llama())
    with pytest.warns(NumericalWarning, match=r"No adaptation rank was trained.*JactusConfig\(adaptation_rank=0\)"):
        assert_exports(model, tmp_path / "compressed", logits_of(model), tiny_llama)


def test_an_adapter_without_calibration_is_exported(tmp_path):
    model = get_peft_model(tiny_llama(), jactus_config(tiny_llama(), decomposition="svd")).eval()
    perturb_cores_(model)
    assert_exports(model, tmp_path / "compressed", logits_of(model), tiny_llama)


@pytest.mark.parametrize("build", BUILDERS)
def test_kept_base_weights_are_not_exported(tmp_path, build):
    kept, freed = trained(build, keep_base_weights=True), trained(build)
    assert_exports(kept, tmp_path / "kept", logits_of(kept), build)
    export(freed, tmp_path / "freed")
    assert_same_tensors(tensors_in(tmp_path / "kept"), tensors_in(tmp_path / "freed"))


@pytest.mark.parametrize("keep_base_weights", [False, True])
@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
def test_a_merged_adapter_is_exported_and_stays_merged(tmp_path, build, keep_base_weights):
    model = trained(build, keep_base_weights=keep_base_weights)
    expected = logits_of(model)
    model.merge_adapter()
    merged = logits_of(model)
    assert_exports(model, tmp_path / "compressed", expected, build)
    assert torch.equal(logits_of(model), merged)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model), expected)


def with_two_adapters(folder):
    model = trained(tiny_llama)
    expected = {"default": logits_of(model)}
    other = trained(tiny_llama, seed=5, retained_ratio=0.4)
    other.save_pretrained(folder)
    model.load_adapter(folder, adapter_name="second")
    return model.eval(), expected | {"second": logits_of(other)}


def test_the_active_one_of_several_adapters_is_exported(tmp_path):
    model, expected = with_two_adapters(tmp_path / "adapter")
    assert relative_error(expected["second"], expected["default"]) > 0.01
    for name in ("second", "default"):
        model.set_adapter(name)
        assert_exports(model, tmp_path / name, expected[name], tiny_llama)


@pytest.mark.filterwarnings(
    "ignore:Model with `tie_word_embeddings=True`", "ignore:Model has `tie_word_embeddings=True`"
)
def test_layers_that_only_another_adapter_covers_are_exported_as_they_were(tmp_path):
    base = tiny_llama_with_tied_embeddings()
    fields = {"decomposition": "svd", "keep_base_weights": True}
    model = get_peft_model(base, jactus_config(base, target_modules=["q_proj", "up_proj", "lm_head"], **fields))
    model.add_adapter("second", jactus_config(base, target_modules=["up_proj"], **fields))
    model.eval().set_adapter("second")
    perturb_cores_(model)
    merged = copy.deepcopy(model).merge_and_unload()
    expected = logits_of(merged)
    assert_exports(model, tmp_path / "compressed", expected, tiny_llama_with_tied_embeddings)
    assert {name.rpartition(".")[2] for name in layers_of(tmp_path / "compressed")} == {"up_proj"}
    assert config_of(tmp_path / "compressed")["tie_word_embeddings"]
    tensors = tensors_in(tmp_path / "compressed")
    for name, tensor in merged.state_dict().items():
        if "up_proj" not in name and name != "lm_head.weight":
            assert torch.equal(tensors[name], tensor), name
    model.merge_adapter(["default"])  # which is not the one to export
    merged_logits = logits_of(model)
    assert_exports(model, tmp_path / "again", expected, tiny_llama_with_tied_embeddings)
    assert torch.equal(logits_of(model), merged_logits)


def test_storage_may_differ_from_that_of_the_budget_with_a_warning_if_that_takes_more(tmp_path):
    model = trained(storage="pivoted", adaptation_rank=0)
    message = r"`storage`='pivoted', to keep 60%\. Stored factored, .* keep 67%.*JactusConfig\(storage='factored'\)"
    with pytest.warns(UserWarning, match=message):
        folder = export(model, tmp_path / "factored", storage="factored")
    assert_exports(model, tmp_path / "pivoted", logits_of(load(tiny_bert, folder)), storage="pivoted")
    assert {form["storage"] for form in layers_of(folder).values()} <= {"factored", "dense"}
    kinds = {type(module) for module in load(tiny_bert, folder).modules()}
    assert not [kind for kind in kinds if issubclass(kind, PivotedLinear)]


# -- the user's model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("options", "keep_base_weights"),
    [({}, True), ({"dtype": torch.bfloat16}, False), ({"storage": "factored"}, False)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The ranks were chosen for `storage`='pivoted'")
def test_exporting_leaves_the_model_alone(tmp_path, build, options, keep_base_weights):
    model = trained(build, keep_base_weights=keep_base_weights)
    logits, state = logits_of(model), state_of(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    tensors = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = copy.deepcopy(model.config.to_dict())
    settings = copy.deepcopy(model.peft_config["default"].to_dict())
    export(model, tmp_path / "compressed", **options)
    assert torch.equal(logits_of(model), logits)
    assert_same_tensors(state_of(model), state)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())} == tensors
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert model.config.to_dict() == config
    assert model.peft_config["default"].to_dict() == settings
    assert not hasattr(model.get_base_model(), "hf_quantizer")


def test_a_model_trains_on_after_an_export_and_the_export_does_not_change(tmp_path):
    model = trained()
    folder = export(model, tmp_path / "first")
    live = compressed_copy(model)
    before, live_before = logits_of(load(tiny_bert, folder)), state_of(live)
    batch = batches_for(model.get_base_model())[0]
    cores = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(cores, lr=0.1)
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    model.eval()
    assert all(parameter.grad is not None for parameter in cores)
    assert torch.equal(logits_of(load(tiny_bert, folder)), before)
    targeted = {name for name in live_before if any(name.startswith(f"{layer}.") for layer in layers_of(folder))}
    assert_same_tensors(
        {n: t for n, t in state_of(live).items() if n in targeted}, {n: live_before[n] for n in targeted}
    )
    assert_exports(model, tmp_path / "second", logits_of(model))
    assert relative_error(logits_of(load(tiny_bert, tmp_path / "second")), before) > 1e-4


def test_an_adapter_of_any_name_is_exported(tmp_path):
    model = compressed(tiny_bert(), adapter_name="other")
    perturb_cores_(model)
    export_compressed(model, tmp_path / "out", progress_bar=False)
    result = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(result), logits_of(model), rtol=1e-4, atol=1e-5)


def test_training_a_compressed_copy_leaves_the_deployed_layers_of_the_model_alone():
    model = trained()
    copied = compressed_copy(model)
    layers = {name for name, module in copied.named_modules() if isinstance(module, FactorizedLinear)}
    jactus = {name for name, module in model.get_base_model().named_modules() if isinstance(module, JactusLayer)}
    assert layers <= jactus
    before = {name: state_of(model.get_base_model().get_submodule(name)) for name in layers}
    with torch.no_grad():
        for name in layers:
            for parameter in copied.get_submodule(name).parameters():
                parameter.add_(1)
    for name in layers:
        assert_same_tensors(state_of(model.get_base_model().get_submodule(name)), before[name])


# -- refusals ---------------------------------------------------------------------------------------------


def with_nan_adapter():
    model = trained()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "jactus_adapt_up" in name)[0, 0] = torch.nan
    return model


def with_infinite_bias():
    model = trained()
    with torch.no_grad():
        next(b for name, b in model.named_buffers() if "jactus_bias" in name)[0] = torch.inf
    return model


def with_plain_base():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    config = jactus_config(tiny_llama(), target_modules=["first"], task_type=None, decomposition="svd")
    return get_peft_model(Plain(), config)


def with_two_active_adapters():
    model = trained(tiny_llama, keep_base_weights=True)
    model.add_adapter("second", jactus_config(tiny_llama(), decomposition="svd", keep_base_weights=True))
    model.base_model.set_adapter(["default", "second"])
    return model


REFUSALS = {
    "dense model": (tiny_bert, {}, ValueError, "`model` has no JACTUS layers"),
    "compressed model": (lambda: compressed_copy(trained()), {}, ValueError, "already compressed"),
    "plain module": (
        with_plain_base,
        {},
        TypeError,
        "Only transformers models have compressed checkpoints; got a Plain",
    ),
    "nan adapter": (with_nan_adapter, {}, ValueError, r"bert\..*: `jactus_adapt_up` is not finite"),
    "infinite bias": (with_infinite_bias, {}, ValueError, "`jactus_bias` is not finite"),
    "two active adapters": (with_two_active_adapters, {}, ValueError, "One JACTUS adapter must be active"),
    "unknown storage": (trained, {"storage": "dense"}, ValueError, "`storage` must be one of.*got 'dense'"),
    "unknown argument": (trained, {"shard_size": 1}, TypeError, r"unexpected keyword arguments \['shard_size'\]"),
}


# Arguments that cannot be used, by what the error says of each.
UNUSABLE = {
    "unit of a size": ({"max_shard_size": "5XB"}, ValueError, "`max_shard_size` must be .*such as '5GB'; got '5XB'"),
    "size of no number": ({"max_shard_size": "manyGB"}, ValueError, "`max_shard_size` must be .*; got 'manyGB'"),
    "no size": ({"max_shard_size": None}, TypeError, "`max_shard_size` must be a number of bytes.*; got None"),
    "name of a processor": (
        {"processor": "bert-base-uncased"},
        TypeError,
        r"`processor` must be .*; got 'bert-base-uncased'\. .*`AutoTokenizer\.from_pretrained\(name\)`",
    ),
    "class of a processor": ({"processor": transformers.BertTokenizer}, TypeError, "`processor` must be a tokenizer"),
    "list of metrics": (
        {"metrics": [1]},
        TypeError,
        r"`metrics` must be a dict.*`trainer\.evaluate\(\)`.*; got \[1\]",
    ),
    "data set itself": (
        {"datasets": {"train": [1]}},
        TypeError,
        "`datasets` must be the name of a data set on the Hub",
    ),
    "numbers of data sets": ({"datasets": ["user/name", 1]}, TypeError, "`datasets` must be .*or a list of names"),
    "name of a dtype": ({"dtype": "float16"}, TypeError, "`dtype` must be one of .*torch.float16.*; got 'float16'"),
    "dtype of integers": ({"dtype": torch.int8}, TypeError, "`dtype` must be one of .*; got torch.int8"),
    "repository": (
        {"push_to_hub": True, "repo_id": "a/b/c"},
        ValueError,
        "`repo_id`: a repository cannot be called 'a/b/c'. Give another name, such as 'user/name'",
    ),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_an_argument_that_cannot_be_used_is_refused_before_any_layer_is_folded(tmp_path, monkeypatch, reason):
    monkeypatch.setattr(JactusLayer, "get_factors", lambda *_: pytest.fail("a layer was folded"))
    options, error, message = UNUSABLE[reason]
    with pytest.raises(error, match=message):
        export(trained(), tmp_path / "compressed", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_name_no_repository_can_have_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"`repo_id`: a repository cannot be called 'my--model'\. Give another name"):
        export(trained(), tmp_path / "my--model", push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float16", torch.int8])
def test_a_copy_takes_dtypes_only(dtype):
    with pytest.raises(TypeError, match=r"`dtype` must be one of torch\.float32, torch\.bfloat16"):
        compressed_copy(trained(), dtype=dtype)


@pytest.mark.parametrize("size", ["1.5GB", "20 kb", 20_000, 2e4])
@pytest.mark.parametrize("datasets", ["user/name", ["user/name", "other"]])
def test_every_form_of_a_size_and_of_data_sets_is_taken(tmp_path, size, datasets):
    export(trained(), tmp_path, max_shard_size=size, datasets=datasets, metrics=Counter(loss=1), dtype=torch.float64)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (size != "1.5GB")


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, reason):
    make, options, error, message = REFUSALS[reason]
    with pytest.raises(error, match=message):
        export(make(), tmp_path / "parent" / "compressed", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = trained()
    with pytest.raises(ValueError, match=r"is not empty\. Give another one, or `overwrite=True`"):
        export(model, tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt is a file; give a directory"):
        export(model, tmp_path / "notes.txt", overwrite=True)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("notes.txt", "mine")]


def test_a_place_that_a_finished_checkpoint_cannot_be_moved_to_is_refused(tmp_path, monkeypatch):
    model, unwritable = trained(), tmp_path / "unwritable"
    unwritable.mkdir()
    with pytest.raises(ValueError, match="/proc is a mount point, which cannot be renamed; give a folder in it"):
        export(model, "/proc", overwrite=True)
    monkeypatch.setattr("os.access", lambda folder, mode: Path(folder) != unwritable)  # root may write anywhere
    for target in (unwritable / "compressed", unwritable / "a" / "b"):
        with pytest.raises(ValueError, match="unwritable is not writable"):
            export(model, target)


def test_a_base_on_the_hub_may_be_called_as_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = compressed(tiny_llama(), adaptation_rank=0)
    model.peft_config["default"].base_model_name_or_path = "gpt2"
    for _ in range(2):
        export(model, "gpt2", overwrite=True)
    assert (tmp_path / "gpt2" / "model.safetensors").exists()


def test_overwriting_deletes_neither_the_base_model_nor_the_current_directory(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "models" / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "base")
    model = compressed(base)
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "there")
    for target, message in (
        (tmp_path / "models" / "base", r"base is the adapter's base model \("),
        (tmp_path / "models", r"models contains the adapter's base model \("),
        (".", r"`save_directory` \. is the current directory \("),
        (tmp_path / "here", r"here contains the current directory \("),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*which would be deleted\. Give another directory"):
            export(model, target, overwrite=True)
    model.peft_config["default"].base_model_name_or_path = "user/name"
    with pytest.raises(ValueError, match=r"models contains the base model \("):
        export(model, tmp_path / "models", overwrite=True)
    assert (tmp_path / "models" / "base" / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "models"]


def test_an_empty_directory_and_missing_parents_are_used(tmp_path):
    (tmp_path / "empty").mkdir()
    model = trained()
    assert_exports(model, tmp_path / "empty", logits_of(model))
    assert_exports(model, str(tmp_path / "a" / "b" / "c"), logits_of(model))


def test_a_directory_can_be_given_relative_to_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained()
    assert_exports(model, "compressed", logits_of(model))
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]


# -- crashes ----------------------------------------------------------------------------------------------


class PulledPlugError(Exception):
    pass


CRASH_SITES = [
    "transformers.modeling_utils.PreTrainedModel.save_pretrained",
    "transformers.configuration_utils.PreTrainedConfig.save_pretrained",
    "transformers.modeling_utils.safe_save_file",
    "peft_jactus.deployment.export.rank_summary",
    "peft_jactus.deployment.export.plot_ranks",
    "peft_jactus.deployment.export.write_model_card",
    "pathlib.Path.rename",
]


@pytest.mark.parametrize("site", CRASH_SITES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_leaves_what_was_there_and_no_more(tmp_path, monkeypatch, site, overwrite):
    target = tmp_path / "compressed"
    if overwrite:
        target.mkdir()
        (target / "model.safetensors").write_text("what was there")
    before = {path.name: path.read_bytes() for path in target.iterdir()} if overwrite else None
    model = trained()

    def pull_plug(*args, **kwargs):
        raise PulledPlugError

    with monkeypatch.context() as patch:
        patch.setattr(site, pull_plug)
        with pytest.raises(PulledPlugError):
            export(model, target, overwrite=overwrite, plot=True)
    assert [path.name for path in tmp_path.iterdir()] == (["compressed"] if overwrite else [])
    if overwrite:
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_crash_between_the_two_renames_of_an_overwrite_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    target = export(trained(), tmp_path / "compressed")
    before = tensors_in(target)
    rename, calls = Path.rename, []

    def fail_the_second_time(path, to):
        calls.append(to)
        if len(calls) == 2:
            raise PulledPlugError
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_the_second_time)
        with pytest.raises(PulledPlugError):
            export(trained(seed=1), target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]
    assert_same_tensors(tensors_in(target), before)


def test_overwriting_leaves_nothing_of_what_was_there(tmp_path):
    target = export(trained(), tmp_path / "compressed", max_shard_size="20KB", processor=word_tokenizer())
    (target / "notes.txt").write_text("old")
    model = trained(seed=1)
    assert_exports(model, target, logits_of(model), overwrite=True)
    assert {path.name for path in target.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "disk" / "here").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "here")
    model = trained()
    for overwrite in (False, True):
        assert_exports(model, link, logits_of(model), overwrite=overwrite)
        assert link.is_symlink()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["here"]


def test_others_may_read_what_was_exported(tmp_path):
    target = export(trained(), tmp_path / "compressed")
    assert target.stat().st_mode & 0o555 == 0o555
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in target.iterdir() if path.name != "model.safetensors")


KILL_EXPORTS = """
    import itertools, os, signal, sys, time
    from pathlib import Path
    from peft_jactus import export_compressed
    from tests.support.compressed_models import compressed, tiny_llama

    def export_forever(target):
        models = [compressed(tiny_llama(seed=seed)) for seed in range(2)]
        target.parent.mkdir()
        for model in itertools.cycle(models):
            export_compressed(model, target, overwrite=True, progress_bar=False, max_shard_size="20KB")

    for turn in range(int(sys.argv[2])):
        target = Path(sys.argv[1]) / str(turn) / "compressed"
        child = os.fork()  # before anything has been computed: no threads yet
        if child == 0:
            signal.alarm(60)
            export_forever(target)
        ready = target if turn % 2 else target.parent
        while not ready.exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(0.04 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


def test_kills_leave_a_whole_checkpoint_or_none(tmp_path):
    expected = [logits_of(compressed(tiny_llama(seed=seed))) for seed in range(2)]
    num_kills = 5
    finish(in_fresh_process(KILL_EXPORTS, tmp_path, num_kills))
    num_whole = 0
    for turn in range(num_kills):
        target = tmp_path / str(turn) / "compressed"
        if target.exists():
            with loading_options(verify=True):
                logits = logits_of(load(tiny_llama, target))
            assert min(relative_error(logits, wanted) for wanted in expected) <= FLOAT32_ERROR
            num_whole += 1
    assert num_whole >= num_kills // 2


# -- the model card ---------------------------------------------------------------------------------------


def test_the_model_card_says_where_it_comes_from_what_was_kept_and_how_to_load_it(tmp_path):
    dense = tiny_bert()
    dense.config.name_or_path = dense.name_or_path = "somebody/some-bert"
    model = trained(dense)
    folder = export(
        model,
        tmp_path / "compressed",
        plot=True,
        metrics={"accuracy": 0.91234, "best_class": "Ångström", "by_class": [0.5, 1.0]},
        datasets="somebody/questions",
    )
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["base_model"] == "somebody/some-bert"
    assert data["datasets"] == "somebody/questions"
    assert data["library_name"] == "transformers"
    assert "peft-jactus" in data["tags"]
    assert str(rank_summary(model)) in text
    assert "| accuracy | 0.9123 |" in text
    assert "| best_class | Ångström |" in text
    assert "| by_class | [0.5, 1.0] |" in text
    assert "![Ranks by block](ranks.png)" in text
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_the_snippet_of_the_model_card_loads_the_model(tmp_path):
    model = trained(tiny_llama)
    folder = export(model, tmp_path / "compressed")
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    placeholder = "path/or/name/of/this/repository"
    assert placeholder in snippet
    namespace = {}
    exec(snippet.replace(placeholder, str(folder)), namespace)
    assert relative_error(logits_of(namespace["model"]), logits_of(model)) <= FLOAT32_ERROR


def test_local_paths_do_not_leak_into_a_checkpoint(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "my-secret-folder" / "my-llama")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "my-secret-folder" / "my-llama")
    folder = export(trained(base), tmp_path / "compressed")
    for file in folder.iterdir():
        assert b"my-secret-folder" not in file.read_bytes(), file.name
    assert config_of(folder)["quantization_config"]["base_model"] == "my-llama"


def test_a_checkpoint_needs_no_plot(tmp_path):
    folder = export(trained(), tmp_path / "compressed", plot=False)
    assert not (folder / "ranks.png").exists()
    assert "ranks.png" not in (folder / "README.md").read_text()


# -- float16 does not hold everything ---------------------------------------------------------------------


def test_layers_that_a_float16_checkpoint_cannot_hold_pivoted_are_stored_as_factors(tmp_path):
    model = trained(storage="pivoted")
    name, layer = next((n, m) for n, m in model.get_base_model().named_modules() if isinstance(m, JactusLayer))
    with torch.no_grad():
        layer.jactus_frozen_factor["default"].mul_(1e7)
    with pytest.warns(NumericalWarning, match=f"{re.escape(name)}: stored pivoted in torch.float16"):
        folder = export(model, tmp_path / "compressed", dtype=torch.float16)
    storages = {layer: form["storage"] for layer, form in layers_of(folder).items()}
    assert storages.pop(name) == "factored"
    assert "factored" not in storages.values()
    loaded = load(tiny_bert, folder)
    assert type(loaded.get_submodule(name)) is LowRankLinear
    assert all(torch.isfinite(tensor).all() for tensor in tensors_in(folder).values())


def test_hub_arguments_reach_the_hub(tmp_path, monkeypatch):
    calls = []

    class FakeApi:
        def __init__(self, **options):
            calls.append(("api", options))

        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id, options))
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, **options):
            assert {path.name for path in options["folder_path"].iterdir()} == {
                "README.md",
                "config.json",
                "model.safetensors",
            }
            calls.append(("upload_folder", options))

    monkeypatch.setattr("peft_jactus.deployment.export.HfApi", FakeApi)
    folder = export(trained(), tmp_path / "small-bert", push_to_hub=True, token="secret", private=True)
    (_, api), (_, name, repo), (_, upload) = calls
    assert api == {"token": "secret"}
    assert (name, repo["private"]) == ("small-bert", True)
    assert upload["repo_id"] == "me/small-bert"
    assert upload["folder_path"] == folder
