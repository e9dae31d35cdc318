"""The product of the chosen factors: two products, the kernel that does both on a GPU, and when which of them runs.

The kernel runs in Triton's interpreter and is compiled for GPUs that are not here; on a GPU it runs as it is.
"""

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from peft_jactus.parse.kernels import MAX_FUSED_ROWS, low_rank_product
from tests.support.strategies import dims, randn, seeds

FLOAT64 = 1e-12
# Sums of up to 4096 products, one after the other
FLOAT32 = 5e-6
ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "peft_jactus" / "routing" / "fused.py"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def factors_for(in_features, out_features, rank, dtype=torch.float64, *, by_columns=False, has_bias=True):
    """Return ``down``, ``up`` and the bias; ``up`` in one of the layouts that the layers have."""
    down = (randn(0, rank, in_features) / in_features**0.5).to(dtype)
    up = (randn(1, out_features, rank) / max(rank, 1) ** 0.5).to(dtype)
    return down, up.mT.contiguous().mT if by_columns else up, randn(2, out_features).to(dtype) if has_bias else None


def expected_product(x, down, up, bias):
    return linear(x.double(), up.double() @ down.double(), None if bias is None else bias.double())


# -- two products -----------------------------------------------------------------------------------------


@given(
    seed=seeds,
    in_features=dims,
    out_features=dims,
    rank=st.integers(0, 12),
    shape=st.sampled_from([(), (0,), (3,), (2, 1), (2, 4, 5)]),
    by_columns=st.booleans(),
    has_bias=st.booleans(),
)
def test_output_is_that_of_the_dense_weight(seed, in_features, out_features, rank, shape, by_columns, has_bias):
    factors = factors_for(in_features, out_features, rank, by_columns=by_columns, has_bias=has_bias)
    x = randn(seed, *shape, in_features)
    expected = expected_product(x, *factors)
    torch.testing.assert_close(low_rank_product(x, *factors), expected, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_has_the_dtype_of_the_input_and_its_accuracy(dtype):
    factors = factors_for(200, 130, 40, dtype)
    x = randn(3, 4, 1, 200).to(dtype)
    output = low_rank_product(x, *factors)
    expected = expected_product(x, *factors)
    assert output.dtype == dtype
    assert (output.double() - expected).norm() <= max(FLOAT32, torch.finfo(dtype).eps) * expected.norm()


def test_gradients_reach_input_and_factors():
    inputs = [tensor.requires_grad_() for tensor in (randn(3, 2, 5), *factors_for(5, 4, 3))]
    assert torch.autograd.gradcheck(low_rank_product, inputs)


# -- which of them runs -----------------------------------------------------------------------------------


class TensorOnGpu(torch.Tensor):
    """Says that it is on a GPU, and computes on the CPU."""

    is_cuda = True


@pytest.fixture
def fused_calls(monkeypatch):
    """Stand-ins for Triton and the kernel; returns the shapes of the inputs that the kernel gets."""
    calls = []
    triton = ModuleType("triton")
    triton.__spec__ = ModuleSpec("triton", None)
    fused = ModuleType("peft_jactus.parse.fused")

    def fused_low_rank_product(x, down, up, bias):
        calls.append(tuple(x.shape))
        return linear(linear(x, down), up, bias)

    fused.fused_low_rank_product = fused_low_rank_product
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "peft_jactus.parse.fused", fused)
    return calls


def product_on_gpu(shape=(2, 1, 8), dtype=torch.float32, factor_dtype=None, *, requires_grad=False):
    """Run on a stand-in for a GPU, and check that the output does not depend on the way taken."""
    x = randn(3, *shape).to(dtype).as_subclass(TensorOnGpu).requires_grad_(requires_grad)
    factors = factors_for(8, 6, 4, factor_dtype or dtype)
    output = low_rank_product(x, *factors)
    assert torch.equal(output, linear(linear(x, factors[0]), *factors[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 1, 8), (MAX_FUSED_ROWS, 1, 8), (2, MAX_FUSED_ROWS // 2, 8)])
def test_few_vectors_on_a_gpu_run_as_one_kernel(fused_calls, shape, dtype):
    product_on_gpu(shape, dtype)
    assert fused_calls == [shape]


def test_more_vectors_run_as_two_products(fused_calls):
    product_on_gpu((MAX_FUSED_ROWS + 1, 8))
    assert fused_calls == []


def test_other_dtypes_run_as_two_products(fused_calls):
    product_on_gpu(dtype=torch.float64)
    assert fused_calls == []


def test_inputs_that_need_gradients_run_as_two_products(fused_calls):
    product_on_gpu(requires_grad=True)
    assert fused_calls == []
    with torch.no_grad():
        product_on_gpu(requires_grad=True)
    assert len(fused_calls) == 1


def test_on_a_cpu_two_products_run(fused_calls):
    factors = factors_for(8, 6, 4, torch.float32)
    x = randn(3, 1, 8).float()
    assert torch.equal(low_rank_product(x, *factors), linear(linear(x, factors[0]), *factors[1:]))
    assert fused_calls == []


def test_without_triton_two_products_run_on_a_gpu(fused_calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    product_on_gpu()
    assert fused_calls == []


# -- the kernel without a GPU -----------------------------------------------------------------------------

LOAD = f"""
import importlib.util, json, torch
# By its path: the package would import all of PEFT
spec = importlib.util.spec_from_file_location("fused", {str(KERNEL)!r})
fused = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fused)
"""

INTERPRET = """
from torch.nn.functional import linear
torch.set_num_threads(1)
torch.manual_seed(0)

def tensor(*shape, transposed=False, dtype):
    *leading, a, b = shape
    return (torch.randn(*leading, b, a).mT if transposed else torch.randn(*shape)).to(dtype)

errors = []
# rows, features in and out, rank: around the sizes of the blocks, below them, and none
shapes = [(1, 256, 512, 32), (1, 300, 257, 17), (3, 129, 700, 100), (16, 37, 1, 16), (5, 600, 90, 1), (1, 1, 1, 1)]
shapes += [(2, 40, 30, 0), (0, 40, 30, 8), (17, 130, 50, 33)]
for case, (rows, in_features, out_features, rank) in enumerate(shapes):
    for dtype in (torch.float32, torch.float16):
        for by_columns in (False, True):
            x = tensor(rows, in_features, transposed=case % 2 == 1, dtype=dtype)
            x = x.unsqueeze(1) if case % 3 else x
            down = tensor(rank, in_features, dtype=dtype) / in_features**0.5
            up = tensor(out_features, rank, transposed=by_columns, dtype=dtype) / max(rank, 1) ** 0.5
            bias = tensor(1, out_features, dtype=dtype)[0] if (case + by_columns) % 2 or not rank else None
            output = fused.fused_low_rank_product(x, down, up, bias)
            expected = linear(x.double(), up.double() @ down.double(), None if bias is None else bias.double())
            assert output.shape == expected.shape and output.dtype == dtype
            error, size = (output.double() - expected).norm(), expected.norm()
            errors.append([str((rows, in_features, out_features, rank)), str(dtype), float(error), float(size)])
print(json.dumps(errors))
"""

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernel = fused._kernel
constants = {"ROWS": 16, "RANK_BLOCK": 16, "FEATURE_BLOCK": 256, "up_rank_stride": 1}
signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
signature.update(dict.fromkeys(("x", "down", "up", "bias"), "*bf16"), sums="*fp32")
source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
print(json.dumps(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]))
"""


def run_with_triton(script, tmp_path, **variables):
    """Run a script in a process of its own, as Triton reads the environment when it is imported."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)} | variables
    command = [sys.executable, "-c", LOAD + script]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@needs_triton
def test_the_interpreted_kernel_is_as_accurate_as_its_dtype(tmp_path):
    # Not in bfloat16: the interpreter multiplies its bits as integers.
    errors = run_with_triton(INTERPRET, tmp_path, TRITON_INTERPRET="1")
    tolerances = {str(dtype): max(FLOAT32, torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float16)}
    assert {dtype for _, dtype, _, _ in errors} == set(tolerances)
    assert [case for case in errors if not case[2] <= tolerances[case[1]] * case[3]] == []


@needs_triton
def test_the_kernel_compiles_to_tensor_core_instructions(tmp_path):
    assert "mma.sync" in run_with_triton(COMPILE, tmp_path, TRITON_INTERPRET="0")


# -- the kernel on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no CUDA device")
@pytest.mark.filterwarnings("default:TRITON_DEFAULT_FP_FUSION:UserWarning")  # Triton 3.9 announces a change
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 3, MAX_FUSED_ROWS])
@pytest.mark.parametrize(
    ("in_features", "out_features", "rank"), [(4096, 4096, 1000), (300, 257, 17), (129, 700, 64), (40, 30, 0)]
)
def test_kernel_and_two_products_agree_on_a_gpu(
    dtype, by_columns, has_bias, num_rows, in_features, out_features, rank
):
    from peft_jactus.parse.fused import fused_low_rank_product

    factors = factors_for(in_features, out_features, rank, dtype, by_columns=by_columns, has_bias=has_bias)
    down, up, bias = (None if tensor is None else tensor.cuda() for tensor in factors)
    x = randn(3, in_features, num_rows).to(dtype).cuda().mT.unsqueeze(1)
    expected = expected_product(x, down, up, bias)
    tolerance = max(FLOAT32, torch.finfo(dtype).eps) * expected.norm()
    for output in (fused_low_rank_product(x, down, up, bias), linear(linear(x, down), up, bias)):
        assert output.dtype == dtype
        assert output.shape == expected.shape
        assert (output.double() - expected).norm() <= tolerance
