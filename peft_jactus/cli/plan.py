"""``peft-jactus plan``: what compression would give, before it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_jactus.cli.options import check_plot_file
from peft_jactus.tuner.planning import plan_ranks

if TYPE_CHECKING:
    from pathlib import Path

    from peft_jactus.cli.calibration import Calibration
    from peft_jactus.tuner.planning import RankPlan

_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def plan_model(calibration: Calibration, plot: Path | None) -> RankPlan:
    """Calibrate a model and plan its ranks; nothing is written.

    Args:
        calibration: Of which model, and how.
        plot: Where the plan will be plotted, if anywhere.

    Returns:
        The plan. A `ValueError` says if anything of this cannot be done; what costs nothing is checked first.
    """
    check_plot_file(plot)
    calibrated = calibration.run()
    return plan_ranks(calibrated.model, calibrated.config)


def curve_table(plan: RankPlan) -> str:
    """Return a table of several budgets, a line each."""
    rows = [("targeted layers", "whole model", "MB", "rise of the loss, nats")]
    for at in plan.curve(_RATIOS):
        rise = "" if at.loss_rise is None else f"{at.loss_rise:.3g}"
        rows.append((f"{at.retained_ratio:.1%}", f"{at.model_ratio:.1%}", f"{at.num_bytes / 1e6:,.1f}", rise))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
