"""The product with a weight that does not train, against one with the dense weight."""

import pytest
import torch

from peft_jactus.numerics import interpolation
from peft_jactus.numerics.frozen_product import FrozenWeight, frozen_product
from peft_jactus.numerics.interpolation import InterpolativeBasis, interpolative_basis
from tests.support.strategies import randn, random_orthonormal

ROUNDING = 1e-12
SHAPES = [(7, 9), (9, 7), (8, 8)]


@pytest.fixture(params=[0, 10**9], ids=["gathered", "dense"], autouse=True)
def gather_cost(request, monkeypatch):
    """Both ways to multiply with a basis give the same; which one is taken depends on sizes."""
    monkeypatch.setattr(interpolation, "_GATHER_COST", request.param)


def problem(out_features, in_features, rank, *, dtype=torch.float64):
    """Return a weight, the same as a dense matrix, inputs, and a bias."""
    left, right = (
        interpolative_basis(random_orthonormal(seed, dim, rank))[0]
        for seed, dim in enumerate((out_features, in_features))
    )
    core = randn(2, rank, rank)
    weight = FrozenWeight.from_factors(left, core, right)
    basis = InterpolativeBasis(weight.basis.order.int(), weight.basis.coefficients.to(dtype))
    weight = FrozenWeight(basis, weight.factor.to(dtype), weight.by_rows)
    dense = left.dense() @ core @ right.dense().mT
    return weight, dense, randn(3, 2, 3, in_features).to(dtype), randn(4, out_features).to(dtype)


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradient_are_those_of_the_dense_weight(shape, rank):
    weight, dense, x, bias = problem(*shape, rank)
    x.requires_grad_()
    output = frozen_product(x, weight, bias)
    torch.testing.assert_close(output, x @ dense.mT + bias, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(frozen_product(x, weight, None), x @ dense.mT, rtol=0, atol=ROUNDING)
    upstream = randn(5, *output.shape)
    (gradient,) = torch.autograd.grad(output, x, upstream)
    torch.testing.assert_close(gradient, upstream @ dense, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_held_in_as_many_numbers_as_a_pivoted_layer(shape):
    weight, dense, _, _ = problem(*shape, 4)
    assert weight.basis.coefficients.numel() + weight.factor.numel() == 4 * (sum(shape) - 4)
    assert weight.basis.dim == min(shape)
    left, right = weight.sides()
    torch.testing.assert_close(left @ right.mT, dense, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_activation_is_kept(shape):
    weight, _, x, bias = problem(*shape, 4)
    kept = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        frozen_product(x.requires_grad_(), weight, bias)
    assert kept
    assert 6 not in {shape[0] for shape in kept}  # rows of `x`, all together


@pytest.mark.parametrize("shape", SHAPES)
def test_a_compiled_product_has_the_same_gradient(shape):
    weight, dense, x, bias = problem(*shape, 4)
    compiled = torch.compile(frozen_product, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x.requires_grad_(), weight, bias).sum(), x)
    torch.testing.assert_close(gradient, dense.sum(0).expand_as(x), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_multiplies_in_its_dtype(shape):
    weight, dense, x, bias = problem(*shape, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = frozen_product(x.requires_grad_(), weight, bias)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), x.double() @ dense.mT + bias.double(), rtol=0.1, atol=0.2)
    (gradient,) = torch.autograd.grad(output.float().sum(), x)
    assert gradient.dtype == torch.float32
