"""From the weight of one layer to its factors, and the ranks of all layers.

Two passes over the layers: `layer_gains` says what each rank of a layer is worth, `choose_ranks` needs that of all of
them; `factorize` then makes the factors of one layer at its rank.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peft_jactus.errors import NumericalWarning
from peft_jactus.numerics.allocation import Allocation, LayerGains, Storage, allocate
from peft_jactus.numerics.approximation import DecompositionOptions, project, project_weight
from peft_jactus.numerics.interpolation import InterpolativeBasis, interpolative_basis
from peft_jactus.numerics.linalg import to_decomposition_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

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


def choose_ranks(
    gains: Mapping[str, LayerGains], options: FactorizationOptions, fixed_ranks: Mapping[str, int]
) -> Allocation:
    """Choose the ranks of all layers under the budget; a `NumericalWarning` says if it is out of reach.

    Args:
        gains: By module name, see `layer_gains`.
        options: Budget and allocation.
        fixed_ranks: Ranks that the user decided, by module name.

    Returns:
        The ranks. A `ValueError` says if the fixed ones leave too little for the others.
    """
    fixed_ranks = {name: _cap_to_subspace(name, rank, gains[name]) for name, rank in fixed_ranks.items()}
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
    return allocation


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
    factors = projected.truncate(rank)
    if bias is not None:
        bias = to_decomposition_dtype(bias)
        if options.bias_correction and statistics is not None:
            error = to_decomposition_dtype(weight) - factors.dense()
            bias = bias + error @ to_decomposition_dtype(statistics.input.mean).to(error.device)
    left, from_left = interpolative_basis(factors.left)
    right, from_right = interpolative_basis(factors.right)
    return LayerFactors(left, from_left @ factors.core @ from_right.mT, right, bias)
