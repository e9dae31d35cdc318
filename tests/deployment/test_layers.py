"""The deployed layers against dense products in float64, and what tools for PyTorch models make of them."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from peft_jactus import LowRankLinear, PivotedLinear
from peft_jactus.deployment.layers import (
    FORMS,
    ColumnPivotedLinear,
    FactorizedLinear,
    RowPivotedLinear,
    arrange_parts_,
)
from peft_jactus.numerics.allocation import stays_dense, stored_parameters, uniform_rank
from peft_jactus.numerics.interpolation import take_columns
from peft_jactus.numerics.linalg import balanced_factors
from tests.support.strategies import dims, orthonormal, randn, random_orthonormal, seeds, spectra, weights

FLOAT64 = 1e-12
FLOAT32 = 2e-6
SHAPES = [(7, 12), (12, 7), (9, 9), (2, 5), (5, 2), (2, 2)]
KINDS = [LowRankLinear, RowPivotedLinear, ColumnPivotedLinear]


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


# -- balanced factors -------------------------------------------------------------------------------------


@given(data=st.data(), out_features=dims, in_features=dims)
def test_factors_have_equal_norms_and_the_product_of_the_core(data, out_features, in_features):
    rank = data.draw(st.integers(1, min(out_features, in_features)))
    left = random_orthonormal(data.draw(seeds), out_features, rank)
    right = random_orthonormal(data.draw(seeds), in_features, rank)
    core = data.draw(weights(rank, rank))
    up, down = balanced_factors(left, core, right)
    assert up.shape == (out_features, rank)
    assert down.shape == (rank, in_features)
    torch.testing.assert_close(up @ down, left @ core @ right.mT, rtol=0, atol=FLOAT64)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=0, atol=FLOAT64)


def test_factors_are_float64_whatever_comes_in():
    up, down = balanced_factors(*(torch.eye(3, 2, dtype=torch.bfloat16)[: 2 if core else 3] for core in (0, 1, 0)))
    assert up.dtype == down.dtype == torch.float64


# -- layers -----------------------------------------------------------------------------------------------


def factors_for(out_features, in_features, rank, *, seed=0, exponent=2):
    """Return left, core, right and bias as a trained adapter has them."""
    left = random_orthonormal(seed, out_features, rank)
    right = random_orthonormal(seed + 1, in_features, rank)
    singular_values = torch.logspace(0, -exponent, rank, dtype=torch.float64)
    core = random_orthonormal(seed + 2, rank, rank) * singular_values @ random_orthonormal(seed + 3, rank, rank)
    return left, core, right, randn(seed + 4, out_features)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
@given(data=st.data(), out_features=st.integers(2, 12), in_features=st.integers(2, 12), has_bias=st.booleans())
def test_output_is_that_of_the_dense_weight(kind, dtype, tolerance, data, out_features, in_features, has_bias):
    rank = data.draw(st.integers(1, min(out_features, in_features) - 1))
    left = data.draw(orthonormal(out_features, min_columns=rank))[:, :rank]
    right = data.draw(orthonormal(in_features, min_columns=rank))[:, :rank]
    core = data.draw(weights(rank, rank))
    bias = randn(data.draw(seeds), out_features) if has_bias else None
    layer = kind.from_factors(left, core, right, bias, dtype=dtype)
    weight = left @ core @ right.mT
    x = randn(data.draw(seeds), 2, 3, in_features).to(dtype)
    expected = linear(x.double(), weight, None if bias is None else bias.to(dtype).double())
    scale = float(x.norm()) + float(expected.norm())
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(layer.dense_weight().double(), weight, rtol=0, atol=tolerance)
    assert (layer.in_features, layer.out_features, layer.rank) == (in_features, out_features, rank)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), exponent=st.integers(0, 8))
def test_a_core_of_any_condition_keeps_its_weight(kind, data, exponent):
    left, _, right, _ = factors_for(10, 8, 5, seed=data.draw(st.integers(0, 999)))
    core = torch.diag(data.draw(spectra(5, max_exponent=exponent)))
    layer = kind.from_factors(left, core, right, None, dtype=torch.float64)
    torch.testing.assert_close(layer.dense_weight(), left @ core @ right.mT, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3,), (1, 3), (0, 3), (2, 0, 3), (2, 4, 5, 3)])
def test_inputs_may_have_any_leading_dimensions(kind, shape):
    left, core, right, bias = factors_for(4, 3, 2)
    layer = kind.from_factors(left, core, right, bias, dtype=torch.float64)
    x = randn(0, *shape)
    torch.testing.assert_close(layer(x), linear(x, left @ core @ right.mT, bias), rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_is_not_written_to(kind):
    layer = kind.from_factors(*factors_for(6, 5, 3), dtype=torch.float64)
    x = randn(0, 4, 5)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parts_do_not_share_memory_with_the_factors(kind, dtype):
    left, core, right, bias = (tensor.to(dtype) for tensor in factors_for(6, 5, 3))
    layer = kind.from_factors(left, core, right, bias, dtype=dtype)
    sources = {tensor.data_ptr() for tensor in (left, core, right, bias)}
    assert not sources & {tensor.data_ptr() for tensor in layer.state_dict().values()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_layer(kind):
    left, core, right, bias = factors_for(6, 7, 4)
    layer = kind.from_factors(left, core, right, bias, dtype=torch.float64)
    x = randn(0, 5, 7).requires_grad_()
    dense = x.detach().clone().requires_grad_()
    cotangent = randn(1, 5, 6)
    layer(x).backward(cotangent)
    linear(dense, left @ core @ right.mT, bias).backward(cotangent)
    torch.testing.assert_close(x.grad, dense.grad, rtol=0, atol=FLOAT64)
    torch.testing.assert_close(layer.bias.grad, cotangent.sum(0), rtol=0, atol=FLOAT64)
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_parts_agree_with_finite_differences(kind):
    layer = kind.from_factors(*factors_for(4, 5, 2), dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), randn(3, 3, 5))

    assert torch.autograd.gradcheck(run, values)


# -- what is stored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", list(FORMS))
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_stored_numbers_are_those_of_the_budget(storage, out_features, in_features, has_bias):
    for rank in range(1, min(out_features, in_features)):
        if stays_dense(rank, out_features, in_features, storage):
            continue
        left, core, right, bias = factors_for(out_features, in_features, rank)
        layer = FORMS[storage].from_factors(left, core, right, bias if has_bias else None, dtype=torch.float32)
        marker = 1
        index = min(out_features, in_features) if storage == "pivoted" else 0
        weights_and_bias = stored_parameters(rank, out_features, in_features, storage) + has_bias * out_features
        stored = layer.state_dict()
        assert sum(tensor.numel() for tensor in stored.values()) == weights_and_bias + index + marker
        assert sum(parameter.numel() for parameter in layer.parameters()) == weights_and_bias
        assert stored["weight"].shape == (1,)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_names_and_shapes(kind):
    layer = kind.from_factors(*factors_for(6, 7, 4), dtype=torch.bfloat16)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layer.state_dict().items()}
    model = torch.bfloat16
    assert (
        shapes
        == {
            LowRankLinear: {
                "weight": ((1,), model),
                "down.weight": ((4, 7), model),
                "up.weight": ((6, 4), model),
                "up.bias": ((6,), model),
            },
            RowPivotedLinear: {
                "weight": ((1,), model),
                "rows.weight": ((4, 7), model),
                "others.weight": ((2, 4), model),
                "row_index": ((6,), torch.int32),
                "bias": ((6,), model),
            },
            ColumnPivotedLinear: {
                "weight": ((1,), model),
                "others.weight": ((4, 3), model),
                "columns.weight": ((6, 4), model),
                "columns.bias": ((6,), model),
                "column_index": ((7,), torch.int32),
            },
        }[kind]
    )


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_the_shorter_side_is_pivoted(out_features, in_features):
    kind = RowPivotedLinear if out_features < in_features else ColumnPivotedLinear
    factors = factors_for(out_features, in_features, 1)
    assert type(PivotedLinear.from_factors(*factors, dtype=torch.float32)) is kind
    assert type(PivotedLinear.empty(in_features, out_features, 1, bias=True)) is kind


@pytest.mark.parametrize("kind", [*KINDS, PivotedLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_an_empty_layer_takes_the_values_of_another(kind, dtype, has_bias):
    *factors, bias = factors_for(6, 7, 4)
    layer = kind.from_factors(*factors, bias if has_bias else None, dtype=dtype)
    empty = kind.empty(7, 6, 4, bias=has_bias, device="meta", dtype=dtype)
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == wanted
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    filled = kind.empty(7, 6, 4, bias=has_bias, dtype=dtype)
    filled.load_state_dict(layer.state_dict())
    x = randn(0, 3, 7).to(dtype)
    assert torch.equal(filled(x), layer(x))


@pytest.mark.parametrize(("in_features", "out_features", "rank"), [(5, 7, 5), (7, 5, 5), (5, 7, 6)])
def test_ranks_that_are_not_low_are_refused(in_features, out_features, rank):
    with pytest.raises(ValueError, match="`rank` must be at least 1 and less than both features; got"):
        LowRankLinear.empty(in_features, out_features, rank, bias=False)


def test_printing_a_layer_shows_features_and_rank():
    assert "in_features=7, out_features=6, rank=4" in repr(LowRankLinear.empty(7, 6, 4, bias=False))


# -- reduced precision ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dim", [64, 128, 256, 384])
@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_of_as_many_bfloat16_numbers_the_pivoted_ones_are_nearer_to_the_weight(dim, ratio):
    """A weight of full rank, whose singular values fall as those of real ones do."""
    left, _, right, _ = factors_for(dim, dim, dim)
    core = torch.diag(torch.arange(1, dim + 1, dtype=torch.float64) ** -0.5)
    x = randn(9, 64, dim).bfloat16()
    expected = linear(x.double(), left @ core @ right.mT)
    errors, exact = {}, {}
    for storage, kind in (("factored", LowRankLinear), ("pivoted", RowPivotedLinear)):
        rank = uniform_rank(ratio, dim, dim, storage)
        layer = kind.from_factors(left[:, :rank], core[:rank, :rank], right[:, :rank], None, dtype=torch.bfloat16)
        errors[storage] = relative_error(layer(x), expected)
        exact[storage] = relative_error(
            x.double() @ (left[:, :rank] @ core[:rank, :rank] @ right[:, :rank].mT).mT, expected
        )
    assert errors["pivoted"] < 1.01 * exact["pivoted"] < errors["factored"]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_activations_beyond_the_range_of_float16_pass(kind):
    *factors, bias = factors_for(64, 96, 40)
    layer = kind.from_factors(*factors, bias, dtype=torch.bfloat16)
    x = 3e5 * randn(9, 8, 96)
    output = layer(x.bfloat16())
    assert output.abs().max() > 1e5
    assert relative_error(output, layer.double()(x)) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_outputs_have_the_dtype_of_those_of_a_linear_layer_under_autocast(kind, dtype, autocast, has_bias):
    *factors, bias = factors_for(6, 7, 4)
    layer = kind.from_factors(*factors, bias if has_bias else None, dtype=dtype)
    x = randn(0, 2, 7).to(dtype)
    dense = torch.nn.Linear(7, 6, bias=has_bias, dtype=dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        output, expected = layer(x), dense(x)
    assert output.dtype == expected.dtype
    assert relative_error(output, layer.double()(x.double())) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_layers_without_values_tell_shape_and_dtype(kind):
    layer = kind.empty(7, 6, 4, bias=True, device="meta", dtype=torch.bfloat16)
    output = layer(torch.empty(2, 7, device="meta", dtype=torch.bfloat16))
    assert (output.shape, output.dtype) == ((2, 6), torch.bfloat16)


# -- tools ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_to_one_graph(kind, dtype, backend):
    torch._dynamo.reset()
    layer = kind.from_factors(*factors_for(6, 7, 4), dtype=dtype)
    x = randn(0, 3, 7).to(dtype)
    run = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(x), layer(x), rtol=0, atol=0)
    run(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph_under_autocast(kind):
    torch._dynamo.reset()
    layer = kind.from_factors(*factors_for(6, 7, 4), dtype=torch.float32)
    x = randn(0, 3, 7).float()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(run(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exports_with_a_dynamic_batch(kind, dtype):
    layer = kind.from_factors(*factors_for(6, 7, 4), dtype=dtype)
    program = torch.export.export(
        layer, (randn(0, 3, 7).to(dtype),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}
    )
    x = randn(1, 11, 7).to(dtype)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=0)


PIVOTED = [RowPivotedLinear, ColumnPivotedLinear]


def pivoted_layer(kind, dtype, *, seed=0):
    """Return a layer whose rows are chosen in pairs: all sizes are even."""
    left, core, right, _ = factors_for(12, 16, 6, seed=seed)
    return kind.from_factors(left, core, right, None, dtype=dtype)


def with_one_by_one(layer):
    """Return a function that computes what the layer does from an order that is never taken in pairs."""
    name = "row_index" if isinstance(layer, RowPivotedLinear) else "column_index"
    index = getattr(layer, name).long()

    def compute(x):
        if name == "row_index":
            chosen = layer.rows(x)
            return torch.cat([chosen, layer.others(chosen)], dim=1)[:, index]
        ordered = x[:, index]
        return layer.columns(layer.others(ordered[:, layer.rank :]) + ordered[:, : layer.rank])

    return compute


@pytest.mark.parametrize("kind", PIVOTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_taking_pairs_changes_no_bit(kind, dtype, num_rows):
    layer = pivoted_layer(kind, dtype)
    x = randn(1, num_rows, 16).to(dtype)
    with mock.patch("peft_jactus.deployment.layers.take_columns", wraps=take_columns) as one_by_one, torch.no_grad():
        output = layer(x)
    assert one_by_one.called is (dtype == torch.float32)
    assert torch.equal(output, with_one_by_one(layer)(x))


@pytest.mark.parametrize("kind", PIVOTED)
def test_inputs_that_are_views_are_taken_right(kind):
    layer = pivoted_layer(kind, torch.bfloat16)
    memory = randn(1, 40, 18).bfloat16()
    views = [memory[:, 1:17], memory[::2, :16], memory.flatten()[1 : 1 + 160].view(10, 16), memory[:16, :16].mT]
    with torch.no_grad():
        for x in views:
            assert torch.equal(layer(x), with_one_by_one(layer)(x))


@pytest.mark.parametrize("kind", PIVOTED)
@pytest.mark.parametrize("assign", [False, True])
def test_values_that_are_loaded_later_bring_their_order(kind, assign):
    layer, other = pivoted_layer(kind, torch.bfloat16), pivoted_layer(kind, torch.bfloat16, seed=7)
    x = randn(1, 5, 16).bfloat16()
    with torch.no_grad():
        assert not torch.equal(layer(x), other(x))
        layer.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(layer(x), other(x))
        assert torch.equal(copy.deepcopy(layer)(x), other(x))


@pytest.mark.parametrize("kind", PIVOTED)
def test_an_order_without_pairs_is_taken_one_by_one(kind):
    left, core, right, _ = factors_for(12, 16, 5)
    layer = kind.from_factors(left, core, right, None, dtype=torch.bfloat16)
    x = randn(1, 5, 16).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), with_one_by_one(layer)(x))


@pytest.mark.parametrize("kind", PIVOTED)
def test_gradients_pass_through_an_order_in_pairs(kind):
    layer = pivoted_layer(kind, torch.bfloat16)
    x = randn(1, 5, 16).bfloat16().requires_grad_()
    layer(x).float().square().sum().backward()
    with torch.no_grad():
        expected = 2 * layer(x).float() @ layer.dense_weight()
    assert relative_error(x.grad, expected.double()) < 0.03
    assert all(parameter.grad is not None for parameter in layer.parameters())


# torch's own forward mode compiles its decompositions with the deprecated torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", PIVOTED)
def test_derivatives_in_forward_mode_pass_through_an_order_in_pairs(kind):
    layer = pivoted_layer(kind, torch.bfloat16).requires_grad_(False)
    x, direction = randn(1, 5, 16).bfloat16(), randn(2, 5, 16).bfloat16()
    _, derivative = torch.func.jvp(layer, (x,), (direction,))
    assert relative_error(derivative, direction.double() @ layer.dense_weight().double().mT) < 0.03


def test_all_forms_are_tested():
    def leaves(kind):
        forms = [form for form in kind.__subclasses__() if form.__module__ == "peft_jactus.deployment.layers"]
        return set().union(*map(leaves, forms)) if forms else {kind}

    assert leaves(FactorizedLinear) == set(KINDS)


# -- layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [LowRankLinear, RowPivotedLinear, ColumnPivotedLinear])
def test_parts_with_more_rows_than_columns_are_laid_out_by_columns_and_compute_the_same(form):
    layer = form.empty(40, 56 if form is not RowPivotedLinear else 24, 8, bias=True)
    x = torch.randn(3, 40)
    expected = layer(x)
    arrange_parts_(layer)
    parts = [part for part in layer.children() if isinstance(part, torch.nn.Linear)]
    tall = [part.out_features > part.in_features for part in parts]
    assert any(tall)
    assert [part.weight.mT.is_contiguous() for part in parts] == tall
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def arranged(form):
    layer = form.from_factors(*factors_for(40, 56 if form is RowPivotedLinear else 24, 8), dtype=torch.float32).eval()
    arrange_parts_(layer)
    assert not all(parameter.is_contiguous() for parameter in layer.parameters())
    return layer


@torch.no_grad()
@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("is_part", [False, True])
def test_other_tools_get_contiguous_parameters(form, is_part, tmp_path):
    layer = arranged(form)
    model = torch.nn.Sequential(layer) if is_part else layer
    x = randn(0, 3, layer.in_features).float()
    expected = model(x)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    flat = torch.nn.utils.parameters_to_vector(model.parameters())
    filled = arranged(form)
    torch.nn.utils.vector_to_parameters(flat, filled.train().parameters())
    torch.testing.assert_close(filled(x), expected, rtol=1e-6, atol=1e-6)
    for parameter in filled.parameters():
        parameter.zero_()
    filled.load_state_dict({
        name.removeprefix("0."): t for name, t in load_file(tmp_path / "model.safetensors").items()
    })
    torch.testing.assert_close(filled(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", KINDS)
def test_an_arranged_layer_keeps_its_parameters_and_shares_them_with_its_state_dict(form):
    layer = arranged(form)
    before = dict(layer.named_parameters())
    with torch.inference_mode():
        state = layer.state_dict()
    layer.train()
    for name, parameter in layer.named_parameters():
        assert parameter is before[name]
        assert parameter.data_ptr() == state[name].data_ptr()
    layer(randn(0, 3, layer.in_features).float()).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert all(torch.equal(parameter, state[name]) for name, parameter in layer.named_parameters())
