"""Products with a trainable core between interpolative bases, against dense matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_jactus.numerics import interpolation
from peft_jactus.numerics.core_product import STEP_NORM, core_product, step_scale
from peft_jactus.numerics.interpolation import InterpolativeBasis, interpolative_basis
from tests.support.strategies import randn, random_orthonormal, seeds

ROUNDING = 1e-12


@pytest.fixture(params=[0, 10**9], ids=["gathered", "dense"], autouse=True)
def gather_cost(request, monkeypatch):
    """Both ways to multiply with a basis give the same; which one is taken depends on sizes."""
    monkeypatch.setattr(interpolation, "_GATHER_COST", request.param)


def basis_of(seed, dim, rank):
    return interpolative_basis(random_orthonormal(seed, dim, rank))[0]


def problem(seed=0, out_features=7, in_features=9, rank=4, dtype=torch.float64):
    left, right = basis_of(seed, out_features, rank), basis_of(seed + 1, in_features, rank)
    left, right = (InterpolativeBasis(basis.order.int(), basis.coefficients.to(dtype)) for basis in (left, right))
    return randn(seed + 2, 2, 3, in_features).to(dtype), randn(seed + 3, rank, rank), left, right


def oracle(x, core, left, right):
    """The same with dense matrices whose columns have one length."""
    left, right = (basis.dense() / basis.dense().norm(dim=0) for basis in (left, right))
    return x @ right @ (step_scale(len(core)) * core).mT @ left.mT


@given(seed=seeds, dim=st.integers(1, 8), data=st.data())
def test_the_basis_spans_what_it_was_made_from(seed, dim, data):
    rank = data.draw(st.integers(1, dim))
    basis = random_orthonormal(seed, dim, rank)
    found, transform = interpolative_basis(basis)
    torch.testing.assert_close(found.dense() @ transform, basis, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found.column_norms(), found.dense().norm(dim=0), rtol=0, atol=ROUNDING)
    if rank == dim:
        torch.testing.assert_close(found.dense(), torch.eye(dim).double(), rtol=0, atol=0)


@given(seed=seeds, dim=st.integers(1, 8), data=st.data())
def test_projecting_and_expanding_are_products_with_the_basis(seed, dim, data):
    basis = basis_of(seed, dim, data.draw(st.integers(1, dim)))
    x, z = randn(seed + 1, 3, dim), randn(seed + 2, 3, basis.rank)
    torch.testing.assert_close(basis.project(x), x @ basis.dense(), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(basis.expand(z), z @ basis.dense().mT, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_product_is_that_of_dense_matrices(rank):
    x, core, left, right = problem(rank=rank)
    bias = randn(9, 7)
    expected = oracle(x, core, left, right)
    torch.testing.assert_close(core_product(x, core, left, right, bias), expected + bias, rtol=0, atol=ROUNDING)
    assert core_product(x, core, left, right, None).shape == (2, 3, 7)


@pytest.mark.parametrize("rank", [4, 50])
def test_a_step_in_any_number_of_the_core_changes_the_weight_by_as_much(rank):
    _, core, left, right = problem(out_features=60, in_features=55, rank=rank)
    eye = torch.eye(55, dtype=torch.float64)

    def weight(core):
        return core_product(eye, core, left, right, None).mT

    for row in range(4):
        for column in range(4):
            moved = core.clone()
            moved[row, column] += 1
            assert float((weight(moved) - weight(core)).norm()) == pytest.approx(
                min(1, STEP_NORM / rank), abs=ROUNDING
            )


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_gradients_are_those_of_finite_differences(rank):
    x, core, left, right = problem(rank=rank)
    inputs = x.requires_grad_(), core.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, core: core_product(x, core, left, right, randn(9, 7)), inputs)


def test_only_the_inputs_of_the_core_are_kept_for_the_backward_pass():
    x, core, left, right = problem()
    kept = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        core_product(x, core.requires_grad_(), left, right, None)
    assert kept.count((6, 4)) == 1
    assert (6, 9) not in kept
    assert (6, 7) not in kept


def test_bfloat16_bases_leave_the_core_its_own_precision():
    x, core, left, right = problem(dtype=torch.bfloat16)
    core = core.float().requires_grad_()
    output = core_product(x, core, left, right, None)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert bool((core.grad.bfloat16().float() != core.grad).any())  # rounded to bfloat16 nowhere


@pytest.mark.parametrize(("num_rows", "size"), [(6, 8e-4), (5000, 8.0)], ids=["too small", "too large"])
def test_gradients_out_of_the_range_of_float16_are_as_exact_as_others(num_rows, size):
    _, core, left, right = problem(dtype=torch.float16)
    x, core = (size * (3 + randn(8, num_rows, 9))).half(), core.float().requires_grad_()
    of_output = torch.full((num_rows, 7), size).half()
    (found,) = torch.autograd.grad(core_product(x, core, left, right, None), core, of_output)
    wide = [InterpolativeBasis(basis.order, basis.coefficients.double()) for basis in (left, right)]
    (expected,) = torch.autograd.grad(oracle(x.double(), core.double(), *wide), core, of_output.double())
    tiny, large = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
    assert float(expected.abs().max()) < tiny or float(expected.abs().max()) > large
    assert float((found - expected).norm() / expected.norm()) < 2 * torch.finfo(torch.float16).eps


def test_autocast_multiplies_in_its_dtype():
    x, core, left, right = problem(dtype=torch.float32)
    core = core.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = core_product(x, core, left, right, None)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert core.grad.dtype == torch.float32
    torch.testing.assert_close(output.float(), core_product(x, core, left, right, None), rtol=0.05, atol=0.05)
