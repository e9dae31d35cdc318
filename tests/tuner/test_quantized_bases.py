"""A model that is loaded in 8 or 4 bits is compressed as the plain one with its weights is."""

import dataclasses
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, Trainer, TrainingArguments

from peft_jactus import JactusConfig, calibrate, export_compressed, plan_ranks, rank_summary
from peft_jactus.tuner import base_weights
from tests.support.comparisons import assert_same_statistics
from tests.support.quantized_models import (
    LOADINGS,
    TASKS,
    batches,
    load,
    load_twin,
    logits_of,
    save_gguf,
    save_tiny,
    twin_of,
)

READABLE = sorted(set(LOADINGS) - {"torchao-activations"})
# torchao leaves transformers' Conv1D alone.
PAIRS = [
    ("bitsandbytes-4", "bert"),
    ("bitsandbytes-4", "gpt2"),
    ("bitsandbytes-8", "gpt2"),
    ("bitsandbytes-8", "llama"),
    ("torchao-8", "bert"),
    ("torchao-8", "llama"),
]
KINDS = ["bitsandbytes-4", "bitsandbytes-8", "torchao-8"]
# Sums in float32, in another order; the two models differ in the kernels of their products.
FLOAT32 = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in TASKS}


def config_for(family, **options):
    return JactusConfig(
        **{"target_modules": "all-linear", "task_type": TASKS[family], "retained_ratio": 0.6, "rank_multiple": 1}
        | {"adaptation_rank": 0}
        | options
    )


def calibrated(model, family, **options):
    config = config_for(family, **options)
    calibrate(model, config, batches(family), progress_bar=False)
    return config


def compressed(model, family, **options):
    return get_peft_model(model, calibrated(model, family, **options)).eval()


def relative_error(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def quantized_layers(model):
    return [name for name, parameter in model.named_parameters() if base_weights.quantization_of_tensor(parameter)]


# -- the same as the plain model with these weights -------------------------------------------------------


@pytest.mark.parametrize("loading", READABLE)
def test_statistics_are_those_of_the_dequantized_weights(loading, folders):
    model, twin = load(folders["llama"], "llama", loading), load_twin(folders["llama"], "llama", loading)
    assert quantized_layers(model)
    found, expected = (calibrated(one, "llama").statistics for one in (model, twin))
    assert_same_statistics(found, expected, rtol=FLOAT32)


@pytest.mark.parametrize("family", sorted(TASKS))
@pytest.mark.parametrize("loading", READABLE)
def test_compression_is_that_of_the_dequantized_weights(loading, family, folders):
    model, twin = load(folders[family], family, loading), load_twin(folders[family], family, loading)
    config, expected_config = (calibrated(one, family) for one in (model, twin))
    plan, expected_plan = plan_ranks(model, config), plan_ranks(twin, expected_config)
    assert plan.ranks == expected_plan.ranks
    assert plan.num_parameters == expected_plan.num_parameters
    assert (plan.num_bytes, plan.dense_bytes) == (expected_plan.num_bytes, expected_plan.dense_bytes)
    model, twin = get_peft_model(model, config).eval(), get_peft_model(twin, expected_config).eval()
    assert relative_error(logits_of(model, family), logits_of(twin, family)) <= 10 * FLOAT32
    assert str(rank_summary(model)) == str(rank_summary(twin))
    assert not quantized_layers(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("loading", KINDS)
def test_factors_have_the_dtype_of_the_model(loading, dtype, folders):
    model = compressed(load(folders["llama"], "llama", loading, dtype=dtype), "llama", adaptation_rank=2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    tensors = layer.adapter_tensors("default")
    assert {
        tensors[name].dtype for name in ("jactus_left", "jactus_frozen_factor", "jactus_right") if name in tensors
    } == {dtype}
    assert tensors["jactus_adapt_up"].dtype == torch.float32
    assert (layer.weight.dtype, tuple(layer.weight.shape)) == (dtype, (64, 64))


def with_rounded_scales(model):
    """Round as bitsandbytes does where it lays weights out anew for inference, on some CPUs."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for module in model.modules():
        if functional.has_avx512bf16() and (state := getattr(module, "quant_state", None)) is not None:
            state.absmax = state.absmax.bfloat16().float()
    return model


def test_inference_beforehand_changes_nothing(folders):
    # In that layout layers pass no gradient, and what dequantizes their weights gets them shuffled.
    folder, loading = folders["llama"], "bitsandbytes-4"
    model = load(folder, "llama", loading)
    twin = twin_of(with_rounded_scales(load(folder, "llama", loading)), folder, "llama")
    logits_of(model, "llama")
    found, expected = (calibrated(one, "llama").statistics for one in (model, twin))
    assert_same_statistics(found, expected, rtol=FLOAT32)
    logits_of(model, "llama")
    config = config_for("llama", decomposition="svd", target_modules=["down_proj"])
    found, expected = (get_peft_model(one, dataclasses.replace(config)).eval() for one in (model, twin))
    weights = (
        one.base_model.model.model.layers[1].mlp.down_proj.get_dense_weight("default") for one in (found, expected)
    )
    assert relative_error(*weights) <= FLOAT32
    # The kernel of that layout computes in bfloat16.
    assert relative_error(logits_of(found, "llama"), logits_of(expected, "llama")) <= 0.02


def test_looking_at_ranks_leaves_a_model_as_it_was_that_ran_beforehand(folders):
    model = load(folders["llama"], "llama", "bitsandbytes-4")
    expected = logits_of(model, "llama")
    plan_ranks(model, config_for("llama", target_modules=["q_proj"], decomposition="svd"), progress_bar=False)
    assert relative_error(logits_of(model, "llama"), expected) <= FLOAT32


@pytest.mark.parametrize("loading", KINDS)
def test_the_quantized_weights_are_let_go(loading, folders):
    model = load(folders["llama"], "llama", loading)
    config = calibrated(model, "llama")
    held = [module for module in model.modules() if base_weights.quantization_of(module) is not None]
    weights = weakref.WeakSet(module.weight for module in held)
    codes = weakref.WeakSet(module.state.CB for module in held if hasattr(module, "state"))
    get_peft_model(model, config)
    assert held
    assert not weights
    assert not codes


def test_calibration_leaves_the_model_as_it_was(folders):
    model = load(folders["llama"], "llama", "bitsandbytes-4")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    calibrated(model, "llama")
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("loading", ["bitsandbytes-4", "bitsandbytes-8"])
def test_weights_are_dequantized_one_at_a_time(loading, folders, monkeypatch):
    model = load(folders["llama"], "llama", loading)
    config = calibrated(model, "llama")
    alive, most = weakref.WeakSet(), 0
    dequantize = base_weights.dequantize_bnb_weight

    def counted(*args, **kwargs):
        nonlocal most
        weight = dequantize(*args, **kwargs)
        alive.add(weight.untyped_storage())
        most = max(most, len(alive))
        return weight

    monkeypatch.setattr(base_weights, "dequantize_bnb_weight", counted)
    get_peft_model(model, config)
    assert 1 <= most <= 2


# -- saving, merging, exporting ---------------------------------------------------------------------------


def trained(model, family):
    """Change what trains, as training does, and check that all of it has a gradient."""
    model.train()
    model(**batches(family)[0]).loss.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert parameters
    assert all(parameter.grad is not None for parameter in parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.1 * parameter.grad / (parameter.grad.norm() + 1e-6)
    return model.eval()


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("loading", KINDS)
def test_an_adapter_is_loaded_onto_the_quantized_base(loading, family, folders, tmp_path):
    targets = ["query", "q_proj"]  # the others stay quantized
    model = trained(compressed(load(folders[family], family, loading), family, target_modules=targets), family)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folders[family], family, loading), tmp_path).eval()
    assert quantized_layers(again)
    assert relative_error(logits_of(again, family), logits_of(model, family)) <= FLOAT32


@pytest.mark.parametrize("targets", ["all-linear", ["query", "c_attn", "q_proj"]], ids=["all", "some"])
@pytest.mark.parametrize(("loading", "family"), PAIRS)
def test_an_export_is_an_ordinary_compressed_checkpoint(loading, family, targets, folders, tmp_path):
    model = trained(compressed(load(folders[family], family, loading), family, target_modules=targets), family)
    still_quantized = quantized_layers(model)
    assert bool(still_quantized) == (targets != "all-linear")
    # What these layers compute, without the kernels' rounding of activations.
    twin = load_twin(folders[family], family, loading)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(PeftModel.from_pretrained(twin, tmp_path / "adapter").eval(), family)
    export_compressed(model, tmp_path / "export", progress_bar=False)
    assert quantized_layers(model) == still_quantized
    config = AutoConfig.from_pretrained(tmp_path / "export")
    assert config.quantization_config["quant_method"] == "jactus"
    exported = load(tmp_path / "export", family)
    assert not quantized_layers(exported)
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.float32}
    assert relative_error(logits_of(exported, family), expected) <= 10 * FLOAT32


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("loading", KINDS)
def test_a_checkpoint_that_is_quantized_on_the_disk(loading, family, folders, tmp_path):
    load(folders[family], family, loading).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base", family)
    assert quantized_layers(base)
    model = trained(compressed(base, family, target_modules=["query", "q_proj"]), family)
    expected = logits_of(model.train(), family)
    export_compressed(model, tmp_path / "export", progress_bar=False)
    exported = load(tmp_path / "export", family)
    assert not quantized_layers(exported)
    assert relative_error(logits_of(exported, family), expected) <= 10 * FLOAT32
    exported.save_pretrained(tmp_path / "again")
    assert relative_error(logits_of(load(tmp_path / "again", family), family), expected) <= 10 * FLOAT32


@pytest.mark.parametrize("targets", ["all-linear", ["query", "c_attn", "q_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("keep_base_weights", [False, True])
@pytest.mark.parametrize(("loading", "family"), PAIRS)
def test_a_merged_model_is_saved_and_loaded(loading, family, keep_base_weights, targets, folders, tmp_path):
    options = {"target_modules": targets, "keep_base_weights": keep_base_weights}
    model = trained(compressed(load(folders[family], family, loading), family, **options), family)
    expected = logits_of(model.train(), family)  # bitsandbytes rounds scales for inference, on some CPUs
    merged = model.merge_and_unload()
    assert relative_error(logits_of(merged, family), expected) <= FLOAT32
    merged.save_pretrained(tmp_path)
    again = load(tmp_path, family).train()
    assert bool(quantized_layers(again)) == (targets != "all-linear")
    assert hasattr(again.config, "quantization_config") == (targets != "all-linear")
    assert relative_error(logits_of(again, family), expected) <= FLOAT32


@pytest.mark.parametrize(("loading", "family"), PAIRS)
def test_a_quantized_base_that_is_kept_comes_back(loading, family, folders):
    base = load(folders[family], family, loading)
    config = calibrated(base, family, keep_base_weights=True)
    dense = logits_of(base, family)
    model = get_peft_model(base, config).eval()
    adapted = logits_of(model, family)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, family), dense)
    for _ in range(2):
        model.merge_adapter()
        assert relative_error(logits_of(model, family), adapted) <= FLOAT32
        model.unmerge_adapter()
        assert torch.equal(logits_of(model, family), adapted)
    assert torch.equal(logits_of(model.unload(), family), dense)
    assert base.is_quantized


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("loading", KINDS)
def test_two_adapters_merge_into_a_quantized_base(loading, family, folders):
    model, twin = load(folders[family], family, loading), load_twin(folders[family], family, loading)
    merged = []
    for one in (model, twin):
        config = config_for(family, decomposition="svd", keep_base_weights=True)
        adapted = get_peft_model(one, config)
        adapted.add_adapter("other", dataclasses.replace(config, retained_ratio=0.3, layer_ranks={}))
        adapted.merge_adapter(["default", "other"])
        layer = next(module for module in adapted.modules() if hasattr(module, "get_delta_weight"))
        merged.append((layer.get_delta_weight("other"), logits_of(adapted.eval(), family)))
    (delta, found), (expected_delta, expected) = merged
    assert relative_error(delta, expected_delta) <= FLOAT32
    assert relative_error(found, expected) <= 10 * FLOAT32


def test_a_model_that_is_not_quantized_any_more_does_not_say_so(folders):
    base = load(folders["llama"], "llama", "bitsandbytes-4")
    compressed(base, "llama")
    assert not getattr(base, "is_quantized", False)
    assert not hasattr(base, "hf_quantizer")
    assert not hasattr(base.config, "quantization_config")


# -- GGUF ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    return save_gguf(tmp_path_factory.mktemp("gguf"))


def load_gguf(folder):
    return load(folder, "llama", gguf_file="model.gguf")


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks for config.json
def test_a_gguf_model_is_exported_and_loaded(gguf_folder, tmp_path):
    model = trained(compressed(load_gguf(gguf_folder), "llama"), "llama")
    expected = logits_of(model, "llama")
    export_compressed(model, tmp_path / "export", progress_bar=False)
    assert AutoConfig.from_pretrained(tmp_path / "export").quantization_config["quant_method"] == "jactus"
    assert relative_error(logits_of(load(tmp_path / "export", "llama"), "llama"), expected) <= FLOAT32
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_gguf(gguf_folder), tmp_path / "adapter").eval()
    assert relative_error(logits_of(again, "llama"), expected) <= FLOAT32


def test_a_merged_gguf_model_is_saved_which_the_base_cannot_be(gguf_folder, tmp_path):
    base = load_gguf(gguf_folder)
    if getattr(base, "is_quantized", False):
        with pytest.raises(ValueError, match="not serializable"):
            base.save_pretrained(tmp_path)
    model = trained(compressed(base, "llama"), "llama")
    expected = logits_of(model, "llama")
    model.merge_and_unload().save_pretrained(tmp_path)
    assert relative_error(logits_of(load(tmp_path, "llama"), "llama"), expected) <= FLOAT32


@pytest.mark.parametrize("loading", ["gguf", "torchao-4"])
def test_the_trainer_takes_what_it_refuses_to_train_quantized(loading, gguf_folder, folders, tmp_path):
    base = load_gguf(gguf_folder) if loading == "gguf" else load(folders["llama"], "llama", loading)
    model = compressed(base, "llama")
    before = logits_of(model, "llama")
    rows = [
        dict(zip(batch, rows, strict=True)) for batch in batches("llama") for rows in zip(*batch.values(), strict=True)
    ]
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=0.1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, settings, train_dataset=rows).train()
    assert not torch.equal(logits_of(model.eval(), "llama"), before)


# -- what is refused --------------------------------------------------------------------------------------


def unread():
    pytest.fail("a batch was read")
    yield


def test_layers_that_lose_their_gradient(folders):
    model = load(folders["llama"], "llama", "torchao-activations")
    with pytest.raises(TypeError, match=r"layers\.0\.self_attn\.q_proj.*gradient.*`WeightOnly`"):
        calibrate(model, config_for("llama"), unread(), progress_bar=False)


@pytest.mark.parametrize("act", ["calibrate", "compress", "load"])
def test_a_quantized_head(act, folders, tmp_path):
    compressed(load(folders["bert"], "bert", "bitsandbytes-8"), "bert").save_pretrained(tmp_path)
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    model = AutoModelForSequenceClassification.from_pretrained(
        folders["bert"], quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    acts = {
        "calibrate": lambda: calibrate(model, config_for("bert"), unread(), progress_bar=False),
        "compress": lambda: get_peft_model(model, config_for("bert", decomposition="svd")),
        "load": lambda: PeftModel.from_pretrained(model, tmp_path),
    }
    with pytest.raises(TypeError, match=r"classifier would be trained whole.*`llm_int8_skip_modules`"):
        acts[act]()


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_float8_weights_of_transformers(targets, folders):
    model = load(folders["llama"], "llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"layers\.0\.self_attn\.q_proj is quantized \(Linear\), and its"):
        calibrate(model, config_for("llama", target_modules=targets), unread(), progress_bar=False)


class Quantizer:
    def __init__(self, method):
        self.quantization_config = type("Config", (), {"quant_method": method})()


class GgufLinear(nn.Linear):
    """Named as the layer that transformers puts in for blocks."""


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "gguf"])
def test_other_methods(method, folders):
    model = load(folders["llama"], "llama")
    model.hf_quantizer = Quantizer(method)
    remedy = "dequantize=True"
    if method == "gguf":
        model.model.layers[0].self_attn.q_proj = GgufLinear(64, 64)
        remedy = r"GgufConfig\(dequantize=True\)"
    for act in (
        lambda config: calibrate(model, config, unread(), progress_bar=False),
        lambda config: get_peft_model(model, config),
    ):
        with pytest.raises(TypeError, match=rf"^LlamaForCausalLM .*{remedy}"):
            act(config_for("llama", decomposition="svd"))
    assert type(model.model.layers[1].self_attn.q_proj) is nn.Linear


def test_an_export_of_weights_that_cannot_be_read(folders, tmp_path):
    model = get_peft_model(
        load(folders["llama"], "llama"), config_for("llama", target_modules=["q_proj"], decomposition="svd")
    )
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        export_compressed(model, tmp_path / "export", progress_bar=False)
    assert not (tmp_path / "export").exists()
