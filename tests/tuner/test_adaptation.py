"""Adaptation ranks through PEFT's API: what trains, what is paid from the budget, and that nothing loses them."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_jactus import CalibrationStatistics, JactusConfig, calibrate, export_compressed, plan_ranks, rank_summary
from peft_jactus.errors import NumericalWarning
from peft_jactus.numerics.adaptation import ROW_LENGTH
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
)

ADAPTING = {"adaptation_rank": 3, "retained_ratio": 0.8}
RETAINED = ADAPTING | {"adaptation_space": "retained"}
BUILDERS = [tiny_bert, tiny_llama, tiny_gpt2]
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, JactusLayer)}


def trainable(model):
    return {
        name.split(".")[-2] for name, tensor in model.named_parameters() if tensor.requires_grad and "jactus" in name
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"adaptation_rank": 0}, {"jactus_core"}),
        ({"adaptation_rank": 3}, {"jactus_adapt_down", "jactus_adapt_up"}),
        ({"adaptation_rank": 3, "train_core": True}, {"jactus_core", "jactus_adapt_down", "jactus_adapt_up"}),
    ],
)
def test_what_trains_is_as_the_config_says(fields, expected):
    assert trainable(compressed(tiny_llama(), **fields)) == expected


@pytest.mark.parametrize("make", BUILDERS)
def test_in_the_retained_space_all_ranks_compress_and_nothing_is_paid(make):
    plain = compressed(make(), adaptation_rank=0, retained_ratio=0.8)
    model = compressed(make(), **RETAINED)
    assert rank_summary(model) == rank_summary(plain)
    torch.testing.assert_close(logits_of(model), logits_of(plain), **FLOAT32)
    assert trainable(model) == {"jactus_adapt_down", "jactus_adapt_up"}
    perturb_cores_(model)
    for layer in layers_of(model).values():
        shape = layer.adapter_shapes["default"]
        assert torch.linalg.matrix_rank(layer.get_factors("default").dense()) <= layer.r["default"]
        if layer.r["default"] < min(layer.in_features, layer.out_features):
            assert (shape.space, shape.core_rank) == ("retained", layer.r["default"])
        else:  # a layer that stays dense has them for nothing
            assert shape.space == "free"


@pytest.mark.parametrize("init", ["gradient", "inputs", "random"])
@pytest.mark.parametrize("make", BUILDERS)
def test_adaptation_ranks_change_nothing_at_the_start(make, init):
    model = compressed(make(), **ADAPTING, adaptation_init=init)
    for layer in layers_of(model).values():
        weight = layer.get_factors("default")
        assert weight.down.shape[0] == weight.up.shape[1] == layer.adapter_shapes["default"].adaptation_rank > 0
        assert torch.equal(weight.dense(), weight.compressed())


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_they_are_paid_from_the_budget(storage):
    model = tiny_llama()
    config = calibrated(model, **ADAPTING, storage=storage)
    planned = plan_ranks(model, config, progress_bar=False)
    tuned = get_peft_model(model, config)
    summary = rank_summary(tuned)
    assert planned.summary == summary
    assert 0.7 < summary.retained_ratio <= 0.8
    for row in summary.rows:
        shape = layers_of(tuned)[f"base_model.model.{row.name}"].adapter_shapes["default"]
        dense = row.rank == min(row.out_features, row.in_features)
        adapting = min(3, row.rank // 2)  # half at most
        assert (shape.core_rank, shape.adaptation_rank) == (row.rank if dense else row.rank - adapting, adapting)


def test_they_start_along_the_gradient_of_the_weight():
    model = tiny_llama(dtype=torch.float64)
    batches = batches_for(model)
    config = jactus_config(model, **ADAPTING)
    calibrate(model, config, batches, progress_bar=False)
    gradients = weight_gradients(copy.deepcopy(model), batches)
    shares = []
    for name, layer in layers_of(get_peft_model(model, config)).items():
        down = unit_rows_of(layer)
        torch.testing.assert_close(down @ down.mT, torch.eye(len(down)).double(), rtol=0, atol=1e-5)
        G = gradients[name.removeprefix("base_model.model.")]
        held = (G @ down.mT).square().sum()
        shares.append(float(held / torch.linalg.svdvals(G)[: len(down)].square().sum()))
    # A sketch sees a flat spectrum less well: 0.8 of it in tests/numerics/test_sketches.py.
    assert min(shares) > 0.8
    assert sum(shares) / len(shares) > 0.93


def unit_rows_of(layer):
    """Return the directions in which the adaptation ranks of a layer read its inputs, ``(adaptation rank, in)``."""
    return torch.nn.functional.normalize(layer.adapter_tensors("default")["jactus_adapt_down"].detach().double())


def weight_gradients(model, batches):
    """Return the gradient of the loss, summed over labels, with respect to each linear layer's weight."""
    for batch in batches:
        num_labels = int((batch["labels"][:, 1:] != -100).sum())
        (model(**batch).loss * num_labels).backward()
    return {name: module.weight.grad for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def test_they_start_along_the_inputs_if_asked():
    model = tiny_llama(dtype=torch.float64)
    config = calibrated(model, **ADAPTING, adaptation_init="inputs")
    statistics = config.statistics
    for name, layer in layers_of(get_peft_model(model, config)).items():
        down = unit_rows_of(layer)
        covariance = statistics[name.removeprefix("base_model.model.")].input.covariance
        best = torch.linalg.eigvalsh(covariance)[-len(down) :].sum()
        assert float((down @ covariance @ down.mT).trace()) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("init", ["gradient", "inputs"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_row_sees_inputs_as_large_as_one_of_lora_does(init, scale):
    model = tiny_llama(dtype=torch.float64)
    with torch.no_grad():  # inputs of the blocks' first layers, in a few directions more than in others
        model.get_input_embeddings().weight[:, :4].mul_(scale)
    config = calibrated(model, **ADAPTING, adaptation_init=init)
    statistics = config.statistics
    shortened = 0
    for name, layer in layers_of(get_peft_model(model, config)).items():
        down = layer.adapter_tensors("default")["jactus_adapt_down"].detach().double()
        covariance = statistics[name.removeprefix("base_model.model.")].input.covariance
        of_lora = 4 / 3 * float(covariance.trace()) / len(covariance)  # mean square of 2 a x, a uniform
        for row in down:
            mean_square, length = float(row @ covariance @ row), float(row.norm())
            assert length <= ROW_LENGTH * (1 + 1e-6)
            if length < ROW_LENGTH * (1 - 1e-6):
                shortened += 1
                assert mean_square == pytest.approx(of_lora, rel=1e-5)
            else:
                assert mean_square <= of_lora * (1 + 1e-5)
    assert shortened > 0


KINDS = [ADAPTING, ADAPTING | {"train_core": True}, RETAINED, RETAINED | {"frozen_bits": 8}]


@pytest.mark.parametrize("fields", KINDS)
def test_training_moves_what_trains_and_nothing_else(fields):
    model = compressed(tiny_llama(), **fields).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = sum(model(**batch).loss for batch in batches_for(model.get_base_model()))
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {
        name.split(".")[-2] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == trainable(model)


@pytest.mark.parametrize(("fields", "adapter_format"), list(zip(KINDS, (2, 2, 4, 4), strict=True)))
@pytest.mark.parametrize("make", BUILDERS)
def test_a_trained_adapter_comes_back_bit_for_bit(make, fields, adapter_format, tmp_path):
    model = compressed(make(), **fields)
    perturb_cores_(model)
    model.save_pretrained(tmp_path)
    saved = JactusConfig.from_pretrained(tmp_path)
    assert {name: getattr(saved, name) for name in fields} == fields
    assert saved.adapter_format == adapter_format
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert rank_summary(loaded) == rank_summary(model)


@pytest.mark.parametrize("fields", [ADAPTING, RETAINED], ids=["free", "retained"])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("make", BUILDERS)
def test_export_and_merge_hold_what_was_learned(make, storage, fields, tmp_path):
    model = compressed(make(), **fields, storage=storage)
    untrained = logits_of(model)
    perturb_cores_(model)
    expected = logits_of(model)
    assert (expected - untrained).abs().max() > 0.01
    export_compressed(model, tmp_path / "compressed", progress_bar=False)
    auto = AutoModelForSequenceClassification if make is tiny_bert else AutoModelForCausalLM
    small = auto.from_pretrained(tmp_path / "compressed")
    torch.testing.assert_close(logits_of(small), expected, **FLOAT32)
    assert rank_summary(small).retained_ratio <= 0.8
    assert [row.rank for row in rank_summary(small).rows] == [row.rank for row in rank_summary(model).rows]
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, **FLOAT32)


def test_untrained_adaptation_ranks_are_not_exported(tmp_path):
    model = compressed(tiny_llama(), **ADAPTING)
    with pytest.warns(NumericalWarning, match="No adaptation rank was trained"):
        folder = export_compressed(model, tmp_path / "compressed", progress_bar=False)
    small = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(small), logits_of(model), **FLOAT32)
    for exported, row in zip(rank_summary(small).rows, rank_summary(model).rows, strict=True):
        assert exported.rank == (row.rank if row.stays_dense else row.rank - min(3, row.rank // 2))


def test_untrained_ones_in_the_retained_space_lose_nothing_and_are_exported_without_a_warning(tmp_path):
    model = compressed(tiny_llama(), **RETAINED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        folder = export_compressed(model, tmp_path / "compressed", progress_bar=False)
    small = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(small), logits_of(model), **FLOAT32)
    assert [row.rank for row in rank_summary(small).rows] == [row.rank for row in rank_summary(model).rows]


@pytest.mark.parametrize("fields", [{"train_core": True}, {"adaptation_rank": 0}])
def test_a_core_that_trains_leaves_no_adaptation_in_the_retained_space(fields):
    with pytest.raises(ValueError, match="`adaptation_space`='retained' cannot be used with"):
        JactusConfig(**RETAINED | fields)


def test_all_weights_that_do_not_train_have_the_models_dtype():
    model = compressed(tiny_llama(dtype=torch.bfloat16), **ADAPTING)
    dtypes = {name.split(".")[-2]: tensor.dtype for name, tensor in model.state_dict().items() if "jactus" in name}
    assert dtypes["jactus_frozen_factor"] == dtypes["jactus_left"] == torch.bfloat16
    assert dtypes["jactus_adapt_down"] == dtypes["jactus_adapt_up"] == torch.float32


def test_statistics_without_a_sketch_are_refused_with_what_to_do():
    model = tiny_llama()
    statistics = calibrated(model, adaptation_rank=0).statistics
    config = jactus_config(model, **ADAPTING, statistics=statistics)
    with pytest.raises(ValueError, match=r"no sketch of 3 directions.*q_proj.*Calibrate with this config.*\"inputs\""):
        get_peft_model(model, config)
    get_peft_model(model, dataclasses.replace(config, adaptation_init="inputs"))


def test_sketches_go_through_files_and_merges(tmp_path):
    statistics = calibrated(tiny_llama(), **ADAPTING).statistics
    statistics.save(tmp_path / "statistics")
    loaded = CalibrationStatistics.load(tmp_path / "statistics")
    merged = loaded.merge(statistics)
    for name, layer in statistics.items():
        for side in ("left", "right"):
            sums = getattr(layer.weight_gradient, side)
            assert torch.equal(getattr(loaded[name].weight_gradient, side), sums)
            torch.testing.assert_close(getattr(merged[name].weight_gradient, side), 2 * sums)


def test_sketches_do_not_depend_on_batches_checkpointing_or_memory(tmp_path):
    model = tiny_llama(dtype=torch.float64)
    expected = calibrated(model, **ADAPTING).statistics
    one_by_one = [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in batches_for(model)
        for row in range(4)
    ]
    checkpointed = tiny_llama(dtype=torch.float64)
    checkpointed.activation_checkpointing_enable()
    runs = [
        (model, one_by_one, {"loss_reduction": "mean"}),
        (checkpointed, batches_for(model), {}),
        (model, batches_for(model), {"max_statistics_memory": "120KB"}),
    ]
    for other, batches, options in runs:
        config = jactus_config(model, **ADAPTING)
        found = calibrate(other, config, batches, progress_bar=False, **options)
        for name, layer in expected.items():
            for side in ("left", "right"):
                torch.testing.assert_close(
                    getattr(found[name].weight_gradient, side),
                    getattr(layer.weight_gradient, side),
                    rtol=1e-9,
                    atol=1e-12,
                )


@pytest.mark.parametrize("fields", [ADAPTING, RETAINED], ids=["free", "retained"])
def test_several_adapters_of_different_kinds_live_in_one_model(fields):
    model = compressed(tiny_llama(), keep_base_weights=True)
    config = calibrated(model, **fields, keep_base_weights=True)
    cores = logits_of(model)
    model.add_adapter("adapting", config)
    model.set_adapter("adapting")
    perturb_cores_(model)
    adapting = logits_of(model)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), cores)
    model.set_adapter("adapting")
    model.delete_adapter("default")
    assert torch.equal(logits_of(model), adapting)


def test_an_adapter_of_the_first_format_has_no_adaptation_ranks(tmp_path):
    model = compressed(tiny_llama(), adaptation_rank=0)
    model.save_pretrained(tmp_path)
    saved = JactusConfig.from_pretrained(tmp_path)
    assert (saved.adapter_format, saved.adaptation_rank) == (1, 0)
    assert JactusConfig(init_weights="empty", adapter_format=1, adaptation_rank=8).adaptation_rank == 0


def test_half_of_a_rank_at_most_adapts_and_of_a_rank_of_one_the_core_trains():
    ranks = {"layers.0.self_attn.q_proj": 1, "layers.0.self_attn.v_proj": 5, "layers.1.self_attn.q_proj": 9}
    model = compressed(tiny_llama(), adaptation_rank=3, rank_pattern=ranks)
    layers = {name.removeprefix("base_model.model.model."): layer for name, layer in layers_of(model).items()}
    expected = {1: (1, 0, True), 5: (3, 2, False), 9: (6, 3, False)}
    for name, rank in ranks.items():
        shape = layers[name].adapter_shapes["default"]
        assert (shape.core_rank, shape.adaptation_rank, shape.core_trains) == expected[rank]
        assert any(parameter.requires_grad for parameter in layers[name].parameters())


def test_without_data_they_start_at_random():
    config = jactus_config(tiny_llama(), decomposition="svd", adaptation_rank=3)
    model = get_peft_model(tiny_llama(), config)
    assert trainable(model) == {"jactus_adapt_down", "jactus_adapt_up"}
    for layer in layers_of(model).values():
        down = layer.adapter_tensors("default")["jactus_adapt_down"]
        assert down.abs().max() <= 2 / math.sqrt(down.shape[1])
        assert len(down.unique()) == down.numel()
    with pytest.raises(ValueError, match="no calibration statistics"):
        get_peft_model(tiny_llama(), dataclasses.replace(config, layer_ranks={}, adaptation_init="gradient"))


def test_a_single_row_has_the_strides_that_it_has_in_every_process():
    model = compressed(tiny_llama(), adaptation_rank=1)
    for layer in layers_of(model).values():
        for tensor in layer.adapter_tensors("default").values():
            assert tensor.stride() == torch.empty(tensor.shape).stride()
