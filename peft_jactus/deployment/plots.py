"""Pictures of ranks, for people who would rather look than read; they can be read on light and on dark pages."""

from __future__ import annotations

import re
from contextlib import contextmanager
from statistics import mean
from typing import TYPE_CHECKING, Any

from peft_jactus.deployment.ranks import rank_summary
from peft_jactus.tuner.rank_table import RankSummary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType
    from torch import nn

    from peft_jactus.tuner.planning import RankPlan
    from peft_jactus.tuner.rank_table import LayerRank

# Each has a contrast of 3.5 and more to white and to the grey of dark pages (#0d1117).
GREY = "#7d7d7d"
COLORS = (
    "#3a72b0", "#c4601d", "#2f8f5b", "#9467bd", "#b04a4a", "#1a8fa3", "#c2568f", "#9a7a1f", "#5f6fd0", "#8c6d5a",
)  # fmt: skip
_MARKERS = "osD^vP<X>p"


@contextmanager
def light_and_dark() -> Iterator[None]:
    """Make figures inside that can be read on light and on dark pages: no background, and colours for both.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'peft-jactus[plot]'.") from error
    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style: dict[Any, Any] = {
        **dict.fromkeys(grey, GREY),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), "none"),
        "legend.frameon": False,
        "axes.prop_cycle": f"cycler('color', {list(COLORS)}) + cycler('marker', {list(_MARKERS)})",
        "lines.markersize": 4,
    }
    with mpl.rc_context(style):
        yield


@light_and_dark()
def picture_formats() -> set[str]:
    """Return the endings of files that a figure can be written to; needs matplotlib."""
    from matplotlib.backend_bases import FigureCanvasBase

    return set(FigureCanvasBase.get_supported_filetypes())


@light_and_dark()
def plot_ranks(model: nn.Module | RankSummary, adapter_name: str = "default") -> Figure:
    """Plot rank by depth, one line per projection, as in Figure 3 of arXiv:2605.02829; needs matplotlib.

    Args:
        model: A model as for `rank_summary`, or its result.
        adapter_name: Which adapter.

    Returns:
        A matplotlib figure; ``figure.savefig("ranks.png")`` writes it. Rings mark layers that stay dense.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
        (line,) = axes.plot(depths, ranks, label=projection)
        dense = [(depth, row.rank) for depth, row in points if row.stays_dense]
        if dense:
            _ring(axes, *zip(*dense, strict=True), color=line.get_color())
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


@light_and_dark()
def plot_plan(plan: RankPlan) -> Figure:
    """Plot the expected loss and the size for all budgets, to choose a ratio; needs matplotlib.

    Args:
        plan: From `plan_ranks`.

    Returns:
        A matplotlib figure. Left: the expected rise of the loss or, if it is not known, the lost share of the weights'
        energy. Right: the size of the checkpoint. The ring marks the plan itself.
    """
    from matplotlib.figure import Figure

    curve = plan.curve()
    figure = Figure(figsize=(9, 4), layout="constrained")
    cost_axes, size_axes = figure.subplots(1, 2)
    ratios = [at.retained_ratio for at in curve]
    name, costs = _costs([*curve, plan])
    cost_axes.plot(ratios, costs[:-1])
    _ring(cost_axes, plan.retained_ratio, costs[-1])
    if any(cost > 0 for cost in costs):
        cost_axes.set_yscale("log", nonpositive="mask")  # where all is kept, nothing is lost
    cost_axes.set_ylabel(name)
    size_axes.plot(ratios, [at.num_bytes / 1e6 for at in curve])
    _ring(size_axes, plan.retained_ratio, plan.num_bytes / 1e6)
    size_axes.axhline(plan.dense_bytes / 1e6, color=GREY, linewidth=1, linestyle="--", label="dense model")
    size_axes.set_ylim(bottom=0)
    size_axes.set_ylabel("size of the whole model, MB")
    size_axes.legend(fontsize="small")
    for axes in (cost_axes, size_axes):
        axes.set_xlabel("kept of the targeted layers' parameters")
        axes.grid(visible=True, alpha=0.3)
    figure.suptitle(f"{plan.retained_ratio:.0%} of the targeted layers, {plan.model_ratio:.0%} of the whole model")
    return figure


def _costs(plans: list[RankPlan]) -> tuple[str, list[float]]:
    rises = [plan.loss_rise for plan in plans]
    if None not in rises:
        return "expected rise of the loss, nats", [rise for rise in rises if rise is not None]
    rows = [plan.summary.rows for plan in plans]
    return "energy lost, mean over layers", [1 - mean(row.energy_kept or 0 for row in table) for table in rows]


def _ring(axes: Axes, x: Any, y: Any, *, color: ColorType = COLORS[1]) -> None:
    axes.plot(x, y, "o", color=color, markersize=10, fillstyle="none")
