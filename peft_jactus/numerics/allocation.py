"""Ranks of all layers under one parameter budget.

A layer's candidates are its ranks; each has a cost (the parameters that the deployed checkpoint stores) and a gain
(the drop of the local second-order loss). Full rank costs what the dense weight costs, whatever its factors would:
the layer is then deployed dense. Uniform allocation gives
every layer the same retained ratio. Global allocation spends the budget where a parameter gains most: greedily
along the upper concave envelope of each layer's (cost, gain) points, which is the solution of the
Lagrangian relaxation and optimal up to the last item (Everett, Operations Research 11, 1963).

A plain global allocation measures worse than a uniform one, because local losses of heavily truncated layers do not
add up (Swift-SVD, Table 6, finds the same); so each layer keeps a floor, a share of its uniform rank.

Ranks can be kept to multiples of a number in layers large enough for that: matrix products of other sizes are slower
(benchmarks/notes/cost.md).
"""

from __future__ import annotations

import bisect
import heapq
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch

from peft_jactus.numerics.adaptation import capped_adaptation_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Storage = Literal["factored", "pivoted"]
DENSE = "dense"  # storage of a targeted layer for which factors don't pay

# A multiple of ranks is kept to in layers whose full rank is so many times as large: it costs them little.
_COARSEST = 32


def stored_parameters(rank: int, out_features: int, in_features: int, storage: Storage) -> int:
    """Return how many numbers a deployed layer stores: those of its factors, or of its weight if these are fewer.

    Args:
        rank: The layer's rank.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        storage: ``"factored"``: two factors, ``rank * (out + in)``. ``"pivoted"``: ``rank`` rows of the weight
            and the coefficients of the others, ``rank * (out + in - rank)``.
    """
    return min(factor_parameters(rank, out_features, in_features, storage), out_features * in_features)


def factor_parameters(rank: int, out_features: int, in_features: int, storage: Storage) -> int:
    """Return how many numbers the factors of a layer have, even if its weight has fewer; see `stored_parameters`."""
    saved = rank if storage == "pivoted" else 0
    return rank * (out_features + in_features - saved)


def stays_dense(rank: int, out_features: int, in_features: int, storage: Storage) -> bool:
    """Whether factors of this rank don't pay, so that the layer is deployed as one dense weight."""
    return stored_parameters(rank, out_features, in_features, storage) == out_features * in_features


def uniform_rank(retained_ratio: float, out_features: int, in_features: int, storage: Storage) -> int:
    """Return the largest rank, at least 1, that keeps at most ``retained_ratio`` of a layer's parameters.

    That is full rank where ``retained_ratio`` is 1.
    """
    full_rank = min(out_features, in_features)
    if retained_ratio >= 1:
        return full_rank
    budget = _floor(retained_ratio * out_features * in_features)
    total = out_features + in_features
    if storage == "factored":
        rank = int(budget / total)
    else:
        # r (m + n - r) <= budget; the discriminant is at least (m - n)^2, rounding apart
        rank = int((total - math.sqrt(max(0.0, total * total - 4 * budget))) / 2)
    if stored_parameters(rank + 1, out_features, in_features, storage) <= budget:
        rank += 1  # the root was rounded down
    return max(1, min(rank, full_rank))


@dataclass(frozen=True)
class LayerGains:
    """What each rank of one layer is worth.

    Attributes:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        gains: ``(max_rank,)``, float64, non-negative: gain of the k-th rank. Non-increasing, but that ranks which are
            left to the task gain nothing.
        dense_gain: Gain of full rank, at least ``gains.sum()``: subspaces may leave a part of the weight out of reach.
    """

    out_features: int
    in_features: int
    gains: Tensor
    dense_gain: float

    def with_adaptation(self, adaptation_rank: int) -> LayerGains:
        """Return the gains where ``adaptation_rank`` of the ranks, but half at most, are left to the task."""
        of_weight = [rank - capped_adaptation_rank(adaptation_rank, rank) for rank in range(self.full_rank + 1)]
        steps = [(rank, rank > before) for before, rank in pairwise(of_weight) if rank <= self.gains.numel()]
        ranks, grows = (torch.tensor(column, device=self.gains.device) for column in zip(*steps, strict=True))
        return replace(self, gains=torch.where(grows, self.gains[ranks - 1], 0.0))

    @property
    def num_parameters(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """Rank of the dense weight."""
        return min(self.out_features, self.in_features)

    def rank_step(self, rank_multiple: int) -> int:
        """Return what the ranks of this layer are multiples of: 1 where ``rank_multiple`` would be coarse."""
        return rank_multiple if _COARSEST * rank_multiple <= self.full_rank else 1

    def energy_kept(self, rank: int) -> float:
        """Return the share of the gain of full rank that ``rank`` has, in [0, 1]."""
        if rank == self.full_rank or not self.dense_gain > 0:
            return 1.0
        return min(1.0, float(self.gains[:rank].sum()) / self.dense_gain)


@dataclass(frozen=True)
class Allocation:
    """Ranks by module name.

    Attributes:
        ranks: Rank of each layer.
        num_stored: Parameters that the targeted layers store. At most ``budget``, unless rank one of a layer is
            more than its share already.
        budget: The parameter budget that was asked for.
    """

    ranks: dict[str, int]
    num_stored: int
    budget: int


def allocate(
    layers: Mapping[str, LayerGains],
    *,
    retained_ratio: float,
    strategy: Literal["global", "uniform"],
    storage: Storage,
    rank_floor: float,
    rank_multiple: int,
    fixed_ranks: Mapping[str, int],
) -> Allocation:
    """Choose the rank of every layer under one budget.

    Args:
        layers: Gains by module name.
        retained_ratio: Budget as a share of all targeted parameters, in (0, 1].
        strategy: ``"uniform"`` gives each layer this ratio; ``"global"`` maximises the summed gain.
        storage: How the deployed layer is stored, that is, what a rank costs.
        rank_floor: Least rank of a layer under ``"global"``, as a share of its uniform rank, in [0, 1].
        rank_multiple: What ranks are multiples of, in layers whose full rank is 32 times as large or more.
        fixed_ranks: Ranks that are decided already. They are paid from the budget.

    Returns:
        The ranks, the fixed ones as they are. Another layer whose factors would cost as much as its weight gets full
        rank, to stay dense.

    Raises:
        ValueError: If the fixed ranks leave too little for one rank in each other layer.
    """
    fixed = dict(fixed_ranks)
    free = {name: layer for name, layer in layers.items() if name not in fixed}
    budget = _floor(retained_ratio * sum(layer.num_parameters for layer in layers.values()))
    remaining = budget - sum(_cost(layers[name], rank, storage) for name, rank in fixed.items())
    ratio = retained_ratio
    if fixed and free:
        ratio = min(1.0, remaining / sum(layer.num_parameters for layer in free.values()))
        if ratio <= 0 or remaining < sum(_cost(layer, 1, storage) for layer in free.values()):
            raise ValueError(
                f"`rank_pattern` spends the whole budget of {budget} parameters (`retained_ratio`="
                f"{retained_ratio}): {remaining} are left for {len(free)} other layers. Lower its ranks, raise "
                "`retained_ratio`, or list every targeted module in `rank_pattern`."
            )
    if strategy == "uniform":
        ranks = {name: _uniform(layer, ratio, storage, rank_multiple) for name, layer in free.items()}
    else:
        ranks = _allocate_global(free, remaining, ratio, storage, rank_floor, rank_multiple)
    ranks |= fixed
    num_stored = sum(_cost(layers[name], rank, storage) for name, rank in ranks.items())
    return Allocation({name: ranks[name] for name in layers}, num_stored, budget)


def _floor(parameters: float) -> int:
    return math.floor(parameters + 1e-9)  # 0.7 * 90 is a little less than 63 in floating point


def _cost(layer: LayerGains, rank: int, storage: Storage) -> int:
    return stored_parameters(rank, layer.out_features, layer.in_features, storage)


def _uniform(layer: LayerGains, ratio: float, storage: Storage, rank_multiple: int) -> int:
    rank = uniform_rank(ratio, layer.out_features, layer.in_features, storage)
    if _cost(layer, rank, storage) == layer.num_parameters:
        return layer.full_rank
    return _round_down(min(rank, layer.gains.numel()), layer.rank_step(rank_multiple))


def _round_down(rank: int, step: int) -> int:
    """Return the largest multiple of ``step`` up to ``rank``; the rank itself if there is none."""
    return rank - rank % step if rank >= step else rank


def _allocate_global(
    layers: dict[str, LayerGains], budget: int, ratio: float, storage: Storage, rank_floor: float, rank_multiple: int
) -> dict[str, int]:
    curves = {}
    for name, layer in layers.items():
        step = layer.rank_step(rank_multiple)
        floor = _round_down(_floor_rank(layer, ratio, storage, rank_floor), step)
        curves[name] = _Curve.build(layer, floor, step, storage)
    remaining = budget - sum(int(curve.costs[0]) for curve in curves.values())
    chosen = _climb(curves, remaining)
    return {name: curve.candidates[chosen[name]] for name, curve in curves.items()}


def _floor_rank(layer: LayerGains, ratio: float, storage: Storage, rank_floor: float) -> int:
    uniform = uniform_rank(ratio, layer.out_features, layer.in_features, storage)
    return max(1, min(int(rank_floor * uniform), layer.gains.numel()))


@dataclass(frozen=True)
class _Curve:
    """Candidates of one layer, cheapest first, and the vertices of their upper concave envelope."""

    candidates: list[int]
    costs: Tensor
    gains: Tensor
    vertices: list[int]

    @classmethod
    def build(cls, layer: LayerGains, floor: int, step: int, storage: Storage) -> _Curve:
        multiples = range(floor - floor % step + step, layer.gains.numel() + 1, step)
        in_reach = (floor, *multiples)
        cumulative = layer.gains.cumsum(0).tolist()
        ranks: list[int] = []
        for rank in in_reach:  # but for those that cost more and gain nothing, which would end the climb
            gains_more = not ranks or cumulative[rank - 1] > cumulative[ranks[-1] - 1]
            if gains_more and _cost(layer, rank, storage) < layer.num_parameters:
                ranks.append(rank)
        costs = [_cost(layer, rank, storage) for rank in ranks]
        gains = [cumulative[rank - 1] for rank in ranks]
        costs.append(layer.num_parameters)
        gains.append(layer.dense_gain)
        costs_tensor, gains_tensor = torch.tensor(costs), torch.tensor(gains, dtype=torch.float64)
        return cls([*ranks, layer.full_rank], costs_tensor, gains_tensor, _upper_envelope(costs, gains))

    def next_step(self, index: int, *, envelope: bool) -> tuple[float, int, int] | None:
        """Return (gain per parameter, cost, index) of the step up from candidate ``index``."""
        if envelope:
            following = bisect.bisect_right(self.vertices, index)
            target = self.vertices[following] if following < len(self.vertices) else None
        else:
            target = index + 1 if index + 1 < len(self.candidates) else None
        if target is None:
            return None
        cost = int(self.costs[target] - self.costs[index])
        return float(self.gains[target] - self.gains[index]) / cost, cost, target


def _upper_envelope(costs: list[int], gains: list[float]) -> list[int]:
    """Return the indices of the points on the upper concave envelope, from the first to the best one."""
    best = max(range(len(gains)), key=lambda i: (gains[i], -costs[i]))
    hull: list[int] = []
    for i in range(best + 1):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            # >=: points on one line all stay, so that steps are as small as they can be.
            if (gains[b] - gains[a]) * (costs[i] - costs[b]) >= (gains[i] - gains[b]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _climb(curves: dict[str, _Curve], remaining: int) -> dict[str, int]:
    """Spend ``remaining`` parameters, best gain per parameter first; return each layer's candidate."""
    # Steps go from vertex to vertex of the envelope. Where the next vertex is too dear, a candidate below it may still
    # be affordable: that layer goes on by single candidates.
    chosen = dict.fromkeys(curves, 0)
    heap: list[tuple[float, str, int, int, bool]] = []

    def offer(name: str, *, envelope: bool) -> None:
        step = curves[name].next_step(chosen[name], envelope=envelope)
        if step is not None and step[0] > 0:
            rate, cost, target = step
            heapq.heappush(heap, (-rate, name, cost, target, envelope))

    for name in curves:
        offer(name, envelope=True)
    while heap:
        _, name, cost, target, envelope = heapq.heappop(heap)
        if cost <= remaining:
            remaining -= cost
            chosen[name] = target
            offer(name, envelope=envelope)
        elif envelope:
            offer(name, envelope=False)
    return chosen
