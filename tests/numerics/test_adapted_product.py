"""The product with a weight that does not train, and with adaptation ranks, against one with the dense weight."""

import functools

import pytest
import torch

from peft_jactus.numerics import interpolation
from peft_jactus.numerics.adaptation import in_space_of
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


@pytest.fixture(params=["free", "retained"])
def space(request):
    return request.param


def problem(out_features, in_features, rank, space, *, dtype=torch.float64):
    """Return a weight, what it is with an adaptation as a dense matrix, and the other arguments of `adapted_product`.

    The second is a function of ``down`` and ``up``.
    """
    left, right = (
        interpolative_basis(random_orthonormal(seed, dim, rank))[0]
        for seed, dim in enumerate((out_features, in_features))
    )
    core = randn(2, rank, rank)
    weight = FrozenWeight.from_factors(left, core, right)
    basis = InterpolativeBasis(weight.basis.order.int(), weight.basis.coefficients.to(dtype))
    weight = FrozenWeight(basis, weight.factor.to(dtype), weight.by_rows)
    x, bias = randn(3, 2, 3, in_features).to(dtype), randn(4, out_features).to(dtype)
    outputs, inputs = (out_features, in_features) if space == "free" else weight.factor.shape
    down, up = randn(5, ADAPTATION_RANK, inputs), randn(6, outputs, ADAPTATION_RANK)
    trains = torch.promote_types(dtype, torch.float32)
    changed = functools.partial(changed_weight, weight, space)
    return weight, changed, x, bias, down.to(trains).requires_grad_(), up.to(trains).requires_grad_()


def changed_weight(weight, space, down, up):
    """Return the dense weight with its adaptation, by definition."""
    columns, factor = weight.basis.dense().double(), weight.factor.double()
    dense = columns @ factor if weight.by_rows else factor @ columns.mT
    if space == "free":
        return dense + up @ down
    columns = columns / torch.linalg.vector_norm(columns, dim=0)
    return dense + (columns @ up @ down if weight.by_rows else up @ down @ columns.mT)


def oracle(changed, x, bias, down, up):
    """Return the output and the gradients of its sum, weighted, in float64."""
    x, down, up = (tensor.detach().double().requires_grad_() for tensor in (x, down, up))
    output = x @ changed(down, up).mT + (0 if bias is None else bias.double())
    return output.detach(), torch.autograd.grad((output * upstream(output)).sum(), (x, down, up))


def compiled_product():
    torch.compiler.reset()  # after eight graphs of a function, torch would run it as it is
    return torch.compile(adapted_product, backend="aot_eager", fullgraph=True)


def upstream(output):
    return randn(7, *output.shape).to(output.dtype)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients_are_those_of_the_dense_weight(shape, rank, with_bias, space):
    weight, changed, x, bias, down, up = problem(*shape, rank, space)
    bias = bias if with_bias else None
    x.requires_grad_()
    output = adapted_product(x, weight, bias, down, up, space=space)
    expected, gradients = oracle(changed, x, bias, down, up)
    torch.testing.assert_close(output, expected, rtol=0, atol=ROUNDING)
    found = torch.autograd.grad((output * upstream(output)).sum(), (x, down, up))
    torch.testing.assert_close(found, gradients, rtol=0, atol=10 * ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trained", [("x",), ("down",), ("up",), ("down", "up")])
def test_only_what_needs_a_gradient_gets_one(trained, shape, space):
    weight, changed, x, bias, down, up = problem(*shape, 4, space)
    _, gradients = oracle(changed, x, bias, down, up)
    tensors = {"x": x, "down": down, "up": up}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    output = adapted_product(x, weight, bias, down, up, space=space)
    (output * upstream(output)).sum().backward()
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        if name in trained:
            torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=10 * ROUNDING)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_held_in_as_many_numbers_as_a_pivoted_layer(shape):
    weight, changed, *_, down, up = problem(*shape, 4, "free")
    assert weight.basis.coefficients.numel() + weight.factor.numel() == 4 * (sum(shape) - 4)
    assert weight.basis.dim == min(shape)
    left, right = weight.sides()
    torch.testing.assert_close(left @ right.mT, changed(0 * down, 0 * up), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_kept_once_and_as_they_came(shape, dtype, space):
    weight, _, x, bias, down, up = problem(*shape, 4, space, dtype=dtype)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted_product(x.requires_grad_(), weight, bias, down, up, space=space)
    rows = x.numel() // x.shape[-1]
    activations = {tuple(tensor.shape): tensor.dtype for tensor in kept if tensor.shape[0] == rows}
    assert activations == {(rows, x.shape[-1]): dtype, (rows, ADAPTATION_RANK): dtype}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_compiled_product_has_the_same_gradients(shape, space):
    weight, changed, x, bias, down, up = problem(*shape, 4, space)
    output = compiled_product()(x.requires_grad_(), weight, bias, down, up, space=space)
    found = torch.autograd.grad((output * upstream(output)).sum(), (x, down, up))
    torch.testing.assert_close(found, oracle(changed, x, bias, down, up)[1], rtol=0, atol=10 * ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_model_of_sixteen_bits_it_rounds_as_dense_products_would(shape, compiled, dtype, space):
    weight, changed, x, bias, down, up = problem(*shape, 4, space, dtype=dtype)
    function = compiled_product() if compiled else adapted_product
    output = function(x.requires_grad_(), weight, bias, down, up, space=space)
    assert output.dtype == dtype
    expected, gradients = oracle(changed, x, bias, down, up)
    found = torch.autograd.grad((output * upstream(output)).sum(), (x, down, up))
    assert [gradient.dtype for gradient in found] == [dtype, torch.float32, torch.float32]
    for own, true in zip((output, *found), (expected, *gradients), strict=True):
        error = torch.linalg.vector_norm(own.double() - true) / torch.linalg.vector_norm(true)
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("num_rows", "size_of_up", "size_of_gradient"), [(6, 1e-7, 1.0), (2000, 1.0, 8.0)], ids=["too small", "too large"]
)
def test_gradients_out_of_the_range_of_float16_are_as_exact_as_others(
    num_rows, size_of_up, size_of_gradient, shape, compiled, bits, space
):
    weight, _, _, bias, down, up = problem(*shape, 4, space, dtype=torch.float16)
    if bits is not None:
        weight = weight.rounded(bits, dtype=torch.float16, second_moment=None)
    x = (3 + randn(8, num_rows, shape[1])).half().requires_grad_()
    up = (size_of_up * up).detach().requires_grad_()
    of_output = torch.full((num_rows, shape[0]), size_of_gradient).half()
    function = compiled_product() if compiled else adapted_product
    found = torch.autograd.grad(function(x, weight, bias, down, up, space=space), (down, up), of_output)
    down, up = (tensor.detach().double().requires_grad_() for tensor in (down, up))
    output = x.detach().double() @ changed_weight(weight.numbers(), space, down, up).mT
    expected = torch.autograd.grad(output, (down, up), of_output.double())
    tiny, large = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
    assert float(expected[0].abs().max()) < tiny or float(expected[0].abs().max()) > large
    for own, true in zip(found, expected, strict=True):
        error = torch.linalg.vector_norm(own.double() - true) / torch.linalg.vector_norm(true)
        assert error < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_another_dtype_than_the_weight_are_adapted_in_float32(shape):
    weight, _, x, bias, down, up = problem(*shape, 4, "free", dtype=torch.bfloat16)
    output = adapted_product(x.float(), weight, bias, down, up)
    frozen = weight.product(x.flatten(0, 1), bias).view_as(output)
    assert torch.equal(output, (frozen + x.float() @ down.mT @ up.mT).to(torch.bfloat16))


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_multiplies_in_its_dtype(shape, space):
    weight, changed, x, bias, down, up = problem(*shape, 4, space, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = adapted_product(x.requires_grad_(), weight, bias, down, up, space=space)
    assert output.dtype == torch.bfloat16
    expected, _ = oracle(changed, x, bias, down, up)
    torch.testing.assert_close(output.double(), expected, rtol=0.1, atol=0.3)
    gradients = torch.autograd.grad(output.float().sum(), (x, down, up))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapted_factor_is_the_weight_with_what_was_learned_and_of_no_higher_rank(shape):
    weight, changed, *_, down, up = problem(*shape, 4, "retained")
    left, right = weight.adapted(down.detach(), up.detach()).sides()
    assert left.shape[1] == right.shape[1] == 4
    torch.testing.assert_close(left @ right.mT, changed(down, up).detach(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapted_factor_reads_inputs_along_the_directions_as_far_as_it_can(shape):
    weight, changed, *_, up = problem(*shape, 4, "retained")
    directions = randn(8, ADAPTATION_RANK, shape[1])
    down = in_space_of(directions, weight)
    rows = weight.sides()[1]
    within = directions if weight.by_rows else torch.linalg.lstsq(rows, directions.mT).solution.mT @ rows.mT
    read = changed(down, up) - changed(0 * down, up)  # (out, in): up, or the columns of the basis, times what is read
    torch.testing.assert_close(read, read @ torch.linalg.pinv(within) @ within, rtol=0, atol=10 * ROUNDING)
