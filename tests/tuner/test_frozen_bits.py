"""Training beside what is frozen in 8 or 4 bits a number, through PEFT's API: codes stay codes, products are right."""

import contextlib
import copy
import shutil
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_jactus import JactusConfig, NumericalWarning, export_compressed, rank_summary
from peft_jactus.deployment.ranks import summary_of_adapter
from peft_jactus.numerics.frozen_weight import RoundedWeight
from peft_jactus.tuner.adapter_format import FROZEN, frozen_weight_in
from peft_jactus.tuner.layer import JactusLayer
from tests.support.compressed_models import (
    batches_for,
    calibrated,
    compressed,
    jactus_config,
    logits_of,
    perturb_cores_,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    trained,
)

pytest.importorskip("bitsandbytes")
BITS = [8, 4]
BUILDERS = [tiny_bert, tiny_llama, tiny_gpt2]
ADAPTING = {"adaptation_rank": 3, "retained_ratio": 0.8}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
WEIGHTS = "adapter_model.safetensors"
# Of the logits of tiny random models: 0.005 and 0.02 to 0.07.
ERRORS = {8: 0.01, 4: 0.1}


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, JactusLayer)}


def rounded_weights(model, adapter_name="default"):
    """Return what is frozen of each layer."""
    found = {
        name: frozen_weight_in(layer.adapter_tensors(adapter_name), layer.adapter_shapes[adapter_name])
        for name, layer in layers_of(model).items()
    }
    assert all(isinstance(weight, RoundedWeight) for weight in found.values())
    return found


def with_numbers(model, make, **fields):
    """Return a model whose frozen weights are the numbers that the codes of ``model`` stand for."""
    twin = compressed(make, **fields)
    for name, weight in rounded_weights(model).items():
        numbers = weight.numbers()
        tensors = layers_of(twin)[name].adapter_tensors("default")
        tensors["jactus_frozen_factor"].copy_(numbers.factor)
        tensors["jactus_left" if numbers.by_rows else "jactus_right"].copy_(numbers.basis.coefficients)
    with torch.no_grad():
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.copy_(own)
    return twin


def gradients_of(model):
    model.zero_grad()
    model(**batches_for(model.get_base_model())[0]).loss.backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad}


def relative_error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# -- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_training_moves_what_trains_and_nothing_else(bits, dtype):
    model = compressed(tiny_llama(dtype=dtype), **ADAPTING, frozen_bits=bits).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = sum(model(**batch).loss for batch in batches_for(model.get_base_model()))
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.98 * losses[0]
    moved = {name.split(".")[-2] for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert moved == {"jactus_adapt_down", "jactus_adapt_up"}


@pytest.mark.parametrize("space", ["free", "retained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("make", BUILDERS)
def test_outputs_and_gradients_are_those_of_the_numbers_that_the_codes_stand_for(make, bits, dtype, space):
    fields = ADAPTING | {"adaptation_space": space}
    model = trained(make(dtype=dtype), **fields, frozen_bits=bits)
    twin = with_numbers(model, make(dtype=dtype), **fields)
    # Numbers that codes stand for have another layout, in which lengths of columns add up in another order.
    tolerance = {"rtol": 0, "atol": 0} if space == "free" or dtype == torch.bfloat16 else FLOAT32
    torch.testing.assert_close(logits_of(model), logits_of(twin), **tolerance)
    expected = gradients_of(twin)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name], **tolerance, msg=name)


@pytest.mark.parametrize("bits", BITS)
def test_under_autocast_they_are_too(bits):
    model = trained(tiny_llama(), **ADAPTING, frozen_bits=bits)
    twin = with_numbers(model, tiny_llama(), **ADAPTING)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(model), logits_of(twin))
        found, expected = gradients_of(model), gradients_of(twin)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layer_name", ["q_proj", "gate_proj"])  # held by rows, and by columns
@pytest.mark.parametrize("space", ["free", "retained"])
def test_nothing_is_kept_for_the_gradient_but_codes_and_inputs(space, layer_name, bits, dtype, compiled):
    model = compressed(tiny_llama(dtype=dtype), **ADAPTING, frozen_bits=bits, adaptation_space=space)
    layer = next(layer for name, layer in layers_of(model).items() if name.endswith(layer_name))
    own = {tensor.data_ptr() for tensor in layer.adapter_tensors("default").values()}
    own_shapes = {tuple(layer.adapter_tensors("default")[f"jactus_adapt_{side}"].shape) for side in ("down", "up")}
    rows, kept = 5, []
    x = torch.randn(rows, layer.in_features, dtype=dtype, requires_grad=True)
    if compiled:
        torch._dynamo.reset()
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(x)
    assert output.requires_grad
    held = [tensor for tensor in kept if tensor.data_ptr() not in own]
    # Compiled, what trains is cast once.
    shapes = {tuple(tensor.shape) for tensor in held} - (own_shapes if compiled else set())
    seen = set() if compiled and space == "retained" else {(rows, 3)}  # there it is made once more
    assert shapes == {tuple(x.shape)} | seen
    assert any(tensor.dtype in (torch.int8, torch.uint8) for tensor in kept)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("bits", BITS)
def test_gradient_checkpointing_changes_no_gradient(bits):
    found = []
    for checkpointing in (False, True):
        model = trained(tiny_bert(), **ADAPTING, frozen_bits=bits).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients_of(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_torch_compile_needs_no_graph_break(bits, dtype):
    torch._dynamo.reset()
    model = trained(tiny_bert(dtype=dtype), **ADAPTING, frozen_bits=bits)
    batch = batches_for(model.get_base_model())[0]
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    tolerance = FLOAT32 if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(compiled(**batch).logits, logits_of(model), **tolerance)
    expected = gradients_of(model)
    model.zero_grad()
    compiled(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], **tolerance)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layer_name", ["q_proj", "gate_proj"])  # held by rows, and by columns
def test_what_torch_compile_makes_of_the_retained_space_trains(layer_name, bits):
    torch._dynamo.reset()
    model = trained(tiny_llama(), **ADAPTING, frozen_bits=bits, adaptation_space="retained")
    layer = next(layer for name, layer in layers_of(model).items() if name.endswith(layer_name))
    x = torch.randn(5, layer.in_features)
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        model.zero_grad()
        run(x).square().sum().backward()
        found.append([tensor.grad for tensor in layer.parameters() if tensor.requires_grad])
    assert len(found[0]) == 2
    torch.testing.assert_close(found[1], found[0], **FLOAT32)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_layer_can_be_traced_by_torch_export(bits, strict):
    layer = next(iter(layers_of(trained(tiny_llama(), **ADAPTING, frozen_bits=bits)).values()))
    x = torch.randn(3, layer.in_features)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), layer(x), **FLOAT32)


# -- what is held -----------------------------------------------------------------------------------------


def frozen_bytes(model):
    """Return the bytes of codes, or numbers, and of scales."""
    tensors = [(name.split(".")[-2], tensor) for name, tensor in model.named_buffers() if ".jactus_" in name]
    scales = sum(tensor.nbytes for name, tensor in tensors if name.endswith("_scale"))
    return sum(tensor.nbytes for name, tensor in tensors if name in FROZEN), scales


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("make", BUILDERS)
def test_what_is_frozen_takes_a_half_or_a_quarter_of_sixteen_bits_and_scales(make, bits):
    in_full = compressed(make(dtype=torch.bfloat16), **ADAPTING)
    model = compressed(make(dtype=torch.bfloat16), **ADAPTING, frozen_bits=bits)
    numbers, none = frozen_bytes(in_full)
    codes, scales = frozen_bytes(model)
    assert none == 0
    assert numbers * bits / 16 <= codes <= numbers * bits / 16 + 2 * len(layers_of(model))
    assert numbers / 64 <= scales <= numbers / 64 + 2 * 2 * len(layers_of(model))
    assert rank_summary(model) == rank_summary(in_full)
    assert model.get_nb_trainable_parameters() == in_full.get_nb_trainable_parameters()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("make", BUILDERS)
def test_outputs_are_near_those_of_the_models_dtype(make, bits):
    expected = logits_of(trained(make(), **ADAPTING))
    assert relative_error(logits_of(trained(make(), **ADAPTING, frozen_bits=bits)), expected) < ERRORS[bits]


# Inputs of the Llama, behind its norms of random weights, are hardly correlated.
@pytest.mark.parametrize(("make", "share"), [(tiny_bert, 0.5), (tiny_llama, 0.85)])
def test_four_bits_are_rounded_by_what_the_layers_see(make, share):
    model = make()
    config = calibrated(model, **ADAPTING, frozen_bits=4)
    statistics = config.statistics
    in_full = layers_of(get_peft_model(make(), calibrated(make(), **ADAPTING)))
    by_statistics, by_itself = 0.0, 0.0
    for name, weight in rounded_weights(get_peft_model(model, config)).items():
        tensors = in_full[name].adapter_tensors("default")
        numbers = frozen_weight_in(tensors, in_full[name].adapter_shapes["default"])
        C = statistics[name.removeprefix("base_model.model.")].input.covariance
        by_statistics += output_error(weight, numbers, C)
        by_itself += output_error(numbers.rounded(4, dtype=torch.float32, second_moment=None), numbers, C)
    assert by_statistics < share * by_itself


def output_error(rounded, numbers, second_moment):
    """Return the mean square of what rounding changes in a layer's outputs, over that of the outputs."""
    found, expected = (
        left.double() @ right.double().mT for left, right in (rounded.numbers().sides(), numbers.sides())
    )
    error = found - expected
    return float((error @ second_moment @ error.mT).trace() / (expected @ second_moment @ expected.mT).trace())


@pytest.mark.parametrize("bits", BITS)
def test_layers_of_full_rank_and_layers_whose_core_has_to_train_work(bits):
    ranks = {"layers.0.self_attn.q_proj": 32, "layers.0.mlp.gate_proj": 32, "layers.0.mlp.down_proj": 32}
    ranks |= {"layers.1.self_attn.q_proj": 1}
    model = trained(tiny_llama(), adaptation_rank=3, rank_pattern=ranks, frozen_bits=bits)
    shapes = {name: layer.adapter_shapes["default"] for name, layer in layers_of(model).items()}
    for name, rank in ranks.items():
        shape = shapes[f"base_model.model.model.{name}"]
        assert (shape.core_trains, shape.frozen_bits) == ((True, None) if rank == 1 else (False, bits))
    assert all(gradient.abs().max() > 0 for gradient in gradients_of(model).values())
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, **FLOAT32)


@pytest.mark.filterwarnings("ignore:`frozen_bits`=4 with `decomposition`='svd'")
@pytest.mark.parametrize("bits", BITS)
def test_a_weight_of_zeros_stays_one(bits):
    model = tiny_llama()
    torch.nn.init.zeros_(model.model.layers[0].mlp.gate_proj.weight)
    fields = {**ADAPTING, "frozen_bits": bits, "rank_pattern": {r".*layers\.0\.mlp\.gate_proj": 9}}
    model = get_peft_model(model, jactus_config(model, decomposition="svd", **fields))
    layer = next(layer for name, layer in layers_of(model).items() if name.endswith("0.mlp.gate_proj"))
    assert not layer.get_dense_weight("default").any()


@pytest.mark.parametrize("bits", BITS)
def test_a_start_without_data_needs_no_statistics(bits):
    options = {**ADAPTING, "decomposition": "svd", "frozen_bits": bits}
    in_full = get_peft_model(tiny_llama(), jactus_config(tiny_llama(), **{**options, "frozen_bits": None})).eval()
    rounds_blindly = pytest.warns(NumericalWarning, match="independently") if bits == 4 else contextlib.nullcontext()
    with rounds_blindly:
        model = get_peft_model(tiny_llama(), jactus_config(tiny_llama(), **options)).eval()
    assert relative_error(logits_of(model), logits_of(in_full)) < 2 * ERRORS[bits]


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.bfloat16), lambda model: model.half()])
@pytest.mark.parametrize("bits", BITS)
def test_casts_change_scales_and_no_codes(bits, cast):
    model = trained(tiny_llama(), **ADAPTING, frozen_bits=bits)
    before = rounded_weights(model)
    cast(model)
    for name, weight in rounded_weights(model).items():
        assert torch.equal(weight.factor, before[name].factor)
        assert torch.equal(weight.coefficients, before[name].coefficients)
        assert weight.factor_scales.dtype == weight.coefficient_scales.dtype == model.dtype
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_only_what_trains_is_cast_on_loading(autocast_adapter_dtype, tmp_path):
    trained(tiny_llama(dtype=torch.bfloat16), **ADAPTING, frozen_bits=4).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama(dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype
    )
    trains = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    for layer in layers_of(loaded).values():
        tensors = layer.adapter_tensors("default")
        assert tensors["jactus_frozen_factor"].dtype == torch.uint8
        assert tensors["jactus_frozen_factor_scale"].dtype == torch.bfloat16
        assert tensors["jactus_adapt_up"].dtype == trains


# -- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("make", BUILDERS)
def test_a_trained_adapter_comes_back_bit_for_bit(make, bits, tmp_path):
    model = trained(make(), **ADAPTING, frozen_bits=bits)
    model.save_pretrained(tmp_path)
    saved = JactusConfig.from_pretrained(tmp_path)
    assert (saved.frozen_bits, saved.adapter_format) == (bits, 3)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert rank_summary(loaded) == rank_summary(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    assert summary_of_adapter(saved, shapes).rows == sorted(rank_summary(model).rows, key=lambda row: row.name)


def test_other_adapters_are_saved_as_before(tmp_path):
    compressed(tiny_llama(), **ADAPTING).save_pretrained(tmp_path)
    assert JactusConfig.from_pretrained(tmp_path).adapter_format == 2
    assert not [name for name in load_file(tmp_path / WEIGHTS) if name.endswith("_scale")]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["jactus_right", "jactus_right_scale", "jactus_frozen_factor", "jactus_left_scale"])
def test_a_tensor_that_transformers_does_not_fill_raises_where_it_is_needed(tmp_path, name, bits):
    tiny_llama().save_pretrained(tmp_path / "base")
    trained(tiny_llama(), **ADAPTING, frozen_bits=bits).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    del tensors[next(key for key in tensors if key.endswith(name) and tensors[key].numel())]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="the checkpoint must hold"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    base.load_adapter(str(tmp_path / "adapter"))
    with pytest.raises(RuntimeError, match=f"`{name}` of adapter 'default' was never filled"):
        logits_of(base)


@pytest.mark.parametrize("bits", BITS)
def test_a_state_dict_of_other_ranks_changes_those_of_the_model(bits):
    model = compressed(tiny_llama(), **ADAPTING, frozen_bits=bits)
    other = trained(tiny_llama(), adaptation_rank=3, retained_ratio=0.5, frozen_bits=bits)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert model.peft_config["default"].layer_ranks == other.peft_config["default"].layer_ranks
    assert torch.equal(logits_of(model), logits_of(other))


@pytest.mark.parametrize(("own", "others"), [(8, 4), (4, 8), (8, None), (None, 8)])
def test_a_state_dict_of_other_bits_is_refused(own, others):
    model = compressed(tiny_llama(), **ADAPTING, frozen_bits=own)
    expected = logits_of(model)
    state = get_peft_model_state_dict(compressed(tiny_llama(), **ADAPTING, frozen_bits=others))
    with pytest.raises(ValueError, match=r"the checkpoint (must hold|has)"):
        set_peft_model_state_dict(model, state)
    assert torch.equal(logits_of(model), expected)


# -- merging, exporting, several adapters --------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("make", BUILDERS)
def test_export_and_merge_hold_what_was_learned(make, bits, tmp_path):
    model = trained(make(), **ADAPTING, frozen_bits=bits)
    expected = logits_of(model)
    auto = AutoModelForSequenceClassification if make is tiny_bert else AutoModelForCausalLM
    folder = export_compressed(model, tmp_path / "plain", progress_bar=False)
    torch.testing.assert_close(logits_of(auto.from_pretrained(folder)), expected, **FLOAT32)
    folder = export_compressed(model, tmp_path / "rounded", bits=8, progress_bar=False)
    assert relative_error(logits_of(auto.from_pretrained(folder)), expected) < ERRORS[8]
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, **FLOAT32)


@pytest.mark.parametrize("bits", BITS)
def test_exported_in_as_few_bits_it_stays_near(bits, tmp_path):
    config = calibrated(model := tiny_llama(), **ADAPTING, frozen_bits=bits)
    statistics = config.statistics
    model = get_peft_model(model, config).eval()
    perturb_cores_(model)
    folder = export_compressed(model, tmp_path / "rounded", bits=bits, statistics=statistics, progress_bar=False)
    small = AutoModelForCausalLM.from_pretrained(folder)
    assert relative_error(logits_of(small), logits_of(model)) < 2 * ERRORS[bits]


@pytest.mark.parametrize("bits", BITS)
def test_with_base_weights_it_merges_unmerges_disables_and_unloads(bits):
    base = tiny_gpt2()
    dense = logits_of(base)
    model = trained(base, **ADAPTING, frozen_bits=bits, keep_base_weights=True)
    expected = logits_of(model)
    for layer in layers_of(model).values():
        delta = layer.get_delta_weight("default")
        torch.testing.assert_close(layer.get_base_layer().weight + delta, layer.get_dense_weight("default"))
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model), expected, **FLOAT32)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), dense)
    assert torch.equal(logits_of(model.unload()), dense)


def test_adapters_of_different_bits_live_in_one_model(tmp_path):
    model = trained(tiny_llama(), **ADAPTING, keep_base_weights=True)
    expected = {"default": logits_of(model)}
    for bits in BITS:
        model.add_adapter(f"in-{bits}", calibrated(model, **ADAPTING, frozen_bits=bits, keep_base_weights=True))
        model.set_adapter(f"in-{bits}")
        expected[f"in-{bits}"] = logits_of(model)
    assert len({float(logits.sum()) for logits in expected.values()}) == 3
    model.save_pretrained(tmp_path)
    for name, logits in expected.items():
        model.set_adapter(name)
        assert torch.equal(logits_of(model), logits)
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "in-4", adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(logits_of(model), expected["in-4"])


@pytest.mark.parametrize("bits", BITS)
def test_a_copy_shares_codes_and_trains_its_own_ranks(bits):
    model = trained(tiny_llama(), **ADAPTING, frozen_bits=bits)
    expected = logits_of(model)
    model.add_adapter("ref", model.peft_config["default"])
    for layer in layers_of(model).values():
        own, copied = layer.adapter_tensors("default"), layer.adapter_tensors("ref")
        assert copied["jactus_frozen_factor"] is own["jactus_frozen_factor"]
        assert copied["jactus_adapt_up"] is not own["jactus_adapt_up"]
    perturb_cores_(model)
    model.set_adapter("ref")
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(copy.deepcopy(model)), expected)


@pytest.mark.parametrize("bits", BITS)
def test_codes_stay_buffers_where_numbers_would_be_sharded(bits):
    model = trained(tiny_llama(), **ADAPTING, frozen_bits=bits)
    names = {name for name, _ in model.named_parameters()}
    expected = logits_of(model)
    model.make_shardable()
    assert {name for name, _ in model.named_parameters()} == names
    assert torch.equal(logits_of(model), expected)


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 2, 16, 8.0, True, "4"], ids=repr)
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"^`frozen_bits` must be one of \(8, 4\), or None; got"):
        JactusConfig(frozen_bits=bits)


@pytest.mark.parametrize(
    ("option", "named"), [({"adaptation_rank": 0}, "rank`=0"), ({"train_core": True}, "core`=True")]
)
def test_cores_that_train_are_refused(option, named):
    with pytest.raises(ValueError, match=rf"^`frozen_bits`=8 cannot be used with .*{named}.*Train only adaptation"):
        JactusConfig(frozen_bits=8, **option)


def test_four_bits_say_what_is_missing_before_any_work(monkeypatch, tmp_path):
    trained(tiny_llama(), **ADAPTING, frozen_bits=4).save_pretrained(tmp_path)
    config = calibrated(model := tiny_llama(), **ADAPTING, frozen_bits=4)
    modules = dict(model.named_modules())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for make in (lambda: get_peft_model(model, config), lambda: PeftModel.from_pretrained(model, tmp_path)):
        with pytest.raises(ImportError, match="4 bits need bitsandbytes: `pip install bitsandbytes`"):
            make()
        assert dict(model.named_modules()) == modules
    assert config.statistics is not None
