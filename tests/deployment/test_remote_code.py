"""Ways into vLLM: full-size weights, and low-rank layers whose code travels with the checkpoint.

`vllm_model` imitates vLLM 0.33.0: `vllm/model_executor/models/registry.py` (`_try_resolve_transformers`),
`models/transformers/base.py` (`Base.__init__`, `recursive_replace`, `init_parameters`, `load_weights`),
`models/transformers/fuser.py` (`key`), `models/transformers/__init__.py` (`vllm_attention_forward`) and
`models/utils.py` (`AutoWeightsLoader`). docs/vllm.md says what was run on vLLM itself.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, dynamic_module_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peft_jactus
from peft_jactus import export_compressed, loading_options
from peft_jactus.deployment.layers import FactorizedLinear
from peft_jactus.deployment.remote_code import export_remote_code
from tests.support.compressed_models import logits_of, tiny_bert, tiny_gpt2, tiny_llama, trained

IDS = torch.arange(2, 14)
FORM_NAMES = {"LowRankLinear", "RowPivotedLinear", "ColumnPivotedLinear"}
NOT_THE_FIRST_BLOCK = r"(model\.)?layers\.1\..*_proj"


def tiny_qwen2(*, dtype=torch.float32):
    """Has biases, and one tensor for tokens and logits."""
    config = transformers.Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    return model


FAMILIES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}
CASES = [("llama", "factored"), ("llama", "pivoted"), ("qwen2", "factored"), ("qwen2", "pivoted"), ("gpt2", "pivoted")]


@pytest.fixture(scope="module", autouse=True)
def own_cache_of_remote_code(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Give the folders of a compressed checkpoint and of the same with its own code; make them once."""
    made = {}

    def export(family, storage, *, dtype=torch.float32, **fields):
        key = (family, storage, dtype, *fields.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}_{storage}")
            model = trained(FAMILIES[family](dtype=dtype), storage=storage, **fields)
            export_compressed(model, folder / "compressed", progress_bar=False)
            made[key] = folder / "compressed", export_remote_code(folder / "compressed", folder / "remote")
        return made[key]

    return export


def low_rank_layers(model):
    return [name for name, layer in model.named_modules() if type(layer).__name__ in FORM_NAMES]


# -- transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "storage"), CASES)
def test_remote_code_gives_the_logits_of_the_compressed_checkpoint(exported, family, storage):
    source, remote = exported(family, storage)
    expected = AutoModelForCausalLM.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(remote, trust_remote_code=True)
    assert low_rank_layers(model) == low_rank_layers(expected) != []
    assert not any(isinstance(layer, FactorizedLinear) for layer in model.modules())
    assert torch.equal(logits_of(model), logits_of(expected))


def test_all_of_a_bfloat16_model_is_bfloat16(exported):
    source, remote = exported("llama", "pivoted", dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(remote, trust_remote_code=True)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes == {name: tensor.dtype for name, tensor in expected.state_dict().items()}
    assert {dtype for dtype in dtypes.values() if dtype.is_floating_point} == {torch.bfloat16}
    assert torch.equal(logits_of(model), logits_of(expected))


def test_remote_code_needs_nothing_of_this_package(exported, tmp_path):
    source, remote = exported("qwen2", "pivoted")
    code = """
        import sys
        sys.modules["peft_jactus"] = sys.modules["peft"] = None  # importing them is an error
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        with torch.no_grad():
            save_file({"logits": model(torch.arange(2, 14)[None]).logits}, sys.argv[2])
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), remote, tmp_path / "logits"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    expected = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], expected(IDS[None]).logits)


def test_a_loader_that_ignores_the_code_raises(exported):
    _, remote = exported("llama", "factored")
    with pytest.raises(RuntimeError, match=r"`ignore_mismatched_sizes`"):
        AutoModelForCausalLM.from_pretrained(remote, trust_remote_code=False)


def test_tokenizer_files_come_along_and_shards_are_written_anew(exported, tmp_path):
    source, _ = exported("qwen2", "factored")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for name in ("tokenizer_config.json", "vocab.txt", "chat_template.jinja", "README.md"):
        (tmp_path / "sharded" / name).write_text("{}")
    export_remote_code(tmp_path / "sharded", tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_low_rank.py"),
        *("tokenizer_config.json", "vocab.txt", "chat_template.jinja"),
    }
    export_remote_code(tmp_path / "sharded", tmp_path / "whole", max_shard_size="20KB", overwrite=True)
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    assert torch.equal(logits_of(again), logits_of(model))


# -- vLLM, as far as it can be imitated -------------------------------------------------------------------


class ReplicatedLinear(nn.Module):
    """As vLLM's: no `nn.Linear`, in the dtype of vLLM's model, and it knows the number of devices."""

    def __init__(self, replaced, dtype, tp_size):
        super().__init__()
        self.tp_size = tp_size
        self.weight = nn.Parameter(torch.full(replaced.weight.shape, torch.nan, dtype=dtype))
        bias = None if replaced.bias is None else nn.Parameter(torch.full(replaced.bias.shape, torch.nan, dtype=dtype))
        self.register_parameter("bias", bias)

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def vllm_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """As vLLM's without its cache: causal; masks are not looked at."""
    del attention_mask, kwargs
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def vllm_attention_interface():
    ALL_ATTENTION_FUNCTIONS["vllm"] = vllm_attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["vllm"]


def resolved_by_vllm(config, folder):
    """Return whether vLLM takes its Transformers backend; it has models of its own for what transformers has, here."""
    if hasattr(transformers, config.architectures[0]):
        return False
    reference = next(value for key, value in config.auto_map.items() if key.startswith("AutoModel"))
    model_class = dynamic_module_utils.get_class_from_dynamic_module(reference, folder)
    return model_class.is_backend_compatible() or model_class._can_set_attn_implementation()


def check_merging(model):
    """Refuse a model in which vLLM merges projections of which some are low-rank.

    vLLM looks at one module of each class to see if q, k and v, or gate and up, are linear layers, and then takes the
    others of the class to be the same.
    """
    linear_children = {}
    for module in model.modules():
        found = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        first = linear_children.setdefault(type(module), found)
        if not isinstance(module, nn.ModuleList) and first != found:
            raise AttributeError(f"{type(module).__name__}: {sorted(first ^ found)} are linear layers in some blocks")


def replace_linear_layers(module, dtype, tp_size):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, ReplicatedLinear(child, dtype, tp_size))
        else:
            replace_linear_layers(child, dtype, tp_size)


def fill_meta_parameters(module, dtype):
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(child, name, nn.Parameter(torch.full(parameter.shape, torch.nan, dtype=dtype)))


def checkpoint_tensors(folder):
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)


@torch.no_grad()
def load_by_name(model, folder):
    """Fill parameters and persistent buffers; return the weight of the head, which vLLM makes itself."""
    places = model.state_dict(keep_vars=True)
    head = places[next(name for name in places if name.endswith(("embed_tokens.weight", "wte.weight")))]
    loaded = set()
    for full_name, tensor in checkpoint_tensors(folder):
        if full_name == "lm_head.weight":
            head = tensor
            continue
        name = full_name.removeprefix(f"{model.base_model_prefix}.")
        assert name in places, f"There is no module or parameter named {name!r}"
        assert places[name].shape == tensor.shape
        places[name].copy_(tensor)
        loaded.add(name)
    assert loaded == places.keys()
    return head


@contextmanager
def vllm_model(folder, *, dtype=torch.float32, tp_size=1):
    """Build and load a model as vLLM's Transformers backend does; give a function from tokens to logits."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert resolved_by_vllm(config, folder)
    assert not hasattr(config, "quantization_config"), "vLLM would look for a quantisation method"
    with vllm_attention_interface():
        config._attn_implementation = "vllm"
        config.dtype = dtype
        with init_empty_weights(include_buffers=False):
            model = AutoModel.from_config(config, dtype=dtype, trust_remote_code=True)
        check_merging(model)
        replace_linear_layers(model, dtype, tp_size)
        fill_meta_parameters(model, dtype)
        head = load_by_name(model, folder)
        model.eval()

        @torch.no_grad()
        def logits(ids):
            hidden = model(
                input_ids=ids[None], use_cache=False, position_ids=torch.arange(len(ids))[None], return_dict=False
            )[0][0]
            return linear(hidden, head)

        yield logits


@pytest.mark.parametrize(("family", "storage"), CASES)
def test_a_model_built_as_vllm_does_gives_the_logits_of_the_compressed_checkpoint(exported, family, storage):
    source, remote = exported(family, storage)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(IDS[None]).logits[0]
    with vllm_model(remote) as logits:
        torch.testing.assert_close(logits(IDS), expected, rtol=1e-5, atol=1e-6)


def test_blocks_may_have_different_low_rank_layers(exported):
    source, remote = exported("llama", "factored", target_modules=NOT_THE_FIRST_BLOCK)
    expected = AutoModelForCausalLM.from_pretrained(source)
    assert {name.split(".")[2] for name in low_rank_layers(expected)} == {"1"}
    with vllm_model(remote) as logits, torch.no_grad():
        torch.testing.assert_close(logits(IDS), expected(IDS[None]).logits[0], rtol=1e-5, atol=1e-6)


def test_tied_embeddings_are_stored_under_the_name_that_vllm_fills(exported):
    _, remote = exported("qwen2", "factored")
    names = {name for name, _ in checkpoint_tensors(remote)}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_tensor_parallelism_is_refused(exported, storage):
    _, remote = exported("llama", storage)
    with (
        vllm_model(remote, tp_size=2) as logits,
        pytest.raises(RuntimeError, match="cannot be split between devices; use `tensor_parallel_size=1`"),
    ):
        logits(IDS)
    model = AutoModel.from_pretrained(remote, trust_remote_code=True)
    assert not model.tp_plan, "vLLM would cut the parts before it asks them to compute something"


# -- full-size weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "storage"), CASES)
def test_the_dense_route_gives_a_checkpoint_like_any_other(exported, tmp_path, family, storage):
    source, _ = exported(family, storage)
    expected = AutoModelForCausalLM.from_pretrained(source)
    with loading_options(dense=True):
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "dense")
    base = FAMILIES[family]()
    base.save_pretrained(tmp_path / "base")
    kept = {name: tensor.shape for name, tensor in checkpoint_tensors(tmp_path / "dense")}
    assert kept == {name: tensor.shape for name, tensor in checkpoint_tensors(tmp_path / "base")}
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["architectures"] == [type(base).__name__]
    assert not {"quantization_config", "auto_map"} & config.keys()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits_of(dense), logits_of(expected), rtol=1e-4, atol=1e-5)


# -- errors -----------------------------------------------------------------------------------------------


def test_only_a_compressed_causal_language_model_has_remote_code(exported, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"has no low-rank layers; it needs no code of its own"):
        export_remote_code(tmp_path / "base", tmp_path / "remote")
    export_compressed(trained(tiny_bert()), tmp_path / "classifier", progress_bar=False)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification.*only causal.*loading_options\(dense=True\)"):
        export_remote_code(tmp_path / "classifier", tmp_path / "remote")
    with pytest.raises(ValueError, match=r"has no config.json; give what `export_compressed` wrote"):
        export_remote_code(tmp_path, tmp_path / "remote")
    _, remote = exported("llama", "factored")
    with pytest.raises(ValueError, match=r"LowRankLlamaForCausalLM.*only causal language models"):
        export_remote_code(remote, tmp_path / "remote")
    assert not (tmp_path / "remote").exists()


def test_a_compressed_head_is_refused(tmp_path):
    model = trained(tiny_llama(), target_modules=["lm_head", "q_proj"])
    export_compressed(model, tmp_path / "compressed", progress_bar=False)
    with pytest.raises(ValueError, match=r"lm_head is compressed and outside of the base model.*`exclude_modules`"):
        export_remote_code(tmp_path / "compressed", tmp_path / "remote")


def test_a_directory_is_overwritten_only_on_demand(exported, tmp_path):
    source, _ = exported("llama", "factored")
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty.*`overwrite=True`"):
        export_remote_code(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_size_that_cannot_be_read_is_refused_before_the_model_is_loaded(exported, tmp_path, monkeypatch):
    source, _ = exported("llama", "factored")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"`max_shard_size` must be a number with KB, MB, GB or TB.*; got '5XB'"):
        export_remote_code(source, tmp_path / "remote", max_shard_size="5XB")


def test_overwriting_does_not_delete_the_checkpoint_that_is_read(exported, tmp_path):
    source, _ = exported("llama", "factored")
    shutil.copytree(source, tmp_path / "all" / "checkpoint")
    for target, holds in ((tmp_path / "all" / "checkpoint", "is"), (tmp_path / "all", "contains")):
        with pytest.raises(ValueError, match=rf"`output_dir` \S+ {holds} `checkpoint_dir` \(.*would be deleted"):
            export_remote_code(tmp_path / "all" / "checkpoint", target, overwrite=True)
    assert (tmp_path / "all" / "checkpoint" / "config.json").exists()


def test_a_damaged_checkpoint_is_not_exported(exported, tmp_path):
    source, _ = exported("llama", "factored")
    for path in Path(source).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("down.weight"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(peft_jactus.deployment.integrity.DamagedCheckpointError):
        export_remote_code(tmp_path, tmp_path / "remote")
    assert not (tmp_path / "remote").exists()
