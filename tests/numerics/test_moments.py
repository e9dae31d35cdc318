import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_jactus.numerics.metrics import regularized_covariance
from peft_jactus.numerics.moments import SecondMoment
from tests.support import oracles
from tests.support.strategies import dims, moment_from, randn, seeds

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of less than 50 terms of order 1, in any order
num_vectors = st.integers(1, 40)


def assert_moments_equal(one, other):
    for name in ("scatter", "mean", "quartic_sum", "absolute_sum"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **EXACT)
    assert one.num_tokens == other.num_tokens


# -- SecondMoment -----------------------------------------------------------------------------------------


@given(seed=seeds, dim=dims, num=num_vectors)
def test_covariance_and_mean_are_those_of_the_vectors(seed, dim, num):
    vectors = randn(seed, num, dim)
    moment = moment_from(vectors)
    torch.testing.assert_close(moment.covariance, oracles.covariance(vectors), **EXACT)
    mean = oracles.mean(vectors)
    around_mean = oracles.covariance(vectors - mean) + torch.outer(mean, mean) / num
    torch.testing.assert_close(moment.centred_covariance, around_mean, **EXACT)
    torch.testing.assert_close(moment.mean, oracles.mean(vectors), **EXACT)
    assert (moment.dim, moment.num_tokens) == (dim, num)


@given(data=st.data(), seed=seeds, dim=dims, num=num_vectors)
def test_sums_do_not_depend_on_batches_or_order(data, seed, dim, num):
    vectors = randn(seed, num, dim)
    order = torch.tensor(data.draw(st.permutations(range(num))))
    cuts = data.draw(st.lists(st.integers(0, num), max_size=4).map(sorted))  # empty batches, too
    moment = SecondMoment.zeros(dim, dtype=torch.float64)
    for part in torch.tensor_split(vectors[order], cuts):
        moment.update_(part)
    assert_moments_equal(moment, moment_from(vectors))


@given(seed=seeds, dim=dims, sizes=st.tuples(num_vectors, num_vectors, num_vectors))
def test_merging_is_associative_and_equals_the_whole(seed, dim, sizes):
    vectors = randn(seed, sum(sizes), dim)

    def parts():
        return [moment_from(part) for part in vectors.split(sizes)]

    a, b, c = parts()
    a.merge_(b)
    a.merge_(c)  # (a + b) + c
    d, e, f = parts()
    e.merge_(f)
    d.merge_(e)  # a + (b + c)
    assert_moments_equal(a, d)
    assert_moments_equal(a, moment_from(vectors))


def test_merging_keeps_the_other_and_refuses_another_dimension():
    vectors = randn(0, 5, 3)
    mine, other = moment_from(vectors[:2]), moment_from(vectors[2:])
    mine.merge_(other)
    assert_moments_equal(other, moment_from(vectors[2:]))
    with pytest.raises(ValueError, match="`other` must have dimension 3; got 4"):
        mine.merge_(moment_from(randn(0, 1, 4)))


def test_clone_shares_nothing():
    moment = moment_from(randn(0, 5, 3))
    moment.clone().update_(randn(1, 5, 3))
    assert_moments_equal(moment, moment_from(randn(0, 5, 3)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_is_finite_notices_one_bad_entry(bad):
    vectors = randn(0, 5, 3)
    assert moment_from(vectors).is_finite()
    vectors[2, 1] = bad
    assert not moment_from(vectors).is_finite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vectors_are_summed_in_float32(dtype):
    """4096 ones and a half: the sum would stall at 256 in bfloat16 and at 2048 in float16."""
    moment = moment_from(torch.ones(4097, 1, dtype=dtype), dtype=torch.float32)
    assert 4097 * float(moment.covariance) == float(moment.quartic_sum) == float(moment.absolute_sum) == 4097


# Float32 sums of 20,000 squares.
FLOAT32_SUMS = 1e-5


def nearly_constant(seed, num, dim, *, mean, deviation):
    """Vectors whose first entry hardly varies, rounded to float32."""
    vectors = randn(seed, num, dim)
    vectors[:, 0] = mean + deviation * vectors[:, 0]
    return vectors.float()


@pytest.mark.parametrize("num_batches", [1, 100])
@pytest.mark.parametrize(("mean", "deviation"), [(3.1, 0.0), (3.1, 3e-3), (-100.0, 1e-2), (0.5, 1e-5)])
def test_the_variance_of_an_entry_that_hardly_varies_has_correct_digits(num_batches, mean, deviation):
    parts = [nearly_constant(seed, 200, 6, mean=mean, deviation=deviation) for seed in range(num_batches)]
    vectors = torch.cat(parts)
    moment = SecondMoment.zeros(6)
    for part in parts:
        moment.update_(part)
    exact = moment_from(vectors.double())
    assert_variances_close(moment, exact)
    halves = [moment_from(half, dtype=torch.float32) for half in vectors.sort(0).values.tensor_split(2)]
    halves[0].merge_(halves[1])  # of which one has the smaller values, the other the larger ones
    assert_variances_close(halves[0], moment_from(vectors.double().sort(0).values))


def assert_variances_close(moment, exact):
    """Compare entries of the covariance around the mean with the deviations, and the uncentred one with the sizes."""
    deviations, sizes = exact.centred_covariance.diagonal().sqrt(), exact.covariance.diagonal().sqrt()
    for name, scales in (("centred_covariance", deviations), ("covariance", sizes)):
        errors = (getattr(moment, name) - getattr(exact, name)).abs() / torch.outer(scales, scales)
        assert float(errors.max()) < FLOAT32_SUMS, name
    assert float(((moment.mean - exact.mean) / sizes).abs().max()) < 1e-7
    assert float(torch.linalg.eigvalsh(moment.centred_covariance)[0]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_entry_that_never_varies_leaves_the_metric_positive_definite(dtype):
    moment = SecondMoment.zeros(8, dtype=dtype)
    for seed in range(200):
        moment.update_(nearly_constant(seed, 64, 8, mean=30.1, deviation=0.0))
    covariance = regularized_covariance(moment, shrinkage=0.0, damping=1e-6, centred=True)
    assert float(torch.linalg.eigvalsh(covariance)[0]) > 0


def test_merging_with_no_vectors_changes_nothing():
    none, some = SecondMoment.zeros(3, dtype=torch.float64), moment_from(randn(0, 5, 3))
    some.merge_(none)
    assert_moments_equal(some, moment_from(randn(0, 5, 3)))
    none.merge_(SecondMoment.zeros(3))
    assert none.is_finite()
    none.merge_(some)
    assert_moments_equal(none, some)


@given(seed=seeds, dim=dims, num=num_vectors)
def test_the_scatter_around_any_point_is_that_of_the_vectors(seed, dim, num):
    vectors, point = randn(seed, num, dim), 3 * randn(seed + 1, dim)
    expected = num * oracles.covariance(vectors - point)
    torch.testing.assert_close(moment_from(vectors).scatter_around(point), expected, **EXACT)


# -- Ledoit and Wolf --------------------------------------------------------------------------------------


@given(seed=seeds, dim=dims, num=num_vectors)
def test_shrinkage_is_ledoit_and_wolfs(seed, dim, num):
    vectors = randn(seed, num, dim) * torch.logspace(0, -1, dim, dtype=torch.float64)
    if dim == 1:  # its own target: nothing to choose
        assert moment_from(vectors).ledoit_wolf_shrinkage() == 1.0
        return
    expected = oracles.ledoit_wolf_shrinkage(vectors)
    assert moment_from(vectors).ledoit_wolf_shrinkage() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("num", [5, 20, 80])
def test_shrinkage_brings_the_covariance_closer_to_the_true_one(num):
    scales = torch.logspace(0, -1, 20, dtype=torch.float64)
    true = torch.diag(scales.square())
    target = torch.eye(20, dtype=torch.float64)
    plain_error = shrunk_error = 0.0
    for seed in range(20):
        moment = moment_from(randn(seed, num, 20) * scales)
        C, rho = moment.covariance, moment.ledoit_wolf_shrinkage()
        shrunk = (1 - rho) * C + rho * C.diagonal().mean() * target
        plain_error += float((C - true).square().sum())
        shrunk_error += float((shrunk - true).square().sum())
    assert shrunk_error < plain_error


def test_shrinkage_vanishes_with_many_vectors():
    scales = torch.logspace(0, -1, 5, dtype=torch.float64)
    shrinkages = [moment_from(randn(0, num, 5) * scales).ledoit_wolf_shrinkage() for num in (10, 100, 10_000)]
    assert shrinkages == sorted(shrinkages, reverse=True)
    assert shrinkages[-1] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**20])  # powers of two: scaling itself rounds nothing
def test_shrinkage_does_not_depend_on_the_scale(dtype, scale):
    vectors = randn(0, 10, 4) * torch.logspace(0, -1, 4, dtype=torch.float64)
    shrinkage = moment_from(vectors, dtype=dtype).ledoit_wolf_shrinkage()
    assert 0.01 < shrinkage < 1
    scaled = moment_from(scale * vectors, dtype=dtype).ledoit_wolf_shrinkage()
    assert scaled == pytest.approx(shrinkage, rel=1e-12)
