"""The product with a weight that does not train, and with adaptation ranks, against one with the dense weight."""

import pytest
import torch

from peft_jactus.numerics import interpolation
from peft_jactus.numerics.adapted_product import adapted_product
from peft_jactus.numerics.frozen_weight import FrozenWeight
from peft_jactus.numerics.interpolation import InterpolativeBasis, interpolative_basis
from tests.support.strategies import randn, random_orthonormal

ROUNDING = 1e-12
ADAPTATION_RANK = 2
SHAPES = [(7, 9), (9, 7), (8, 8)]


@pytest.fixture(params=[0, 10**9], ids=["gathered", "dense"], autouse=True)
def gather_cost(request, monkeypatch):
    """Both ways to multiply with a basis give the same; which one is taken depends on sizes."""
    monkeypatch.setattr(interpolation, "_GATHER_COST", request.param)


def problem(out_features, in_features, rank, *, dtype=torch.float64):
    """Return a weight, the same as a dense matrix, and the other arguments of `adapted_product`."""
    left, right = (
        interpolative_basis(random_orthonormal(seed, dim, rank))[0]
        for seed, dim in enumerate((out_features, in_features))
    )
    core = randn(2, rank, rank)
    weight = FrozenWeight.from_factors(left, core, right)
    basis = InterpolativeBasis(weight.basis.order.int(), weight.basis.coefficients.to(dtype))
    weight = FrozenWeight(basis, weight.factor.to(dtype), weight.by_rows)
    dense = left.dense() @ core @ right.dense().mT
    x, bias = randn(3, 2, 3, in_features).to(dtype), randn(4, out_features).to(dtype)
    down, up = randn(5, ADAPTATION_RANK, in_features), randn(6, out_features, ADAPTATION_RANK)
    trains = torch.promote_types(dtype, torch.float32)
    return weight, dense, x, bias, down.to(trains).requires_grad_(), up.to(trains).requires_grad_()


def oracle(dense, x, bias, down, up):
    """Return the output and the gradients of its sum, weighted, in float64."""
    x, down, up = (tensor.detach().double().requires_grad_() for tensor in (x, down, up))
    output = x @ (dense + up @ down).mT + (0 if bias is None else bias.double())
    return output.detach(), torch.autograd.grad((output * upstream(output)).sum(), (x, down, up))


def upstream(output):
    return randn(7, *output.shape).to(output.dtype)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients_are_those_of_the_dense_weight(shape, rank, with_bias):
    weight, dense, x, bias, down, up = problem(*shape, rank)
    bias = bias if with_bias else None
    x.requires_grad_()
    output = adapted_product(x, weight, bias, down, up)
    expected, gradients = oracle(dense, x, bias, down, up)
    torch.testing.assert_close(output, expected, rtol=0, atol=ROUNDING)
    found = torch.autograd.grad((output * upstream(output)).sum(), (x, down, up))
    torch.testing.assert_close(found, gradients, rtol=0, atol=10 * ROUNDING)


@pytest.mark.parametrize("trained", [("x",), ("down",), ("up",), ("down", "up")])
def test_only_what_needs_a_gradient_gets_one(trained):
    weight, dense, x, bias, down, up = problem(7, 9, 4)
    _, gradients = oracle(dense, x, bias, down, up)
    tensors = {"x": x, "down": down, "up": up}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    output = adapted_product(x, weight, bias, down, up)
    (output * upstream(output)).sum().backward()
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        if name in trained:
            torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=10 * ROUNDING)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_held_in_as_many_numbers_as_a_pivoted_layer(shape):
    weight, dense, *_ = problem(*shape, 4)
    assert weight.basis.coefficients.numel() + weight.factor.numel() == 4 * (sum(shape) - 4)
    assert weight.basis.dim == min(shape)
    left, right = weight.sides()
    torch.testing.assert_close(left @ right.mT, dense, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_kept_once_and_as_they_came(shape, dtype):
    weight, _, x, bias, down, up = problem(*shape, 4, dtype=dtype)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted_product(x.requires_grad_(), weight, bias, down, up)
    rows = x.numel() // x.shape[-1]
    activations = {tuple(tensor.shape): tensor.dtype for tensor in kept if tensor.shape[0] == rows}
    assert activations == {(rows, x.shape[-1]): dtype, (rows, ADAPTATION_RANK): dtype}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_compiled_product_has_the_same_gradients(shape):
    weight, dense, x, bias, down, up = problem(*shape, 4)
    compiled = torch.compile(adapted_product, backend="aot_eager")
    output = compiled(x.requires_grad_(), weight, bias, down, up)
    found = torch.autograd.grad((output * upstream(output)).sum(), (x, down, up))
    torch.testing.assert_close(found, oracle(dense, x, bias, down, up)[1], rtol=0, atol=10 * ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_model_of_sixteen_bits_it_rounds_as_dense_products_would(shape, compiled, dtype):
    weight, _, x, bias, down, up = problem(*shape, 4, dtype=dtype)
    function = torch.compile(adapted_product, backend="aot_eager") if compiled else adapted_product
    output = function(x.requires_grad_(), weight, bias, down, up)
    assert output.dtype == dtype
    left, right = weight.sides()
    expected, gradients = oracle(left.double() @ right.double().mT, x, bias, down, up)
    found = torch.autograd.grad((output * upstream(output)).sum(), (x, down, up))
    assert [gradient.dtype for gradient in found] == [dtype, torch.float32, torch.float32]
    for own, true in zip((output, *found), (expected, *gradients), strict=True):
        error = torch.linalg.vector_norm(own.double() - true) / torch.linalg.vector_norm(true)
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_another_dtype_than_the_weight_are_adapted_in_float32(shape):
    weight, _, x, bias, down, up = problem(*shape, 4, dtype=torch.bfloat16)
    output = adapted_product(x.float(), weight, bias, down, up)
    frozen = weight.product(x.flatten(0, 1), bias).view_as(output)
    assert torch.equal(output, (frozen + x.float() @ down.mT @ up.mT).to(torch.bfloat16))


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_multiplies_in_its_dtype(shape):
    weight, dense, x, bias, down, up = problem(*shape, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = adapted_product(x.requires_grad_(), weight, bias, down, up)
    assert output.dtype == torch.bfloat16
    expected, _ = oracle(dense, x, bias, down, up)
    torch.testing.assert_close(output.double(), expected, rtol=0.1, atol=0.3)
    gradients = torch.autograd.grad(output.float().sum(), (x, down, up))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
