"""From the weight of one layer to its factors, and the ranks of all layers.

Two passes over the layers: `layer_gains` says what each rank of a layer is worth, `choose_ranks` needs that of all of
them; `factorize` then makes the factors of one layer at its rank.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from peft_jactus.errors import NumericalWarning
from peft_jactus.numerics.adaptation import capped_adaptation_rank, in_space_of, starting_directions
from peft_jactus.numerics.allocation import Allocation, LayerGains, Storage, allocate, stays_dense
from peft_jactus.numerics.approximation import DecompositionOptions, project, project_weight
from peft_jactus.numerics.frozen_weight import FrozenWeight
from peft_jactus.numerics.interpolation import InterpolativeBasis, interpolative_basis
from peft_jactus.numerics.linalg import to_decomposition_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from peft_jactus.numerics.adaptation import AdaptationInit, AdaptationSpace
    from peft_jactus.numerics.approximation import ProjectedWeight
    from peft_jactus.numerics.moments import LayerStatistics


@dataclass(frozen=True)
class FactorizationOptions:
    """How weights are approximated and ranks allocated; `JactusConfig` documents each field and has the defaults."""

    decomposition: DecompositionOptions
    retained_ratio: float
    allocation: Literal["global", "uniform"]
    storage: Storage
    rank_floor: float
    rank_multiple: int
    bias_correction: bool
    adaptation_rank: int
    adaptation_init: AdaptationInit
    adaptation_space: AdaptationSpace

    @property
    def reserved_rank(self) -> int:
        """How many ranks of a layer the compressed weight leaves to the task, half of them at most."""
        return 0 if self.adaptation_space == "retained" else self.adaptation_rank


@dataclass(frozen=True)
class LayerFactors:
    """What `factorize` makes of one layer: ``y = left (core (right^T x)) + up (down x) + bias``.

    With an adaptation in the retained space, ``down`` and ``up`` change a factor of the weight instead, and have its
    shape (`FrozenWeight.adapted`).

    Attributes:
        left: Basis of the output side, ``(out, rank)``.
        core: ``(rank, rank)``: the weight in those of its rows and columns that span the others.
        right: Basis of the input side, ``(in, rank)``.
        bias: ``(out,)``, or ``None`` for a layer without one.
        down: ``(adaptation rank, in)``, or ``None`` for a layer without adaptation ranks.
        up: ``(out, adaptation rank)``, likewise.
        space: Of the adaptation.
    """

    left: InterpolativeBasis
    core: Tensor
    right: InterpolativeBasis
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    space: AdaptationSpace = "free"

    @property
    def core_rank(self) -> int:
        """Size of the core."""
        return self.core.shape[0]

    @property
    def adaptation_rank(self) -> int:
        """How many ranks adapt."""
        return 0 if self.down is None else self.down.shape[0]

    @property
    def rank(self) -> int:
        """Rank of the whole weight, at most."""
        if self.space == "retained":
            return self.core_rank
        return min(self.core_rank + self.adaptation_rank, self.left.dim, self.right.dim)

    def weight(self) -> LowRankWeight:
        """Return the weight, with plain matrices for bases."""
        if self.space == "retained" and self.down is not None and self.up is not None:
            weight = FrozenWeight.from_factors(self.left, self.core, self.right)
            return LowRankWeight.of(weight.adapted(self.down, self.up), self.bias)
        return LowRankWeight(self.left.dense(), self.core, self.right.dense(), self.bias, self.down, self.up)


@dataclass(frozen=True)
class LowRankWeight:
    """The weight of one adapted layer, ``left core right^T + up down``, and its bias.

    Attributes:
        left: ``(out, core rank)``.
        core: ``(core rank, core rank)``.
        right: ``(in, core rank)``.
        bias: ``(out,)``, or ``None`` for a layer without one.
        down: ``(adaptation rank, in)``, or ``None`` for a layer without adaptation ranks.
        up: ``(out, adaptation rank)``, likewise.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None

    @classmethod
    def of(
        cls, weight: FrozenWeight, bias: Tensor | None, down: Tensor | None = None, up: Tensor | None = None
    ) -> LowRankWeight:
        """Return the weight with a core that is the identity."""
        left, right = weight.sides()
        core = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
        return cls(left, core, right, bias, down, up)

    def compressed(self) -> Tensor:
        """Return the weight ``(out, in)`` without its adaptation ranks."""
        return self.left @ self.core @ self.right.mT

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``left`` ``(out, r)``, ``core`` ``(r, r)`` and ``right`` ``(in, r)`` of the whole weight, in float64.

        With adaptation ranks, both have full column rank, and ``r`` is the rank that the weight has up to rounding:
        adaptation ranks that were not trained add nothing.
        """
        left, core, right = map(to_decomposition_dtype, (self.left, self.core, self.right))
        if self.down is None or self.up is None:
            return left, core, right
        adapting = torch.eye(self.down.shape[0], dtype=core.dtype, device=core.device)
        core = torch.block_diag(core, adapting)  # type: ignore[no-untyped-call]  # torch has no annotation here
        left, right = torch.cat([left, self.up.to(left)], dim=1), torch.cat([right, self.down.mT.to(right)], dim=1)
        (left, left_triangle), (right, right_triangle) = torch.linalg.qr(left), torch.linalg.qr(right)
        vectors, values, covectors = torch.linalg.svd(left_triangle @ core @ right_triangle.mT)
        rank = max(1, int((values > torch.finfo(values.dtype).eps * len(values) * values[0]).sum()))
        return left @ vectors[:, :rank], torch.diag(values[:rank]), right @ covectors[:rank].mT

    def dense(self) -> Tensor:
        """Return the weight ``(out, in)``."""
        weight = self.compressed()
        if self.down is not None and self.up is not None:
            weight = weight + self.up.to(weight) @ self.down.to(weight)
        return weight


def choose_ranks(
    gains: Mapping[str, LayerGains],
    options: FactorizationOptions,
    fixed_ranks: Mapping[str, int],
    *,
    asked_budget: str | None = None,
) -> Allocation:
    """Choose the ranks of all layers under the budget; a `NumericalWarning` says if it is out of reach.

    Args:
        gains: By module name, see `layer_gains`.
        options: Budget and allocation.
        fixed_ranks: Ranks that the user decided, by module name. One whose factors would cost as much as the weight
            means full rank.
        asked_budget: The budget as the user gave it, for messages. Default: the share in ``options``.

    Returns:
        The ranks. A `ValueError` says if the fixed ones leave too little for the others.
    """
    fixed_ranks = {name: _fixed_rank(name, rank, gains[name], options.storage) for name, rank in fixed_ranks.items()}
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
        asked = asked_budget or f"`retained_ratio`={options.retained_ratio:g}"
        warnings.warn(
            f"{asked} cannot be reached: {share:.3g} of the targeted layers' parameters are kept, because each layer "
            "keeps at least rank 1.",
            NumericalWarning,
            stacklevel=2,
        )
    return allocation


def layer_gains(
    name: str,
    weight: Tensor,
    statistics: LayerStatistics | None,
    options: DecompositionOptions,
    *,
    centred: bool,
    adaptation_rank: int,
) -> tuple[LayerGains, ProjectedWeight]:
    """Return what each rank of a layer gains, in units that compare between layers, and its projected weight.

    Args:
        name: The layer's, for errors.
        weight: ``(out, in)``.
        statistics: The layer's; ``None`` for a data-free decomposition.
        options: The decomposition.
        centred: Whether a bias will take up the mean error.
        adaptation_rank: Ranks that are left to the task.

    Raises:
        ValueError: With the layer's name, if the statistics cannot be used.
    """
    try:
        projected = project_weight(weight, statistics, options, centred=centred)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    # K-FAC's Fisher matrix of a layer that is applied to N positions is N C_g (x) C_x: layers that see one
    # position for each example (a pooler) compare with those that see every token. What is no mean stays as it is,
    # also where there are statistics for another reason: adaptation ranks start along them.
    weighting = statistics.num_tokens if statistics is not None and options.averages_positions else 1
    gains = LayerGains(
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        gains=(weighting * projected.gains()).cpu(),
        dense_gain=weighting * projected.total_energy,
    )
    return gains.with_adaptation(adaptation_rank), projected


def _fixed_rank(name: str, rank: int, gains: LayerGains, storage: Storage) -> int:
    """Return what a rank that the user decided comes to: full rank where factors would cost as much as the weight."""
    max_rank = gains.gains.numel()
    within = min(rank, max_rank)
    if rank >= gains.full_rank or stays_dense(within, gains.out_features, gains.in_features, storage):
        return gains.full_rank
    if rank > max_rank:
        warnings.warn(
            f"{name}: rank {rank} was asked for, but the union of subspaces has {max_rank} dimensions; rank "
            f"{max_rank} is used. Raise `weight_energy`, `input_energy` or `gradient_energy` to widen it.",
            NumericalWarning,
            stacklevel=3,
        )
    return within


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
        rank: As planned, adaptation ranks included; capped at the dimension of the subspaces, but full rank reproduces
            the weight, and has adaptation ranks on top.
        options: Decomposition, bias correction and adaptation ranks.
        projected: From `layer_gains`, if it was kept.

    Returns:
        Factors in float64 on the weight's device. With ``bias_correction``, the bias takes up the mean error:
        ``b' = b + (W - W_r) mean(x)``.
    """
    if rank >= min(weight.shape):
        projected = project(weight)
    elif projected is None:
        centred = options.bias_correction and bias is not None
        projected = project_weight(weight, statistics, options.decomposition, centred=centred)
    is_dense = rank >= min(weight.shape)
    adaptation_rank = capped_adaptation_rank(options.adaptation_rank, min(rank, *weight.shape))
    reserved_rank = 0 if is_dense else capped_adaptation_rank(options.reserved_rank, rank)
    factors = projected.truncate(rank - reserved_rank)
    if bias is not None:
        bias = to_decomposition_dtype(bias)
        if options.bias_correction and statistics is not None:
            error = to_decomposition_dtype(weight) - factors.dense()
            bias = bias + error @ to_decomposition_dtype(statistics.input.mean).to(error.device)
    left, from_left = interpolative_basis(factors.left)
    right, from_right = interpolative_basis(factors.right)
    core = from_left @ factors.core @ from_right.mT
    if not adaptation_rank:
        return LayerFactors(left, core, right, bias)
    down = starting_directions(weight, statistics, adaptation_rank, options.adaptation_init)
    if is_dense or options.adaptation_space == "free":
        return LayerFactors(left, core, right, bias, down, core.new_zeros(weight.shape[0], adaptation_rank))
    frozen = FrozenWeight.from_factors(left, core, right)
    up = core.new_zeros(frozen.factor.shape[0], adaptation_rank)
    return LayerFactors(left, core, right, bias, in_space_of(down, frozen), up, "retained")
