"""A compressed model, of which more is compressed."""

import pytest
import torch
from peft import get_peft_model

from peft_jactus import calibrate, loading_options, plan_ranks, rank_summary
from peft_jactus.deployment.export import compressed_copy
from peft_jactus.parse import RouterConfig, routed_copy
from tests.deployment.test_export import FLOAT32_ERROR, export, layers_of, load, relative_error, tensors_in, trained
from tests.support.compressed_models import (
    batches_for,
    compressed,
    jactus_config,
    logits_of,
    perturb_cores_,
    tiny_gpt2,
    tiny_llama,
)

FIRST = {tiny_llama: ["q_proj", "o_proj"], tiny_gpt2: ["c_attn"]}
SECOND = {tiny_llama: ["up_proj", "down_proj"], tiny_gpt2: ["c_fc"]}


def ends_of(names):
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("build", FIRST)
def test_other_layers_of_a_compressed_model_are_compressed_and_exported_with_the_first_ones(tmp_path, build):
    first = load(build, export(trained(build, target_modules=FIRST[build]), tmp_path / "first"))
    model = compressed(first, target_modules=SECOND[build])
    perturb_cores_(model)
    assert ends_of(row.name for row in rank_summary(model).rows) == set(SECOND[build])
    folder = export(model, tmp_path / "second")
    assert ends_of(layers_of(folder)) == {*FIRST[build], *SECOND[build]}
    loaded = load(build, folder)
    assert relative_error(logits_of(loaded), logits_of(model)) <= FLOAT32_ERROR
    assert ends_of(row.name for row in rank_summary(loaded).rows) == {*FIRST[build], *SECOND[build]}
    with loading_options(dense=True):
        dense = load(build, folder)
    assert {type(module) for module in dense.modules()} == {type(module) for module in build().modules()}
    assert relative_error(logits_of(dense), logits_of(model)) <= FLOAT32_ERROR
    narrow = tensors_in(export(model, tmp_path / "narrow", dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in narrow.values() if tensor.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("names", ["all-linear", ["o_proj", "up", "columns", "others"]])
def test_layers_that_are_compressed_already_are_refused_by_name(names, bits):
    model = compressed_copy(trained(tiny_llama, target_modules=["o_proj"]), bits=bits)
    config = jactus_config(model, target_modules=names, decomposition="svd")
    message = (
        r"layers\.0\.self_attn\.o_proj.* is compressed already.*`loading_options\(dense=True\)`.*`exclude_modules`"
    )
    for compress in (
        lambda: calibrate(model, config, batches_for(model), progress_bar=False),
        lambda: plan_ranks(model, config),
        lambda: get_peft_model(model, config),
    ):
        with pytest.raises(TypeError, match=message):
            compress()


def test_a_routed_model_is_refused():
    routed = routed_copy(compressed_copy(trained(tiny_llama, target_modules=["q_proj"])), RouterConfig(expert_size=4))
    with pytest.raises(TypeError, match=r"compressed model with router, .*Compress more layers first"):
        get_peft_model(routed, jactus_config(routed, target_modules=["up_proj"], decomposition="svd"))
