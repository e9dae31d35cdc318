"""A look at what was decided: the rank table and the rank plot."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from peft import PeftModel

from peft_jactus.numerics.allocation import stays_dense, stored_parameters
from peft_jactus.deployment.config import DENSE
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.deployment.integrity import DamagedCheckpointError
from peft_jactus.tuner.layer import JactusLayer
from peft_jactus.deployment.quantizer import JactusQuantizer
from peft_jactus.deployment.layers import FactorizedLinear
from peft_jactus.tuner.targeting import dense_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure
    from torch import nn

    from peft_jactus.numerics.allocation import Storage
    from peft_jactus.deployment.config import CompressionConfig, LayerForm


@dataclass(frozen=True)
class LayerRank:
    """One row of a `RankSummary`.

    Attributes:
        name: Full module name.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        rank: Rank of the layer; full where it stays dense.
        storage: How it is stored when deployed: ``"factored"``, ``"pivoted"`` or ``"dense"``.
        energy_kept: Share of the weighted energy that is kept, in [0, 1]; ``None`` if it is not known.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    storage: str
    energy_kept: float | None

    @property
    def num_dense(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features

    @property
    def num_stored(self) -> int:
        """Parameters that the deployed layer stores."""
        if self.stays_dense:
            return self.num_dense
        return stored_parameters(self.rank, self.out_features, self.in_features, cast("Storage", self.storage))

    @property
    def stays_dense(self) -> bool:
        """Whether factors don't pay, so that the layer is deployed as one weight."""
        return self.storage == DENSE


@dataclass(frozen=True)
class RankSummary:
    """Ranks of all targeted layers; prints as a table.

    Attributes:
        rows: One for each targeted layer, in the model's order.
        asked_ratio: ``retained_ratio`` of the config; ``None`` if it is not known.
    """

    rows: list[LayerRank]
    asked_ratio: float | None

    @property
    def storage(self) -> str:
        """Form of most factorised layers."""
        forms = [row.storage for row in self.rows if not row.stays_dense]
        return max(set(forms), key=forms.count) if forms else DENSE

    @property
    def retained_ratio(self) -> float:
        """Parameters that are kept, as a share of all targeted ones."""
        return sum(row.num_stored for row in self.rows) / sum(row.num_dense for row in self.rows)

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.name) for row in self.rows))
        lines = [f"{'layer':<{width}}  {'shape':>13}  {'rank':>5}  {'kept':>6}  {'energy':>7}"]
        for row in self.rows:
            energy = "" if row.energy_kept is None else f"{row.energy_kept:.4f}"
            lines.append(
                f"{row.name:<{width}}  {f'{row.out_features} x {row.in_features}':>13}  "
                f"{'dense' if row.stays_dense else row.rank:>5}  {row.num_stored / row.num_dense:>6.1%}  {energy:>7}"
            )
        stored, dense = (
            sum(row.num_stored for row in self.rows),
            sum(row.num_dense for row in self.rows),
        )
        lines.append(
            f"{len(self.rows)} targeted layers keep {stored:,} of {dense:,} parameters: {self.retained_ratio:.1%} "
            f"({self.storage})" + ("" if self.asked_ratio is None else f", asked for {self.asked_ratio:.1%}")
        )
        return "\n".join(lines)


def rank_summary(model: nn.Module, adapter_name: str = "default") -> RankSummary:
    """Return the ranks that the targeted layers got.

    Args:
        model: A `PeftModel` with a JACTUS adapter, a transformers model that loaded one, or a compressed model.
        adapter_name: Which adapter.

    Raises:
        ValueError: If the model has no such adapter and is not compressed.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, JactusQuantizer):
        return _summary_of_compressed(model, quantizer)
    configs = {
        name: config for name, config in getattr(model, "peft_config", {}).items() if isinstance(config, JactusConfig)
    }
    if adapter_name not in configs:
        raise ValueError(
            f"`model` has no JACTUS adapter named {adapter_name!r}, and is no compressed model. Its JACTUS adapters "
            f"are {list(configs)}; pass the name of one as `adapter_name`."
        )
    config = configs[adapter_name]
    rows = []
    for module_name, layer in model.named_modules():
        name = module_name.removeprefix("base_model.model.")
        if isinstance(layer, JactusLayer) and name in config.layer_ranks:
            rank, shape = config.layer_ranks[name], (layer.out_features, layer.in_features)
            storage = DENSE if stays_dense(rank, *shape, config.storage) else config.storage
            rows.append(LayerRank(name, *shape, rank, storage, config.layer_energy.get(name)))
    return RankSummary(rows, config.retained_ratio)


def _summary_of_compressed(model: nn.Module, quantizer: JactusQuantizer) -> RankSummary:
    if isinstance(model, PeftModel):  # an adapter on top
        model = model.get_base_model()
    modules = dict(model.named_modules())
    rows = []
    for name, form in quantizer.module_forms.items():
        layer = modules[name]
        if isinstance(layer, FactorizedLinear):
            out_features, in_features = layer.out_features, layer.in_features
        else:
            out_features, in_features = dense_weight(layer).shape
        rows.append(LayerRank(name, out_features, in_features, form.rank, form.storage, form.energy_kept))
    order = {name: position for position, name in enumerate(modules)}
    rows.sort(key=lambda row: order[row.name])
    return RankSummary(rows, quantizer.quantization_config.retained_ratio)


def summary_of_checkpoint(compression: CompressionConfig, shapes: Mapping[str, tuple[int, ...]]) -> RankSummary:
    """Return the ranks of a compressed checkpoint from its headers alone.

    A `DamagedCheckpointError` says if it does not hold the layers that ``config.json`` describes.

    Args:
        compression: The ``quantization_config`` of its ``config.json``.
        shapes: Of all its tensors, by name.
    """
    rows = [
        LayerRank(name, *_stored_features(name, form, shapes), form.rank, form.storage, form.energy_kept)
        for name, form in sorted(compression.layers.items(), key=lambda item: _with_numbers(item[0]))
    ]
    return RankSummary(rows, compression.retained_ratio)


def summary_of_adapter(config: JactusConfig, shapes: Mapping[str, tuple[int, ...]]) -> RankSummary:
    """Return the ranks of a saved adapter from its headers alone.

    Args:
        config: Its ``adapter_config.json``.
        shapes: Of all its tensors, by name.

    Raises:
        ValueError: If the file does not hold the layers that the config describes.
    """
    rows = []
    for name, rank in sorted(config.layer_ranks.items(), key=lambda item: _with_numbers(item[0])):
        core, left, right = (
            shapes.get(f"base_model.model.{name}.jactus_{part}", ()) for part in ("core", "left_order", "right_order")
        )
        if len(left) != 1 or len(right) != 1 or core != (rank, rank):
            raise ValueError(
                f"{name}: adapter_config.json gives it rank {rank}; the adapter's file holds a core of {core}, and "
                f"orders of {left} and {right} features. It is damaged; save it again."
            )
        features = (left[0], right[0])
        storage = DENSE if stays_dense(rank, *features, config.storage) else config.storage
        rows.append(LayerRank(name, *features, rank, storage, config.layer_energy.get(name)))
    if not rows:
        raise ValueError(
            "adapter_config.json has no `layer_ranks`: this is not an adapter that `get_peft_model` made."
        )
    return RankSummary(rows, config.retained_ratio)


def _stored_features(name: str, form: LayerForm, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return (out, in) of a layer, from the shapes of its parts in a checkpoint."""
    parts = {key.removeprefix(f"{name}."): shape for key, shape in shapes.items() if key.startswith(f"{name}.")}
    try:
        if form.storage == DENSE:
            out_features, in_features = parts["weight"]
            # Conv1D stores its weight transposed; it always has a bias.
            is_transposed = parts.get("bias", (out_features,)) != (out_features,)
            features = (in_features, out_features) if is_transposed else (out_features, in_features)
        elif form.storage == "factored":
            features = (parts["up.weight"][0], parts["down.weight"][1])
        elif "rows.weight" in parts:
            features = (parts["rows.weight"][0] + parts["others.weight"][0], parts["rows.weight"][1])
        else:
            features = (parts["columns.weight"][0], parts["columns.weight"][1] + parts["others.weight"][1])
    except (KeyError, IndexError, ValueError):
        features = (0, 0)
    if form.rank > min(features):
        raise DamagedCheckpointError(
            f"{name}: config.json describes a {form.storage} layer of rank {form.rank}; the checkpoint holds {parts}. "
            "Download or export it again."
        )
    return features


def _with_numbers(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts block 10 after block 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def plot_ranks(model: nn.Module | RankSummary, adapter_name: str = "default") -> Figure:
    """Plot rank by depth, a line for each projection, as Figure 3 of arXiv:2605.02829.

    Args:
        model: A model as for `rank_summary`, or its result.
        adapter_name: Which adapter.

    Returns:
        A matplotlib figure; ``figure.savefig("ranks.png")`` writes it. Rings are layers that stay dense.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("`plot_ranks` needs matplotlib: pip install 'peft-jactus[plot]'.") from error
    summary = model if isinstance(model, RankSummary) else rank_summary(model, adapter_name)
    lines: dict[str, list[tuple[int, LayerRank]]] = {}
    for row in summary.rows:
        depth, projection = _depth_and_projection(row.name)
        lines.setdefault(projection, []).append((depth, row))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for projection, points in lines.items():
        depths = [depth for depth, _ in points]
        ranks = [row.rank for _, row in points]
        (line,) = axes.plot(depths, ranks, marker="o", markersize=4, label=projection)
        dense = [(depth, row.rank) for depth, row in points if row.stays_dense]
        if dense:
            axes.plot(
                *zip(*dense, strict=True),
                "o",
                color=line.get_color(),
                markersize=9,
                fillstyle="none",
            )
    axes.set_xlabel("block")
    axes.set_ylabel("rank")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Ranks at {summary.retained_ratio:.0%} retained parameters ({summary.storage})")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _depth_and_projection(name: str) -> tuple[int, str]:
    """Split ``encoder.layer.3.attention.self.query`` into block 3 and the projection's name within the block."""
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    if match is None:
        return 0, name
    return int(match.group(1)), name[match.end() :]
