import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_jactus.numerics.approximation import (
    project,
    project_weight,
)
from peft_jactus.numerics.metrics import regularized_covariance
from peft_jactus.numerics.moments import LayerStatistics
from peft_jactus.numerics.subspaces import Subspace
from tests.support import oracles
from tests.support.options import decomposition_options
from tests.support.strategies import (
    covariances,
    dims,
    moment_from,
    moment_of,
    orthonormal,
    randn,
    random_orthonormal,
    regular_covariances,
    seeds,
    statistics_of,
    weights,
)

# Norms of weights and covariances are at most 1, condition numbers of covariances at most 1e4.
ROUNDING = 1e-12
# What is divided by a root of condition 1e2 on either side.
UNWHITENED = 1e-9
# Unions are cut between eigenvectors that were computed in float32, turned by at most eps / gap.
FLOAT32_CUT = 1e-5

# Singular values whose squares are rounding errors of the sum of squares count as zeros: sqrt(12 eps) = 5e-8.
NUMERICAL_RANK = 1e-7

# Statistics as they are: no estimator between them and the oracle.
EXACT = {"shrinkage": 0.0, "damping": 0.0}
WHOLE_SPACE = decomposition_options(weight_energy=1, input_energy=1, gradient_energy=1, **EXACT)
JACTUS = decomposition_options(weight_energy=0.9, input_energy=0.8, gradient_energy=0.8, **EXACT)
SVD = decomposition_options(decomposition="svd")


@st.composite
def problems(draw, **spectrum):
    """A weight, both covariances, and a rank."""
    out_features, in_features = draw(dims), draw(dims)
    W = draw(weights(out_features, in_features, **spectrum))
    C_g = draw(regular_covariances(out_features))
    C_x = draw(regular_covariances(in_features))
    return W, C_g, C_x, draw(st.integers(1, min(out_features, in_features)))


def separated(seed, dim, *, ratio=0.3):
    """A covariance whose eigenvalues fall by ``ratio``, so that no cut between them is ambiguous."""
    V = random_orthonormal(seed, dim, dim)
    return V @ torch.diag(ratio ** torch.arange(dim, dtype=torch.float64)) @ V.mT


def fixed_problem(seed=0, out_features=7, in_features=9):
    W = randn(seed, out_features, in_features) / 3
    return W, separated(seed + 1, out_features), separated(seed + 2, in_features)


# -- the three identities of METHODS 1.3 ------------------------------------------------------------------


@given(problem=problems())
def test_with_whole_spaces_it_is_the_kfac_weighted_optimum(problem):
    W, C_g, C_x, rank = problem
    factors = project_weight(W, statistics_of(C_g, C_x), WHOLE_SPACE).truncate(rank)
    expected = oracles.weighted_truncation(W, C_g, C_x, rank)
    # Errors, since a repeated singular value leaves the minimiser open.
    assert oracles.weighted_error(W - factors.dense(), C_g, C_x) == pytest.approx(
        oracles.weighted_error(W - expected, C_g, C_x), abs=ROUNDING
    )


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_with_whole_spaces_it_is_the_kfac_weighted_minimiser(rank):
    W, C_g, C_x = fixed_problem()
    factors = project_weight(W, statistics_of(C_g, C_x), WHOLE_SPACE).truncate(rank)
    expected = oracles.weighted_truncation(W, C_g, C_x, rank)
    torch.testing.assert_close(factors.dense(), expected, rtol=0, atol=UNWHITENED)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_without_a_gradient_metric_it_is_svd_llm(rank):
    W, _, C_x = fixed_problem()
    statistics = statistics_of(torch.eye(7, dtype=torch.float64), C_x)
    factors = project_weight(W, statistics, WHOLE_SPACE).truncate(rank)
    expected = oracles.svd_llm_truncation(W, C_x, rank)
    torch.testing.assert_close(factors.dense(), expected, rtol=0, atol=UNWHITENED)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_without_any_metric_it_is_plain_svd(rank):
    W, _, _ = fixed_problem()
    eyes = (torch.eye(dim, dtype=torch.float64) for dim in (7, 9))
    expected = oracles.truncated_svd(W, rank)
    for projected in (
        project_weight(W, statistics_of(*eyes), WHOLE_SPACE),
        project_weight(W, None, SVD),
    ):
        torch.testing.assert_close(projected.truncate(rank).dense(), expected, rtol=0, atol=ROUNDING)


# -- optimality inside the union --------------------------------------------------------------------------


@st.composite
def projected_problems(draw):
    """A weight, both covariances, bases of a subspace on each side, and a rank."""
    W, C_g, C_x, rank = draw(problems())
    return W, C_g, C_x, draw(orthonormal(len(C_g))), draw(orthonormal(len(C_x))), rank


def solve(W, C_g, C_x, left, right):
    return project(
        W,
        gradient_metric=C_g,
        input_metric=C_x,
        left=left,
        right=right,
    )


@given(problem=projected_problems())
def test_error_inside_the_union_is_that_of_the_dense_least_squares_solution(problem):
    W, C_g, C_x, Q_left, Q_right, rank = problem
    projected = solve(W, C_g, C_x, Subspace(basis=Q_left), Subspace(basis=Q_right))
    expected = oracles.projected_optimum(W, C_g, C_x, Q_left, Q_right, rank)
    assert oracles.weighted_error(W - projected.truncate(rank).dense(), C_g, C_x) == pytest.approx(
        oracles.weighted_error(W - expected, C_g, C_x), abs=ROUNDING
    )


@given(problem=projected_problems())
def test_squared_error_is_the_tail_of_the_gains(problem):
    W, C_g, C_x, Q_left, Q_right, rank = problem
    projected = solve(W, C_g, C_x, Subspace(basis=Q_left), Subspace(basis=Q_right))
    error = oracles.weighted_error(W - projected.truncate(rank).dense(), C_g, C_x)
    assert projected.total_energy == pytest.approx(oracles.weighted_error(W, C_g, C_x), abs=ROUNDING)
    tail = projected.total_energy - float(projected.gains()[:rank].sum())
    assert error == pytest.approx(tail, abs=ROUNDING)


@given(problem=projected_problems(), step=st.sampled_from([1e-4, 1e-2, 1.0]), seed=seeds)
def test_no_competitor_of_the_same_rank_inside_the_union_is_better(problem, step, seed):
    W, C_g, C_x, Q_left, Q_right, rank = problem
    projected = solve(W, C_g, C_x, Subspace(basis=Q_left), Subspace(basis=Q_right))
    best = projected.truncate(rank)
    error = oracles.weighted_error(W - best.dense(), C_g, C_x)
    # Near the minimiser (a small step) and far from it.
    k = best.left.shape[1]
    A = Q_left.mT @ best.left @ best.core + step * randn(seed, Q_left.shape[1], k)
    B = Q_right.mT @ best.right + step * randn(seed + 1, Q_right.shape[1], k)
    competitor = Q_left @ A @ B.mT @ Q_right.mT
    assert oracles.weighted_error(W - competitor, C_g, C_x) >= error - ROUNDING


@given(problem=projected_problems())
def test_result_lies_inside_the_union(problem):
    W, C_g, C_x, Q_left, Q_right, rank = problem
    projected = solve(W, C_g, C_x, Subspace(basis=Q_left), Subspace(basis=Q_right))
    W_r = projected.truncate(rank).dense()
    inside = Q_left @ Q_left.mT @ W_r @ Q_right @ Q_right.mT
    torch.testing.assert_close(W_r, inside, rtol=0, atol=UNWHITENED)


@given(problem=projected_problems())
def test_a_subspace_held_by_its_complement_gives_the_same(problem):
    W, C_g, C_x, Q_left, Q_right, rank = problem
    by_basis = solve(W, C_g, C_x, Subspace(basis=Q_left), Subspace(basis=Q_right))
    by_complement = solve(W, C_g, C_x, complemented(Q_left), complemented(Q_right))
    assert by_complement.max_rank == by_basis.max_rank
    torch.testing.assert_close(by_complement.gains(), by_basis.gains(), rtol=0, atol=ROUNDING)
    errors = (
        oracles.weighted_error(W - projected.truncate(rank).dense(), C_g, C_x)
        for projected in (by_basis, by_complement)
    )
    assert next(errors) == pytest.approx(next(errors), abs=ROUNDING)


def complemented(basis):
    """The same subspace, held by a basis of its orthogonal complement; None for the whole space."""
    dim, k = basis.shape
    return None if k == dim else Subspace(complement=torch.linalg.qr(basis, "complete").Q[:, k:])


@given(problem=problems())
def test_gains_are_non_increasing_and_at_most_the_total(problem):
    W, C_g, C_x, _ = problem
    projected = project_weight(W, statistics_of(C_g, C_x), JACTUS)
    gains = projected.gains()
    assert gains.shape == (projected.max_rank,)
    assert (gains >= 0).all()
    assert (gains.diff() <= 0).all()
    assert float(gains.sum()) <= projected.total_energy + ROUNDING


@given(problem=problems())
def test_statistics_only_widen_the_weights_own_leading_directions(problem):
    W, C_g, C_x, rank = problem
    projected = project_weight(W, statistics_of(C_g, C_x), JACTUS)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    k = int((sigma.square().cumsum(0) < 0.9 * sigma.square().sum()).sum()) + 1
    own = oracles.projected_optimum(W, C_g, C_x, U[:, :k], Vh[:k].mT, rank)
    error = oracles.weighted_error(W - projected.truncate(rank).dense(), C_g, C_x)
    assert error <= oracles.weighted_error(W - own, C_g, C_x) + ROUNDING


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(  # on both sides of half the dimension
    ("weight_energy", "input_energy", "gradient_energy"),
    [(0.6, 0.6, 0.6), (0.5, 0.7, 0.95), (0.4, 0.999, 0.7), (0.7, 0.0, 0.95), (0.7, 0.9, 0.0)],
)
def test_jactus_is_the_optimum_inside_the_union_of_leading_directions(
    rank, weight_energy, input_energy, gradient_energy
):
    W, C_g, C_x = fixed_problem()
    options = decomposition_options(
        weight_energy=weight_energy, input_energy=input_energy, gradient_energy=gradient_energy, **EXACT
    )
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    k = least_count(sigma.square(), weight_energy)
    Q_left = torch.cat([U[:, :k], leading_eigenvectors(C_g, gradient_energy)], dim=1)
    Q_right = torch.cat([Vh[:k].mT, leading_eigenvectors(C_x, input_energy)], dim=1)
    Q_left, Q_right = (torch.linalg.svd(Q, full_matrices=False).U for Q in (Q_left, Q_right))
    expected = oracles.projected_optimum(W, C_g, C_x, Q_left, Q_right, rank)
    actual = project_weight(W, statistics_of(C_g, C_x), options).truncate(rank).dense()
    torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT32_CUT)


def least_count(energies, ratio):
    return next(k for k in range(99) if energies[:k].sum() >= ratio * energies.sum())


def leading_eigenvectors(C, energy):
    eigenvalues, V = torch.linalg.eigh(C)
    return V.flip(1)[:, : least_count(eigenvalues.flip(0), energy)]


# -- form of the result -----------------------------------------------------------------------------------


@given(problem=problems())
def test_factors_have_orthonormal_bases(problem):
    W, C_g, C_x, rank = problem
    factors = project_weight(W, statistics_of(C_g, C_x), JACTUS).truncate(rank)
    k = len(factors.core)
    assert k <= rank
    for basis in (factors.left, factors.right):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(k, dtype=torch.float64), rtol=0, atol=ROUNDING)


@given(problem=problems())
def test_full_rank_reproduces_the_weight(problem):
    W, C_g, C_x, _ = problem
    by_svd = project_weight(W, None, SVD)
    torch.testing.assert_close(by_svd.truncate(by_svd.max_rank).dense(), W, rtol=0, atol=UNWHITENED)
    projected = project_weight(W, statistics_of(C_g, C_x), decomposition_options(weight_energy=1, **EXACT))
    error = W - projected.truncate(projected.max_rank).dense()
    # Directions that count as zeros are not in the subspace; what each costs is measured in the metric.
    assert oracles.weighted_error(error, C_g, C_x) <= min(W.shape) * NUMERICAL_RANK**2
    if torch.linalg.svdvals(W)[-1] > NUMERICAL_RANK:
        torch.testing.assert_close(error, torch.zeros_like(W), rtol=0, atol=UNWHITENED)


@pytest.mark.parametrize("scales", [(1e-30, 1e30), (1e10, 1e-5), (3.0, 3.0)])
@pytest.mark.parametrize("rank", [1, 3])
def test_scaling_statistics_changes_nothing(scales, rank):
    W, C_g, C_x = fixed_problem()
    options = decomposition_options(input_energy=0.8, gradient_energy=0.8, shrinkage=0.1)
    scaled = (scale * C for scale, C in zip(scales, (C_g, C_x), strict=True))
    one = project_weight(W, statistics_of(C_g, C_x), options)
    other = project_weight(W, statistics_of(*scaled), options)
    assert one.max_rank == other.max_rank
    torch.testing.assert_close(other.truncate(rank).dense(), one.truncate(rank).dense(), rtol=0, atol=FLOAT32_CUT)


@given(seed=seeds, rank=st.integers(1, 5))
def test_rotating_the_input_basis_commutes_with_truncation(seed, rank):
    W, C_g, C_x = fixed_problem(seed)
    R = random_orthonormal(seed + 3, len(C_x), len(C_x))
    one = project_weight(W, statistics_of(C_g, C_x), WHOLE_SPACE).truncate(rank).dense()
    rotated = project_weight(W @ R, statistics_of(C_g, R.mT @ C_x @ R), WHOLE_SPACE)
    torch.testing.assert_close(rotated.truncate(rank).dense(), one @ R, rtol=0, atol=UNWHITENED)


def test_zero_weight_is_approximated_by_zero():
    W, C_g, C_x = fixed_problem()
    alone = decomposition_options(input_energy=0, gradient_energy=0)
    for options in (JACTUS, alone, SVD):
        projected = project_weight(0 * W, statistics_of(C_g, C_x), options)
        factors = projected.truncate(2)
        assert 1 <= len(factors.core) <= projected.max_rank
        assert not factors.dense().any()


@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_terms_beyond_the_rank_of_a_weight_stay_small(shape):
    W = randn(0, shape[0], 2) @ randn(1, 2, shape[1])
    C_g, C_x = (separated(2 + side, dim) for side, dim in enumerate(shape))
    for options in (WHOLE_SPACE, JACTUS, SVD):
        projected = project_weight(W, statistics_of(C_g, C_x), options)
        left, right = projected.terms(projected.max_rank)
        torch.testing.assert_close(left @ right.mT, W, rtol=0, atol=UNWHITENED)
        largest = max(float(side[:, :2].abs().max()) for side in (left, right))
        assert all(float(side.abs().max()) <= 1e4 * largest for side in (left, right))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_weights_are_decomposed_in_float64(dtype):
    W, C_g, C_x = fixed_problem()
    statistics = statistics_of(C_g.float(), C_x.float())
    factors = project_weight(W.to(dtype), statistics, WHOLE_SPACE).truncate(7)
    assert factors.left.dtype == factors.right.dtype == factors.core.dtype == W.dtype
    torch.testing.assert_close(factors.dense(), W.to(dtype).double(), rtol=0, atol=UNWHITENED)


# -- regularization ---------------------------------------------------------------------------------------


@given(data=st.data(), dim=dims)
def test_shrinkage_and_damping_move_towards_a_scaled_identity(data, dim):
    C = data.draw(covariances(dim, min_rank=1))
    moment, mean_eigenvalue = moment_of(C), float(C.trace()) / dim
    eye = torch.eye(dim, dtype=torch.float64)
    actual = regularized_covariance(moment, shrinkage=0.3, damping=0.01)
    expected = 0.7 * C + 0.31 * mean_eigenvalue * eye
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING)
    assert float(torch.linalg.eigvalsh(actual)[0]) > 0.3 * mean_eigenvalue


def test_ledoit_wolf_shrinkage_is_used_by_name():
    vectors = randn(0, 8, 4)
    moment = moment_from(vectors)
    rho = oracles.ledoit_wolf_shrinkage(vectors)
    assert 0.1 < rho < 1
    actual = regularized_covariance(moment, shrinkage="ledoit-wolf", damping=0.0)
    expected = regularized_covariance(moment, shrinkage=rho, damping=0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING)


def test_covariance_is_not_changed_by_regularizing_it():
    moment = moment_from(randn(0, 8, 4))
    before = moment.covariance
    regularized_covariance(moment, shrinkage=0.5, damping=0.1)
    assert torch.equal(moment.covariance, before)


@pytest.mark.parametrize("side", ["input", "gradient"])
def test_statistics_of_zeros_are_refused(side):
    W, C_g, C_x = fixed_problem()
    moments = {"input": moment_of(C_x), "gradient": moment_of(C_g)}
    moments[side] = moment_of(0 * moments[side].covariance)
    with pytest.raises(ValueError, match="at least one non-zero vector"):
        project_weight(W, LayerStatistics(**moments), JACTUS)


def test_missing_statistics_are_refused_unless_the_decomposition_needs_none():
    W = fixed_problem()[0]
    with pytest.raises(ValueError, match="`statistics` must be given for decomposition='jactus'"):
        project_weight(W, None, JACTUS)
    assert project_weight(W, None, SVD).max_rank == 7
    assert JACTUS.needs_statistics
    assert not SVD.needs_statistics
