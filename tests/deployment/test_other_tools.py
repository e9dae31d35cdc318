"""Tools that flatten parameters, or put modules of their own in the place of a layer's parts."""

import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from peft_jactus import compressed_copy, loading_options
from peft_jactus.deployment.layers import FactorizedLinear
from peft_jactus.parse import RouterConfig, routed_copy
from tests.deployment.test_export import FLOAT32_ERROR, export, load, relative_error
from tests.support.compressed_models import batches_for, logits_of, tiny_bert, tiny_llama, trained
from tests.support.routed_models import routed

KINDS = ["pivoted", "factored", "routed"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def loaded(tmp_path):
    """A function that loads a checkpoint of one kind, saved in one dtype."""

    def make(kind, dtype=torch.float32):
        folder = tmp_path / kind
        if not folder.exists():
            if kind == "routed":
                routed(tiny_llama()).to(dtype).save_pretrained(folder)
            else:
                export(trained(tiny_llama(), storage=kind), folder, dtype=dtype)
        return load(tiny_llama, folder)

    return make


# -- parameters in one piece of memory -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_a_loaded_model_are_contiguous(kind, dtype, loaded):
    model = loaded(kind, dtype)
    batch = batches_for(model)[0]
    model.generate(batch["input_ids"], max_new_tokens=2)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.grad is None or parameter.grad.is_contiguous(), name


def test_parameters_of_models_made_in_memory_are_contiguous():
    copied = compressed_copy(trained(tiny_bert()))
    assert all(parameter.is_contiguous() for parameter in copied.parameters())
    small = compressed_copy(trained(tiny_llama(), adaptation_rank=0))
    model = routed_copy(small, RouterConfig(active_ratio=0.5, expert_size=2), progress_bar=False)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_go_into_a_vector_and_back(kind, dtype, loaded):
    model, other = loaded(kind, dtype), loaded(kind, dtype)
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(torch.zeros_like(flat), other.parameters())
    assert not any(parameter.any() for parameter in other.parameters())
    nn.utils.vector_to_parameters(flat, other.parameters())
    for (name, parameter), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.to(expected.dtype), expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_lbfgs_trains_a_loaded_model_in_evaluation_mode(kind, loaded):
    model = loaded(kind)
    batch = batches_for(model)[0]
    before = model(**batch).loss.item()
    optimizer = torch.optim.LBFGS(model.model.parameters(), lr=0.01, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        after = model(**batch).loss.item()
    assert after < before
    torch.save(model.state_dict(), io.BytesIO())


@torch.no_grad()
def test_a_routed_model_sees_that_its_factors_were_changed(loaded):
    model = loaded("routed")
    before = logits_of(model)
    assert model.rank_router.cache_info().patterns
    layers = [layer for layer in model.modules() if isinstance(layer, FactorizedLinear)]
    for layer in layers[::2]:
        layer.up.weight.mul_(1.5)
    for layer in layers[1::2]:
        parts = [*layer.parameters()]
        nn.utils.vector_to_parameters(1.5 * nn.utils.parameters_to_vector(parts), parts)
    changed = logits_of(model)
    model.rank_router.clear_cache()
    assert torch.equal(changed, logits_of(model))
    assert relative_error(changed, before) > 0.1


# -- columns in one piece of memory, for those who ask ---------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_model_is_laid_out_by_columns_on_request_until_it_trains(kind, loaded):
    expected = logits_of(loaded(kind))
    with loading_options(column_layout=True):
        model = loaded(kind)
    tall = [
        part
        for layer in model.modules()
        if isinstance(layer, FactorizedLinear)
        for part in layer.children()
        if part.out_features > part.in_features
    ]
    assert tall
    assert all(part.weight.mT.is_contiguous() for part in tall)
    assert relative_error(logits_of(model), expected) <= FLOAT32_ERROR
    model.train().eval()
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_by_rows_which_is_faster(kind, loaded):
    loaded(kind, torch.bfloat16)
    with loading_options(column_layout=True):
        model = loaded(kind, torch.bfloat16)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


# -- other modules in the place of parts -------------------------------------------------------------------------


class Integers(nn.Linear):
    """A linear layer whose weight is int8, as bitsandbytes holds it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach().float()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, (self.weight * self.scale).to(x.dtype), bias)


def with_integers(model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Integers(module))
    return model


def quantized(model):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated")  # torch's own way, which people still use
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def quantized_by_torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_quantisation_keeps_the_logits(kind, loaded):
    model = quantized(loaded(kind))
    # Of 8 bits for inputs and for weights; seen: 0.019 to 0.026.
    assert relative_error(logits_of(model), logits_of(loaded(kind))) <= 0.05
    ids = batches_for(model)[0]["input_ids"]
    assert model.generate(ids, max_new_tokens=2).shape == (len(ids), ids.shape[1] + 2)
    model.train().eval()
    assert repr(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_integers_in_place_of_a_weight_do_not_make_integers_of_the_inputs(kind, dtype, loaded):
    model = with_integers(loaded(kind, dtype))
    assert relative_error(logits_of(model).float(), logits_of(loaded(kind, dtype)).float()) <= 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [quantized, quantized_by_torchao, with_integers])
def test_what_reads_weights_refuses_integers_before_it_changes_anything(change, kind, loaded):
    model = change(loaded(kind))
    expected = logits_of(model)
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj\.\w+ \(.*before you quantise it"):
        model.dequantize()
    if kind != "routed":
        with pytest.raises(ValueError, match="before you quantise it"):
            routed_copy(model, RouterConfig(active_ratio=0.5, expert_size=2), progress_bar=False)
    assert torch.equal(logits_of(model), expected)


def test_parametrised_parts_are_made_dense_by_their_value(loaded):
    model = loaded("pivoted")
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            nn.utils.parametrizations.weight_norm(module)
    expected = logits_of(model)
    assert relative_error(logits_of(model.dequantize()), expected) <= FLOAT32_ERROR
