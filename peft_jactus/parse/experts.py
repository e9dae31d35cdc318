"""Which rank experts run: pure functions from scores, costs and a budget to a choice.

A factorised weight is a sum of rank-one terms; consecutive terms make a *rank expert*. A score says how much a
parameter of an expert is worth for one prompt, as a logarithm, so the best choice under a budget takes experts in the
order of their scores: the greedy solution of the fractional knapsack, optimal up to the last item. With ``"uniform"``
each layer has a budget of its own, with ``"global"`` all share one.

No layer costs more than its dense weight: if all of its experts run, their product can run in their place. Where a
layer has so many that this matters, the last ones are one item, which costs what is missing to the dense weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from peft_jactus.deployment.layers import FactorizedLinear

ExpertAllocation = Literal["global", "uniform"]

# Halvings of the interval that holds a threshold; 40 leave 1e-12 of it.
_BISECTIONS = 40
# Gain of a parameter, of experts that cost nothing more.
_FREE = 1e300
# A gate this many temperatures from the threshold is 0 or 1 in float32.
_MARGIN = 20.0


@dataclass(frozen=True)
class LayerShape:
    """One factorised layer, as far as the choice of experts goes.

    Attributes:
        out_features: Rows of its weight.
        in_features: Columns of its weight.
        rank: Number of its rank-one terms.
    """

    out_features: int
    in_features: int
    rank: int

    @classmethod
    def of(cls, layer: FactorizedLinear) -> LayerShape:
        """Return the shape of a layer."""
        return cls(layer.out_features, layer.in_features, layer.rank)


class ExpertTable:
    """The experts of all layers, in one row: those of the first layer, then those of the second, and so on.

    Args:
        layers: Shapes, in the order of the layers.
        expert_size: Rank-one terms in an expert, at least 1; the last one of a layer may have fewer.

    Attributes:
        spans: By layer, which experts are its own: ``(first, last + 1)``.
        sizes: ``(experts,)``, int64: terms of each expert.
        costs: ``(experts,)``, int64: parameters of each expert's two factors, ``size * (out + in)``.
        layer_of: ``(experts,)``, int64: the layer that an expert belongs to.
        dense_costs: ``(layers,)``, int64: parameters of each layer's dense weight, ``out * in``.
        all_costs: ``(layers,)``, int64: what it costs to run all experts of a layer, in the cheaper form.
    """

    def __init__(self, layers: Sequence[LayerShape], expert_size: int) -> None:
        self.layers = tuple(layers)
        self.expert_size = expert_size
        counts = [-(-layer.rank // expert_size) for layer in self.layers]
        spans, first = [], 0
        for count in counts:
            spans.append((first, first + count))
            first += count
        self.spans = spans
        sizes = [
            min(expert_size, layer.rank - start)
            for layer in self.layers
            for start in range(0, layer.rank, expert_size)
        ]
        layer_of = [number for number, count in enumerate(counts) for _ in range(count)]
        widths = [self.layers[number].out_features + self.layers[number].in_features for number in layer_of]
        with torch.device("cpu"):  # also while a loader builds its model on the meta device
            self.sizes = torch.tensor(sizes)
            self.layer_of = torch.tensor(layer_of)
            self.costs = self.sizes * torch.tensor(widths)
            self.dense_costs = torch.tensor([layer.out_features * layer.in_features for layer in self.layers])
            totals = torch.tensor([layer.rank * (layer.out_features + layer.in_features) for layer in self.layers])
            self.all_costs = totals.minimum(self.dense_costs)
            self.has_dense_option = bool((totals > self.dense_costs).any())
            # (layers, most experts of a layer): the experts of each layer; repeated, and not valid, where it has fewer
            places = torch.arange(max(counts)).expand(len(counts), -1)
            limits = torch.tensor(counts).unsqueeze(1)
            self.valid = places < limits
            self.experts_of = torch.tensor([span[0] for span in spans]).unsqueeze(1) + places.minimum(limits - 1)

    def __len__(self) -> int:
        return len(self.sizes)

    def groups(self, allocation: ExpertAllocation) -> Tensor:
        """Return ``(experts,)``, int64: which budget each expert is paid from."""
        return self.layer_of if allocation == "uniform" else torch.zeros_like(self.layer_of)

    def budgets(self, active_ratio: float, allocation: ExpertAllocation) -> Tensor:
        """Return ``(groups,)``, float64: parameters that may run, ``active_ratio`` of the dense ones.

        Raises:
            ValueError: If that is less than the smallest choice, one expert in each layer.
        """
        least = torch.stack([self.costs[start] for start, _ in self.spans]).minimum(self.all_costs)
        dense = self.dense_costs
        if allocation == "global":
            least, dense = least.sum(0, keepdim=True), dense.sum(0, keepdim=True)
        budgets = active_ratio * dense.double()
        if bool((budgets < least).any()):
            needed = math.ceil(1000 * float((least.double() / dense).max()) - 1e-6) / 1000
            raise ValueError(
                f"`active_ratio`={active_ratio} is too small: one expert in each layer takes {needed:.3f}. Raise it, "
                f"or lower `expert_size` ({self.expert_size})."
            )
        return budgets

    def active_ratio(self, selected: Tensor) -> Tensor:
        """Return ``(batch,)``: parameters of the selected ``(batch, experts)``, over those of the dense layers."""
        selected = selected.double().cpu()
        costs = torch.zeros(len(selected), len(self.layers), dtype=torch.float64)
        costs.index_add_(1, self.layer_of, selected * self.costs)
        return costs.minimum(self.all_costs.double()).sum(1) / float(self.dense_costs.sum())

    def term_index(self, layer: int, selected: Tensor) -> Tensor:
        """Return which rank-one terms of a layer run, ascending, for one choice ``(experts,)``."""
        first, last = self.spans[layer]
        chosen = selected[first:last].cpu()
        return torch.repeat_interleave(chosen, self.sizes[first:last]).nonzero().squeeze(1)

    def term_gates(self, layer: int, gates: Tensor) -> Tensor:
        """Return ``(batch, rank)``: the gate of each rank-one term of a layer, of ``(batch, experts)``."""
        first, last = self.spans[layer]
        sizes = self.sizes[first:last].to(gates.device)
        return gates[:, first:last].repeat_interleave(sizes, dim=1, output_size=self.layers[layer].rank)


def select_experts(scores: Tensor, table: ExpertTable, budgets: Tensor, allocation: ExpertAllocation) -> Tensor:
    """Choose the best experts that fit the budget.

    The best expert of each layer always runs. Then experts are taken in the order of their scores, equal ones in the
    order of the layers, while the budget lasts; what is left then goes to the best ones that still fit.

    Args:
        scores: ``(batch, experts)``, finite: worth of a parameter.
        table: The experts.
        budgets: Of ``table.budgets``.
        allocation: What the budgets are for.

    Returns:
        ``(batch, experts)``, bool.
    """
    valid = table.valid.to(scores.device)
    experts = table.experts_of.to(scores.device).expand(
        len(scores), -1, -1
    )  # (batch, layers, most experts of a layer)
    scores = scores.detach().double().gather(1, experts.flatten(1)).view(experts.shape).masked_fill(~valid, -torch.inf)
    scores, order = scores.sort(dim=2, descending=True, stable=True)  # what is not valid comes last again
    experts = experts.gather(2, order)
    costs = table.costs.to(scores.device, torch.float64)[experts].masked_fill(~valid, 0)
    ranking, item_costs = scores, costs
    if table.has_dense_option:
        ranking, item_costs = _with_dense_items(scores, costs, table.all_costs.to(scores))
    ranking = ranking.clone()
    ranking[:, :, 0] = torch.inf
    groups = table.groups(allocation).to(scores.device)[experts].flatten(1)
    is_real = valid.expand_as(experts).flatten(1)
    limits = budgets.to(scores.device)[groups]

    order = _by_group(ranking.flatten(1), groups)
    fits = _summed_in_group(item_costs.flatten(1).gather(1, order), groups.gather(1, order)) <= limits.gather(1, order)
    chosen = torch.zeros_like(is_real).scatter(1, order, fits) & is_real
    spent = _group_total(item_costs.flatten(1) * chosen, groups, len(budgets))

    order = _by_group(scores.flatten(1), groups)
    groups, costs, limits = (values.gather(1, order) for values in (groups, costs.flatten(1), limits))
    chosen, spent, is_real = (values.gather(1, order) for values in (chosen, spent, is_real))
    while True:
        fitting = is_real & ~chosen & (costs <= limits - spent)
        if not bool(fitting.any()):
            break
        added = fitting & (_summed_in_group(fitting.double(), groups) == 1)  # the best one of each group
        chosen |= added
        spent = spent + _group_total(costs * added, groups, len(budgets))
    counts = torch.zeros(len(scores), len(table), dtype=torch.int64, device=scores.device)
    return counts.scatter_add(1, experts.flatten(1).gather(1, order), chosen.long()) > 0


def _by_group(ranking: Tensor, groups: Tensor) -> Tensor:
    """Return the order ``(batch, entries)`` of groups, and from large to small in each; a stable one."""
    order = ranking.sort(dim=1, descending=True, stable=True).indices
    by_group: Tensor = order.gather(1, groups.gather(1, order).sort(dim=1, stable=True).indices)
    return by_group


def _with_dense_items(scores: Tensor, costs: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Return a ranking and costs under which taking experts in order follows the upper concave envelope of each layer.

    A layer's points are (cost, gain) of its best k experts, and of all at the cost of the dense weight. From the last
    point that the envelope touches before that one, the experts that are left are one item: the best of them costs
    what is missing to the dense weight, the others nothing, and all have the same rank.

    Args:
        scores: ``(batch, layers, experts of a layer)``, descending; minus infinity where there is none.
        costs: Of the same experts.
        limits: ``(layers,)``: cost of all.
    """
    limits = limits.unsqueeze(1)
    gains = (scores - scores[:, :, :1]).exp() * costs
    room = limits - (costs.cumsum(2) - costs).minimum(limits)
    gain_left = gains.sum(2, keepdim=True) - gains.cumsum(2) + gains
    slopes = torch.where(room > 0, gain_left / room, _FREE)
    slopes[:, :, 0] = torch.inf  # the best expert always runs
    slope, first = slopes.min(2, keepdim=True)
    has_item = (costs.sum(2, keepdim=True) > limits) & slope.isfinite()
    places = torch.arange(scores.shape[2], device=scores.device)
    is_first, is_later = has_item & (places == first), has_item & (places > first)
    ranking = torch.where(is_first | is_later, slope.log() + scores[:, :, :1], scores)
    return ranking, torch.where(is_first, room, torch.where(is_later, 0.0, costs.minimum(room)))


def _summed_in_group(values: Tensor, groups: Tensor) -> Tensor:
    """Return cumulative sums ``(batch, experts)`` that start anew at each group, where groups stand in a row."""
    sums = values.cumsum(1)
    before = torch.cat([sums.new_zeros(len(sums), 1), sums[:, :-1]], dim=1)
    starts = torch.cat([torch.ones_like(groups[:, :1], dtype=torch.bool), groups[:, 1:] != groups[:, :-1]], dim=1)
    return sums - (before * starts).cummax(1).values  # sums never fall


def _group_total(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return ``(batch, experts)``: for each expert the sum over its group."""
    totals = values.new_zeros(len(values), num_groups).scatter_add(1, groups, values)
    return totals.gather(1, groups)


def relaxed_gates(
    scores: Tensor,
    table: ExpertTable,
    budgets: Tensor,
    allocation: ExpertAllocation,
    *,
    temperature: float,
) -> Tensor:
    """Return the hard choice of `select_experts`, with the gradient of a soft one (straight-through).

    The soft gates are ``sigmoid((score - threshold) / temperature)`` with the threshold at which they use up the
    budget on the whole, so that raising one score lowers all others: only the order of scores matters.

    Args:
        scores: ``(batch, experts)``.
        table: The experts.
        budgets: Of ``table.budgets``.
        allocation: What the budgets are for.
        temperature: In units of the scores; larger ones give a gradient to experts further from the threshold.

    Returns:
        ``(batch, experts)``: zeros and ones in value.

    References:
        Bengio et al., arXiv:1308.3432 (straight-through).
    """
    hard = select_experts(scores, table, budgets, allocation).to(scores)
    soft = soft_gates(scores, table, budgets, allocation, temperature=temperature)
    return hard + (soft - soft.detach())


def soft_gates(
    scores: Tensor,
    table: ExpertTable,
    budgets: Tensor,
    allocation: ExpertAllocation,
    *,
    temperature: float,
) -> Tensor:
    """Return ``sigmoid((score - threshold) / temperature)``, differentiable through the threshold as well.

    Args:
        scores: ``(batch, experts)``.
        table: The experts.
        budgets: Of ``table.budgets``.
        allocation: What the budgets are for.
        temperature: In units of the scores.

    Returns:
        ``(batch, experts)`` in [0, 1], of which each group costs its budget in sum, or all ones if all of it fits.
    """
    costs = table.costs.to(scores)
    groups = table.groups(allocation).to(scores.device)
    budgets = budgets.to(scores)

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), len(budgets)).index_add(1, groups, values)

    def gates_at(threshold: Tensor) -> Tensor:
        return torch.sigmoid((scores - threshold[:, groups]) / temperature)

    with torch.no_grad():
        low = (scores.amin(1, keepdim=True) - _MARGIN * temperature).expand(-1, len(budgets))
        high = (scores.amax(1, keepdim=True) + _MARGIN * temperature).expand(-1, len(budgets))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_over = summed(gates_at(middle) * costs) > budgets
            low, high = torch.where(is_over, middle, low), torch.where(is_over, high, middle)
        threshold = high
        gates = gates_at(threshold)
        slope = summed(gates * (1 - gates) * costs) / temperature
        # Where everything fits, gates are one whatever the threshold is.
        slope = torch.where(slope > torch.finfo(slope.dtype).tiny, slope, torch.inf)
    # One Newton step: nothing in value, but the derivative of the threshold by each score.
    excess = summed(gates_at(threshold) * costs) - budgets
    return gates_at(threshold + (excess - excess.detach()) / slope)
