"""From the weights of all targeted layers to their factors, one layer at a time.

Two passes: `plan_ranks` needs the spectrum of every layer, `factorize` then makes the factors of one layer at its
rank. Of the first pass's work so much is kept for the second as fits into a stated memory; of a large model only the
first layers', so that the extra memory does not grow with the model.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from tqdm.auto import tqdm

from peft_jactus.numerics.allocation import Allocation, LayerGains, Storage, allocate
from peft_jactus.numerics.approximation import DecompositionOptions, project, project_weight
from peft_jactus._processes import broadcast_, from_all, process_index
from peft_jactus.numerics.interpolation import InterpolativeBasis, interpolative_basis
from peft_jactus.numerics.linalg import NumericalWarning, to_decomposition_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import Tensor

    from peft_jactus.numerics.approximation import ProjectedWeight
    from peft_jactus.numerics.moments import LayerStatistics


# Memory for what the first pass leaves to the second: 22 million parameters (MiniLM) take 0.2 GB.
KEEP_BYTES = 2**29


@dataclass(frozen=True)
class FactorizationOptions:
    """How weights are approximated and ranks allocated; `JactusConfig` documents each field."""

    decomposition: DecompositionOptions = field(default_factory=DecompositionOptions)
    retained_ratio: float = 0.8
    allocation: Literal["global", "uniform"] = "global"
    storage: Storage = "factored"
    rank_floor: float = 0.5
    rank_multiple: int = 8
    bias_correction: bool = True


@dataclass(frozen=True)
class RankPlan:
    """Ranks of all layers and what they keep.

    Attributes:
        allocation: Rank of each layer, and the budget.
        energy_kept: Share of each layer's weighted energy that its rank keeps, in [0, 1].
        projections: What `factorize` then needs not compute again, of the layers that there was memory for.
    """

    allocation: Allocation
    energy_kept: dict[str, float]
    projections: dict[str, ProjectedWeight]


@dataclass(frozen=True)
class LayerFactors:
    """What replaces one layer: ``y = left (core (right^T x)) + bias``.

    Attributes:
        left: Basis of the output side, ``(out, rank)``.
        core: ``(rank, rank)``: the weight in those of its rows and columns that span the others.
        right: Basis of the input side, ``(in, rank)``.
        bias: ``(out,)``, or ``None`` for a layer without one.
    """

    left: InterpolativeBasis
    core: Tensor
    right: InterpolativeBasis
    bias: Tensor | None

    @property
    def rank(self) -> int:
        """Size of the core."""
        return self.core.shape[0]

    def dense(self) -> Tensor:
        """Return the weight ``(out, in)``."""
        return self.left.dense() @ self.core @ self.right.dense().mT


def plan_ranks(
    weights: Mapping[str, Callable[[], Tensor]],
    statistics: Mapping[str, LayerStatistics] | None,
    options: FactorizationOptions,
    *,
    with_bias: Collection[str] = (),
    fixed_ranks: Mapping[str, int] | None = None,
    keep_bytes: int = KEEP_BYTES,
    owners: Mapping[str, int] | None = None,
    progress_bar: bool = True,
) -> RankPlan:
    """Choose the ranks of all layers.

    Args:
        weights: By module name, a function that returns the weight ``(out, in)``; called once, and the weight is let
            go before the next one is asked for.
        statistics: By module name; ``None`` for a data-free decomposition.
        options: Decomposition, budget and allocation.
        with_bias: Names of the layers that have a bias.
        fixed_ranks: Ranks that the user decided, by module name.
        keep_bytes: Memory for `RankPlan.projections`.
        owners: Which process looks at which layer; all of them get the same plan. Default: each at all layers.
        progress_bar: Show a bar over the layers.

    Returns:
        The plan. A `ValueError` says if the budget cannot be met, or which module's statistics cannot be used.
    """
    gains: dict[str, LayerGains] = {}
    projections: dict[str, ProjectedWeight] = {}
    mine = [name for name in weights if owners is None or owners[name] == process_index()]
    for name in tqdm(mine, desc="Ranking directions", unit="layer", disable=not progress_bar):
        # One call a layer, so that its weight is let go before the next one is asked for.
        gains[name], projected = layer_gains(
            name,
            weights[name](),
            None if statistics is None else statistics[name],
            options.decomposition,
            centred=options.bias_correction and name in with_bias,
        )
        if projected.num_bytes <= keep_bytes:
            keep_bytes -= projected.num_bytes
            projections[name] = projected
    if owners is not None:
        of_all = {name: found for part in from_all(gains) for name, found in part.items()}
        gains = {name: of_all[name] for name in weights}
    fixed_ranks = {name: _cap_to_subspace(name, rank, gains[name]) for name, rank in (fixed_ranks or {}).items()}
    allocation = allocate(
        gains,
        retained_ratio=options.retained_ratio,
        strategy=options.allocation,
        storage=options.storage,
        rank_floor=options.rank_floor,
        rank_multiple=options.rank_multiple,
        fixed_ranks=fixed_ranks,
    )
    if allocation.num_stored > allocation.budget and not fixed_ranks:
        share = allocation.num_stored / sum(layer.num_parameters for layer in gains.values())
        warnings.warn(
            f"`retained_ratio`={options.retained_ratio:g} is out of reach: {share:.3g} are kept, since no layer gets "
            "less than rank one.",
            NumericalWarning,
            stacklevel=2,
        )
    energy_kept = {name: _energy_kept(gains[name], rank) for name, rank in allocation.ranks.items()}
    return RankPlan(allocation, energy_kept, projections)


def layer_gains(
    name: str, weight: Tensor, statistics: LayerStatistics | None, options: DecompositionOptions, *, centred: bool
) -> tuple[LayerGains, ProjectedWeight]:
    """Return what each rank of a layer gains, in units that compare between layers, and its projected weight.

    Args:
        name: The layer's, for errors.
        weight: ``(out, in)``.
        statistics: The layer's; ``None`` for a data-free decomposition.
        options: The decomposition.
        centred: Whether a bias will take up the mean error.

    Raises:
        ValueError: With the layer's name, if the statistics cannot be used.
    """
    try:
        projected = project_weight(weight, statistics, options, centred=centred)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    # K-FAC's Fisher matrix of a layer that is applied to N positions is N C_g (x) C_x: layers that see one
    # position for each example (a pooler) compare with those that see every token.
    weighting = 1 if statistics is None else statistics.num_tokens
    gains = LayerGains(
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        gains=(weighting * projected.gains()).cpu(),
        dense_gain=weighting * projected.total_energy,
    )
    return gains, projected


def _cap_to_subspace(name: str, rank: int, gains: LayerGains) -> int:
    max_rank = gains.gains.numel()
    if rank <= max_rank:
        return rank
    if rank >= gains.full_rank:
        return gains.full_rank
    warnings.warn(
        f"{name}: rank {rank} was asked for, but the union of subspaces has {max_rank} dimensions; rank {max_rank} "
        "is used. Raise `weight_energy`, `input_energy` or `gradient_energy` to widen it.",
        NumericalWarning,
        stacklevel=3,
    )
    return max_rank


def _energy_kept(gains: LayerGains, rank: int) -> float:
    if rank == gains.full_rank or not gains.dense_gain > 0:
        return 1.0
    return min(1.0, float(gains.gains[:rank].sum()) / gains.dense_gain)


def factorize(
    weight: Tensor,
    bias: Tensor | None,
    statistics: LayerStatistics | None,
    rank: int,
    options: FactorizationOptions,
    *,
    projected: ProjectedWeight | None = None,
) -> LayerFactors:
    """Make the factors of one layer.

    Args:
        weight: ``(out, in)``.
        bias: ``(out,)`` or ``None``.
        statistics: The layer's; ``None`` for a data-free decomposition.
        rank: As planned; capped at the dimension of the subspaces, but full rank reproduces the weight.
        options: Decomposition and bias correction.
        projected: From `plan_ranks`, if it was kept.

    Returns:
        Factors in float64 on the weight's device. With ``bias_correction``, the bias takes up the mean error:
        ``b' = b + (W - W_r) mean(x)``.
    """
    if rank >= min(weight.shape):
        projected = project(weight)
    elif projected is None:
        centred = options.bias_correction and bias is not None
        projected = project_weight(weight, statistics, options.decomposition, centred=centred)
    factors = projected.truncate(rank)
    if bias is not None:
        bias = to_decomposition_dtype(bias)
        if options.bias_correction and statistics is not None:
            error = to_decomposition_dtype(weight) - factors.dense()
            bias = bias + error @ to_decomposition_dtype(statistics.input.mean).to(error.device)
    left, from_left = interpolative_basis(factors.left)
    right, from_right = interpolative_basis(factors.right)
    return LayerFactors(left, from_left @ factors.core @ from_right.mT, right, bias)


def factors_for_all(factors: LayerFactors | None, owner: int, weight: Tensor, *, bias: bool) -> LayerFactors:
    """Return the factors of process ``owner``.

    Args:
        factors: There, what it made; elsewhere ``None``.
        owner: Who has them.
        weight: ``(out, in)``.
        bias: Whether they have one.
    """
    rank = from_all(0 if factors is None else factors.rank)[owner]
    if factors is None:
        (out_features, in_features), device = weight.shape, weight.device

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float64, device=device)

        left, right = (
            InterpolativeBasis(torch.empty(dim, dtype=torch.int64, device=device), empty(dim - rank, rank))
            for dim in (out_features, in_features)
        )
        factors = LayerFactors(left, empty(rank, rank), right, empty(out_features) if bias else None)
    tensors = [factors.left.order, factors.left.coefficients, factors.core]
    tensors += [factors.right.order, factors.right.coefficients, *([] if factors.bias is None else [factors.bias])]
    for tensor in tensors:
        broadcast_(tensor, owner)
    return factors
