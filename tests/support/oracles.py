"""What the package computes, computed again: slowly, obviously, in float64.

Nothing here imports `peft_jactus`. Sums run over single tokens, metrics are dense matrix square roots, minimisers come
from `pinv`, and allocations from trying everything.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# -- moments ----------------------------------------------------------------------------------------------


def covariance(vectors: Iterable[Tensor]) -> Tensor:
    """Uncentred covariance: the mean of the outer products."""
    outers = [torch.outer(x, x) for x in vectors]
    return sum(outers) / len(outers)


def mean(vectors: Iterable[Tensor]) -> Tensor:
    vectors = list(vectors)
    return sum(vectors) / len(vectors)


def ledoit_wolf_shrinkage(vectors: Sequence[Tensor]) -> float:
    """Ledoit & Wolf (2004), section 3.2, from the definitions; the mean is known to be zero."""
    C = covariance(vectors)
    target = C.trace() / len(C) * torch.eye(len(C), dtype=C.dtype)
    d2 = (C - target).square().sum()
    b2 = sum((torch.outer(x, x) - C).square().sum() for x in vectors) / len(vectors) ** 2
    return float(min(b2, d2) / d2)


# -- what calibration sees --------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Everything that entered one layer, and the gradient of the summed loss at its output, token by token."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


def calibration_tokens(
    model: nn.Module,
    names: Iterable[str],
    examples: Iterable[Mapping[str, Tensor]],
    summed_loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
) -> dict[str, Tokens]:
    """Run each example alone and unpadded, so that no mask and no batch size is involved.

    A zero is added to every output of each layer; the loss's gradient at that zero is the gradient at the output.
    """
    tokens = {name: Tokens() for name in names}
    zeros: list[tuple[str, Tensor]] = []

    def shift_by_zero(name, module, args, output):
        tokens[name].inputs += args[0].detach().reshape(-1, args[0].shape[-1]).unbind()
        zeros.append((name, torch.zeros_like(output, requires_grad=True)))
        return output + zeros[-1][1]

    handles = [
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: shift_by_zero(name, *args))
        for name in tokens
    ]
    for example in examples:
        zeros.clear()
        loss = summed_loss(model, example)
        gradients = torch.autograd.grad(loss, [zero for _, zero in zeros])
        for (name, _), gradient in zip(zeros, gradients, strict=True):
            tokens[name].gradients += gradient.reshape(-1, gradient.shape[-1]).unbind()
    for handle in handles:
        handle.remove()
    return tokens


# -- subspaces and weighted approximation -----------------------------------------------------------------


def span_projector(vectors: Tensor, *, rtol: float = 1e-6) -> Tensor:
    """Orthogonal projector onto the span of the columns, numerical rank by singular values."""
    U, sigma, _ = torch.linalg.svd(vectors, full_matrices=False)
    U = U[:, sigma > rtol * sigma.max()]
    return U @ U.mT


def symmetric_root(matrix: Tensor) -> Tensor:
    eigenvalues, V = torch.linalg.eigh(matrix)
    return V @ torch.diag(eigenvalues.clamp(min=0).sqrt()) @ V.mT


def weighted_error(difference: Tensor, C_g: Tensor, C_x: Tensor) -> float:
    """The squared error ``tr(C_g D C_x D^T)`` of METHODS 1.3."""
    return float(torch.trace(C_g @ difference @ C_x @ difference.mT))


def truncated_svd(matrix: Tensor, rank: int) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]


def weighted_truncation(W: Tensor, C_g: Tensor, C_x: Tensor, rank: int) -> Tensor:
    """Best rank-``rank`` approximation in the metric of both covariances, which must be regular."""
    S_g, S_x = symmetric_root(C_g), symmetric_root(C_x)
    return torch.linalg.inv(S_g) @ truncated_svd(S_g @ W @ S_x, rank) @ torch.linalg.inv(S_x)


def svd_llm_truncation(W: Tensor, C_x: Tensor, rank: int) -> Tensor:
    """SVD-LLM (arXiv:2403.07378), algorithm 1: whiten by the Cholesky factor, truncate, unwhiten."""
    S = torch.linalg.cholesky(C_x)
    return truncated_svd(W @ S, rank) @ torch.linalg.inv(S)


def projected_optimum(W: Tensor, C_g: Tensor, C_x: Tensor, Q_left: Tensor, Q_right: Tensor, rank: int) -> Tensor:
    """Best ``Q_left M Q_right^T`` with rank(M) <= rank: Friedland & Torokhti, SIAM J. Matrix Anal. 29, 2007."""
    S_g, S_x = symmetric_root(C_g), symmetric_root(C_x)
    A, B = S_g @ Q_left, S_x @ Q_right
    A_pinv, B_pinv = torch.linalg.pinv(A), torch.linalg.pinv(B)
    reachable = A @ A_pinv @ (S_g @ W @ S_x) @ (B @ B_pinv).mT
    return Q_left @ A_pinv @ truncated_svd(reachable, rank) @ B_pinv.mT @ Q_right.mT


# -- allocation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    rank: int | None
    cost: int
    gain: float


def best_allocation(layers: Sequence[Sequence[Candidate]], budget: int) -> float:
    """Largest summed gain of one candidate for each layer within the budget: all combinations are tried."""
    return max(
        sum(candidate.gain for candidate in choice)
        for choice in itertools.product(*layers)
        if sum(candidate.cost for candidate in choice) <= budget
    )


def largest_item(layers: Iterable[Sequence[Candidate]]) -> float:
    """Largest gain between neighbours on the upper concave envelope of a layer's (cost, gain) points."""
    steps = [0.0]
    for candidates in layers:
        gains = sorted(point.gain for point in candidates if not _on_or_below_a_chord(point, candidates))
        steps += [later - earlier for earlier, later in itertools.pairwise(gains)]
    return max(steps)


def _on_or_below_a_chord(point: Candidate, candidates: Sequence[Candidate]) -> bool:
    for a, b in itertools.combinations(candidates, 2):
        low, high = sorted((a, b), key=lambda candidate: candidate.cost)
        if low.cost < point.cost < high.cost:
            share = (point.cost - low.cost) / (high.cost - low.cost)
            if point.gain <= low.gain + share * (high.gain - low.gain) + 1e-12:
                return True
    return False
