"""What each rank of each layer is worth, and which ranks a budget buys; no weight is touched here."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from peft_jactus._processes import gather_objects, process_index
from peft_jactus._progress import progress
from peft_jactus.errors import NumericalWarning
from peft_jactus.numerics.allocation import DENSE, stays_dense
from peft_jactus.numerics.factorization import choose_ranks, layer_gains
from peft_jactus.tuner.budget import budget_ratio, ranks_within_budget
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.tuner.model_size import ModelSize
from peft_jactus.tuner.rank_table import LayerRank, RankSummary
from peft_jactus.tuner.targeting import (
    check_finite,
    dense_weight,
    features_of,
    has_bias,
    log_once,
    match_ranks,
    targeted_modules,
    weight_loaded,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from peft_jactus.numerics.allocation import Allocation, LayerGains
    from peft_jactus.numerics.approximation import ProjectedWeight
    from peft_jactus.numerics.factorization import FactorizationOptions
    from peft_jactus.numerics.moments import LayerStatistics, StatisticsNeeds

# Memory for what the measurement leaves to the factorization: 22 million parameters (MiniLM) take 0.2 GB.
KEEP_BYTES = 2**29
CURVE_RATIOS = tuple(step / 20 for step in range(4, 21))  # 0.2 to 1


@dataclass(frozen=True)
class Measurement:
    """What was found out about the targeted layers.

    Attributes:
        gains: What each rank of each layer is worth.
        projections: What `factorize` then need not compute again, of the layers that there was memory for.
    """

    gains: dict[str, LayerGains]
    projections: dict[str, ProjectedWeight]

    def energy_kept(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return the share of each layer's weighted energy that its rank keeps, in [0, 1], to six digits."""
        return {name: round(self.gains[name].energy_kept(rank), 6) for name, rank in ranks.items()}


@torch.no_grad()
def measure_gains(
    targets: Mapping[str, nn.Module],
    statistics: Mapping[str, LayerStatistics] | None,
    options: FactorizationOptions,
    *,
    keep_bytes: int,
    owners: Mapping[str, int] | None,
    progress_bar: bool,
) -> Measurement:
    """Find out what each rank of each layer is worth, one layer at a time.

    Args:
        targets: The layers by full module name.
        statistics: By module name; ``None`` for a data-free decomposition.
        options: Decomposition and bias correction.
        keep_bytes: Memory for `Measurement.projections`.
        owners: Which process looks at which layer; all of them get the same gains. ``None``: each at all layers.
        progress_bar: Show a bar over the layers.

    Returns:
        The measurement. A `ValueError` names a module whose statistics cannot be used, or whose weight is not finite.
    """
    check_finite(targets)  # all of them first: in each process, and before the work
    gains: dict[str, LayerGains] = {}
    projections: dict[str, ProjectedWeight] = {}
    mine = [name for name in targets if owners is None or owners[name] == process_index()]
    for name in progress(mine, description="Ranking directions", unit="layer", shown=progress_bar):
        # One call a layer, so that its weight is let go before the next one is asked for.
        gains[name], projected = layer_gains(
            name,
            _loaded_weight(targets[name]),
            None if statistics is None else statistics[name],
            options.decomposition,
            centred=options.bias_correction and has_bias(targets[name]),
            adaptation_rank=options.reserved_rank,
        )
        if projected.num_bytes <= keep_bytes:
            keep_bytes -= projected.num_bytes
            projections[name] = projected
    if owners is not None:
        of_all = {name: found for part in gather_objects(gains) for name, found in part.items()}
        gains = {name: of_all[name] for name in targets}
    _say_where_rank_multiple_is_ignored(gains, options.rank_multiple)
    return Measurement(gains, projections)


def _say_where_rank_multiple_is_ignored(gains: Mapping[str, LayerGains], rank_multiple: int) -> None:
    ignored = [name for name, layer in gains.items() if layer.rank_step(rank_multiple) != rank_multiple]
    if ignored and rank_multiple != JactusConfig.rank_multiple:  # somebody asked for it
        log_once(
            f"`rank_multiple`={rank_multiple} is not used for {len(ignored)} of {len(gains)} layers, which are too "
            f"small for steps of {rank_multiple} ranks: {', '.join(ignored[:5])}{', ...' if len(ignored) > 5 else ''}."
        )


def _loaded_weight(module: nn.Module) -> Tensor:
    with weight_loaded(module):
        return dense_weight(module)


# -- statistics that fit --------------------------------------------------------------------------------------


def usable_statistics(
    config: JactusConfig, targets: Mapping[str, nn.Module], statistics: Mapping[str, LayerStatistics] | None
) -> Mapping[str, LayerStatistics] | None:
    """Return the statistics that ``config`` needs for ``targets``; ``None`` if it needs none.

    Raises:
        ValueError: If there are none, or they do not fit the layers; says what to do.
    """
    if not config.needs_statistics:
        if config.frozen_bits == 4:
            warnings.warn(
                f"`frozen_bits`=4 with `decomposition`={config.decomposition!r} rounds each number independently, "
                "which loses several times as much as rounding with calibration statistics. Calibrate, and use "
                "another decomposition; or set `frozen_bits=8`.",
                NumericalWarning,
                stacklevel=2,
            )
        return None
    if statistics is None:
        remedy = "Call `peft_jactus.calibrate(model, config, batches)` first, or set `config.statistics`"
        if config.layer_ranks:
            raise ValueError(
                "This JactusConfig has already made an adapter, which released its statistics. Set "
                "`config.statistics` to what `calibrate` returned; or, for several models from one calibration, give "
                "each `get_peft_model` a copy of the config: `dataclasses.replace(config, retained_ratio=...)`."
            )
        raise ValueError(
            f'This JactusConfig has no calibration statistics. {remedy}; `decomposition="svd"` starts without data.'
        )
    check_statistics(statistics, targets, config.statistics_needs(), source="`config.statistics`")
    return statistics


def check_statistics(
    statistics: Mapping[str, LayerStatistics], targets: Mapping[str, nn.Module], needs: StatisticsNeeds, *, source: str
) -> None:
    """Check that ``statistics`` cover ``targets`` with the right shapes, and hold what is needed.

    Raises:
        ValueError: If they do not; names the module.
    """
    for name, module in targets.items():
        layer = statistics.get(name)
        if layer is None:
            raise ValueError(
                f"{source} has no statistics of {name}. Calibrate with the config and model that you compress."
            )
        expected = features_of(module)
        found = (layer.gradient.dim, layer.input.dim)
        if expected != found:
            raise ValueError(f"{source} has statistics of {name} for a weight of shape {found}; it has {expected}.")
        if needs.num_directions and not _has_directions(layer, needs.num_directions):
            raise ValueError(
                f"{source} has no sketch of {needs.num_directions} directions of the weight's gradient for {name}, "
                "along which its adaptation ranks start. Calibrate with this config, to another `statistics_file`, or "
                'set `adaptation_init="inputs"`.'
            )
        if needs.row_fisher and layer.row_fisher is None:
            raise ValueError(
                f"{source} has no Fisher information of {name}: it was calibrated for a decomposition other than "
                '"fwsvd". Calibrate for "fwsvd" to another `statistics_file`; one that is there is used as it is.'
            )


def _has_directions(layer: LayerStatistics, num_directions: int) -> bool:
    sketch = layer.weight_gradient
    return sketch is not None and sketch.size >= min(num_directions, layer.input.dim, layer.gradient.dim)


# -- the plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layers:
    """What a plan for any budget is made from."""

    measured: Measurement
    options: FactorizationOptions
    fixed_ranks: dict[str, int]
    size: ModelSize
    num_loss_terms: int | None

    def plan(self, ratio: float) -> RankPlan:
        options = dataclasses.replace(self.options, retained_ratio=ratio)
        return RankPlan(self, choose_ranks(self.measured.gains, options, self.fixed_ranks), ratio)

    def loss_rise(self, name: str, rank: int) -> float | None:
        """Return half of the squared weighted error of a layer, in nats for one term of the loss."""
        if self.num_loss_terms is None:
            return None
        layer = self.measured.gains[name]
        if rank == layer.full_rank:
            return 0.0
        return max(0.0, layer.dense_gain - float(layer.gains[:rank].sum())) / (2 * self.num_loss_terms)


@dataclass(frozen=True)
class RankPlan:
    """The rank that each layer would get, what is kept, and the expected rise of the loss; prints as a table.

    `plan_ranks` makes a plan. `at` gives the plan for another budget from the same measurement, in milliseconds.
    """

    _layers: _Layers
    _allocation: Allocation
    _asked_ratio: float | None

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each targeted layer by full module name; full rank means that the layer stays dense."""
        return dict(self._allocation.ranks)

    @functools.cached_property
    def summary(self) -> RankSummary:
        """The ranks as the table that `rank_summary` returns after compression."""
        storage = self._layers.options.storage
        kept = self._layers.measured.energy_kept(self.ranks)
        rows = []
        for name, rank in self.ranks.items():
            shape = self._layers.size.shapes[name]
            form = DENSE if stays_dense(rank, *shape, storage) else storage
            rows.append(LayerRank(name, *shape, rank, form, kept[name]))
        size = self._layers.size
        return RankSummary(rows, self._asked_ratio, size.other_parameters, size.shared_parameters)

    @property
    def retained_ratio(self) -> float:
        """Share of the targeted layers' parameters that is kept."""
        return self.summary.retained_ratio

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole compressed model."""
        return self._layers.size.compressed_parameters(self.summary)

    @property
    def model_ratio(self) -> float:
        """Share of the whole model's parameters that is kept."""
        return self.num_parameters / self._layers.size.num_parameters

    @property
    def num_bytes(self) -> int:
        """Size of the compressed checkpoint's weights, in the model's dtypes; correct to about a percent."""
        return self._layers.size.compressed_bytes(self.ranks, self._layers.options.storage)

    @property
    def dense_bytes(self) -> int:
        """Size of the dense model's weights."""
        return self._layers.size.num_bytes

    @property
    def loss_rise(self) -> float | None:
        """Expected rise of the model's loss right after compression, before any training; in nats (for one label).

        Half of the K-FAC-weighted squared error, summed over the layers: a second-order estimate that ignores effects
        between layers. It is only as good as the calibration data: on rows that the model was trained on, gradients
        are small, and so is this estimate. docs/results.md compares it with measurements. It is ``None`` if the
        decomposition does not weigh both sides of a layer (``"jactus"`` and ``"kfac"`` do), or if the statistics do
        not say how many labels they saw.
        """
        rises = [self._layers.loss_rise(name, rank) for name, rank in self._allocation.ranks.items()]
        return None if None in rises else sum(rise for rise in rises if rise is not None)

    def at(self, retained_ratio: float) -> RankPlan:
        """Return the plan for another budget.

        Args:
            retained_ratio: Share of the targeted layers' parameters, in (0, 1].

        Raises:
            ValueError: If it is not in that range.
        """
        if not 0 < retained_ratio <= 1:
            raise ValueError(f"`retained_ratio` must be in (0, 1]; got {retained_ratio}.")
        return self._layers.plan(retained_ratio)

    def curve(self, retained_ratios: Iterable[float] = CURVE_RATIOS) -> list[RankPlan]:
        """Return the plans for several budgets; `plot_plan` plots them."""
        return [self.at(ratio) for ratio in retained_ratios]

    def __str__(self) -> str:
        lines = [
            str(self.summary),
            f"The whole model keeps {self.num_parameters:,} of {self._layers.size.num_parameters:,} parameters: "
            f"{self.model_ratio:.1%}, {self.num_bytes / 1e6:,.1f} of {self.dense_bytes / 1e6:,.1f} MB.",
        ]
        if self.loss_rise is not None:
            lines.append(f"Expected rise of the loss before training: {self.loss_rise:.3g} nats.")
        return "\n".join(lines)


def plan_ranks(
    model: nn.Module,
    config: JactusConfig,
    statistics: Mapping[str, LayerStatistics] | None = None,
    *,
    progress_bar: bool = True,
) -> RankPlan:
    """Return the ranks, the size and the expected loss that `peft.get_peft_model` would give, before you compress.

    The model, the config and the statistics do not change.

    Args:
        model: The dense model.
        config: What to compress, and by how much.
        statistics: What `calibrate` returned. Default: ``config.statistics``.
        progress_bar: Show a bar over the layers.

    Returns:
        The plan for the config's budget; `RankPlan.at` and `RankPlan.curve` give plans for other budgets. A
        `ValueError` is raised if statistics are missing or do not fit, or the budget cannot be met.

    Example:
        >>> import torch
        >>> from peft_jactus import JactusConfig, plan_ranks
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> config = JactusConfig(target_modules=["0"], retained_ratio=0.5, decomposition="svd")
        >>> plan = plan_ranks(model, config, progress_bar=False)
        >>> plan.ranks, f"{plan.retained_ratio:.2f}", f"{plan.model_ratio:.2f}"
        ({'0': 17}, '0.46', '0.53')
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    targets = targeted_modules(model, config)
    statistics = usable_statistics(config, targets, config.statistics if statistics is None else statistics)
    size = ModelSize.of(model, targets, config)
    budget_ratio(config, size)  # raises, before the work, if it cannot be reached
    options = config.factorization_options()
    measured = measure_gains(targets, statistics, options, keep_bytes=0, owners=None, progress_bar=progress_bar)
    num_terms = getattr(statistics, "num_loss_terms", None) if options.decomposition.estimates_loss else None
    fixed_ranks = match_ranks(targets, config.rank_pattern)
    allocation = ranks_within_budget(config, size, measured.gains, fixed_ranks)
    return RankPlan(_Layers(measured, options, fixed_ranks, size, num_terms), allocation, config.asked_ratio)
