"""A compressed checkpoint made dense: as if the plain one had been loaded in the same dtype, and saved like it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from peft_jactus import loading_options
from peft_jactus.deployment.layers import FORMS
from tests.deployment.test_export import export, relative_error
from tests.support.compressed_models import logits_of, tiny_bert, tiny_gpt2, tiny_t5, trained

# Seen: 4.2e-7, 9.4e-3.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# BERT and GPT-2 have biases, T5 keeps some layers in float32 where a model is float16.
BUILDERS = [tiny_bert, tiny_gpt2, tiny_t5]


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda build: build.__name__)
def model(request):
    return request.param()


@pytest.fixture(scope="module", params=list(FORMS))
def adapted(request, model):
    return trained(type(model)(model.config), storage=request.param, adaptation_rank=0)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def saved(request, model, adapted, tmp_path_factory):
    """Two checkpoints in one dtype, of the plain model and of the compressed one."""
    folder = tmp_path_factory.mktemp("saved")
    type(model)(model.config).to(request.param).save_pretrained(folder / "plain")
    export(adapted, folder / "compressed", dtype=request.param)
    return folder


def from_pretrained(model, folder, **options):
    return type(model).from_pretrained(folder, **options)


def loaded_dense(model, folder, **options):
    with loading_options(dense=True):
        return from_pretrained(model, folder, **options)


def dequantized(model, folder, **options):
    return from_pretrained(model, folder, **options).dequantize()


@pytest.mark.parametrize(
    ("make_dense", "dtype"),
    [
        (loaded_dense, "auto"),
        (dequantized, "auto"),
        (loaded_dense, torch.float32),
        (loaded_dense, torch.bfloat16),
        (dequantized, torch.float16),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_parameters_are_those_of_the_plain_model_in_that_dtype(model, saved, tmp_path, make_dense, dtype):
    dense = make_dense(model, saved / "compressed", dtype=dtype)
    plain = from_pretrained(model, saved / "plain", dtype=dtype)
    assert dense.dtype == plain.dtype == dense.config.dtype
    assert {n: (p.dtype, p.shape, p.requires_grad) for n, p in dense.named_parameters()} == {
        n: (p.dtype, p.shape, p.requires_grad) for n, p in plain.named_parameters()
    }
    dense.save_pretrained(tmp_path / "dense")
    plain.save_pretrained(tmp_path / "plain")
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "plain"))
    assert {n: t.dtype for n, t in written.items()} == {n: t.dtype for n, t in expected.items()}
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = from_pretrained(model, tmp_path / "dense", dtype=dtype).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_the_compressed_model(model, saved, dtype):
    compressed = from_pretrained(model, saved / "compressed", dtype=dtype)
    dense = loaded_dense(model, saved / "compressed", dtype=dtype)
    assert relative_error(logits_of(dense), logits_of(compressed)) <= ROUNDING[dtype]
