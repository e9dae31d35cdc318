"""Weights in 8 and 4 bits: what is stored, what comes back, and products with it."""

import pytest
import torch
from torch.nn.functional import linear

from peft_jactus.numerics.quantization import (
    BITS,
    GROUP_SIZE,
    code_dtype,
    code_shape,
    dequantize,
    num_groups,
    quantize,
    quantized_product,
)
from tests.support.strategies import randn

bitsandbytes = pytest.importorskip("bitsandbytes")
SHAPES = [(200, 32), (33, 70), (64, 64), (5, 3), (1, 1)]
# Seen of normal numbers: 0.006 and 0.092.
ERRORS = {8: 0.008, 4: 0.11}


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_comes_back(shape, bits, dtype):
    weight = randn(0, *shape)
    codes, scales = quantize(weight, bits, dtype=dtype)
    assert (tuple(codes.shape), codes.dtype) == (code_shape(shape, bits), code_dtype(bits))
    assert (scales.shape, scales.dtype) == ((num_groups(shape),), dtype)
    found = dequantize(codes, scales, shape)
    assert (found.shape, found.dtype) == (shape, dtype)
    assert relative_error(found, weight) < ERRORS[bits]


@pytest.mark.parametrize("bits", BITS)
def test_codes_take_the_bits_they_are_said_to(bits):
    codes, scales = quantize(randn(0, 640, 320), bits, dtype=torch.bfloat16)
    assert codes.nbytes * 8 == bits * 640 * 320
    assert scales.nbytes * 8 == 640 * 320 * 16 / GROUP_SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 128), (5, 13), (3, 64)])
def test_an_export_to_onnx_gets_the_same_weight_without_their_operator(shape, dtype, monkeypatch):
    codes, scales = quantize(torch.randn(shape), 4, dtype=dtype)
    expected = dequantize(codes, scales, shape)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch.ops, "bitsandbytes", None)
    torch.testing.assert_close(
        dequantize(codes, scales, shape), expected, rtol=2**-7 if dtype.itemsize == 2 else 1e-6, atol=0
    )


def test_4_bits_are_those_of_bitsandbytes():
    weight = randn(0, 96, 128).float()
    codes, scales = quantize(weight, 4, dtype=torch.float32)
    expected, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=GROUP_SIZE, quant_type="nf4")
    assert torch.equal(codes.flatten(), expected.flatten())
    assert torch.equal(scales, state.absmax)
    assert torch.equal(dequantize(codes, scales, (96, 128)), bitsandbytes.functional.dequantize_4bit(expected, state))


def test_8_bits_are_the_nearest_multiples_of_the_scale():
    weight = randn(0, 3, GROUP_SIZE)
    codes, scales = quantize(weight, 8, dtype=torch.float64)
    assert torch.equal(scales, weight.abs().amax(1) / 127)
    assert torch.equal(codes.double(), (weight / scales[:, None]).round())


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits):
    codes, scales = quantize(torch.zeros(7, 30), bits, dtype=torch.float32)
    assert torch.equal(dequantize(codes, scales, (7, 30)), torch.zeros(7, 30))


@pytest.mark.parametrize("bits", BITS)
def test_rounding_by_the_inputs_changes_outputs_less(bits):
    weight = randn(0, 40, 100)
    inputs = randn(1, 300, 100) + 3 * randn(2, 1, 100)
    errors = []
    for moment in (None, inputs.mT @ inputs):
        codes, scales = quantize(weight, bits, dtype=torch.float32, second_moment=moment)
        errors.append(relative_error(inputs @ dequantize(codes, scales, (40, 100)).double().mT, inputs @ weight.mT))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_and_their_gradients_are_those_of_the_dequantized_weight(bits, has_bias):
    codes, scales = quantize(randn(0, 12, 20), bits, dtype=torch.float32)
    weight = dequantize(codes, scales, (12, 20))
    outputs, gradients = [], []
    for product in (lambda x, b: quantized_product(x, codes, scales, (12, 20), b), lambda x, b: linear(x, weight, b)):
        x = randn(1, 2, 5, 20).float().requires_grad_()
        bias = randn(2, 12).float().requires_grad_() if has_bias else None
        output = product(x, bias)
        output.square().sum().backward()
        outputs.append(output)
        gradients.append([x.grad, *([bias.grad] if has_bias else [])])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bits", BITS)
def test_a_product_keeps_codes_for_its_gradient_and_no_weight(bits):
    codes, scales = quantize(randn(0, 128, 256), bits, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        quantized_product(randn(1, 3, 256).float().requires_grad_(), codes, scales, (128, 256), None)
    assert sum(tensor.nbytes for tensor in kept) == codes.nbytes + scales.nbytes


@pytest.mark.parametrize("bits", BITS)
def test_compiles_to_one_graph_and_exports(bits):
    torch._dynamo.reset()
    codes, scales = quantize(randn(0, 12, 20), bits, dtype=torch.float32)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", codes)
            self.register_buffer("scales", scales)

        def forward(self, x):
            return quantized_product(x, self.codes, self.scales, (12, 20), None)

    x = randn(1, 3, 20).float()
    layer = Layer()
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)


def test_4_bits_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    codes, scales = torch.zeros(32, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(ImportError, match="4 bits need bitsandbytes: `pip install bitsandbytes`"):
        dequantize(codes, scales, (8, 8))
