"""Targeted layers that calibration says nothing about: all of them are named at once, or left dense."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from peft_jactus.numerics.moments import LayerStatistics
    from peft_jactus.tuner.config import JactusConfig

ADVICE = (
    "Add the names to `exclude_modules`, or pass `leave_unusable_dense=True`. If tokens or gradients are missing, "
    "calibrate on batches that use these layers; if the head starts at zero, pass `head_warmup_steps`."
)


def find_unusable(
    statistics: Mapping[str, LayerStatistics], names: Iterable[str], uses: Mapping[str, str]
) -> dict[str, str]:
    """Return why layers can't be compressed, by name.

    Args:
        statistics: Of all layers.
        names: Of the layers to look at.
        uses: How the model uses weights past their layers (`weight_watch`).
    """
    reasons = {name: f"the model uses its weight without calling the layer: it {use}" for name, use in uses.items()}
    for name in names:
        layer = statistics[name]
        if name in reasons:
            continue
        if layer.num_tokens == 0:
            reasons[name] = "no calibration token reached it, or none of its output reached the loss"
        elif not layer.input.quartic_sum > 0:
            reasons[name] = "its inputs are zero everywhere"
        elif not layer.gradient.quartic_sum > 0:
            reasons[name] = "its gradient is zero everywhere"
    return reasons


def report(reasons: Mapping[str, str]) -> str:
    """Return a line for each reason, with the layers that have it."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return "\n".join(f"{', '.join(names)}: {reason}." for reason, names in by_reason.items())


def exclude_(config: JactusConfig, names: Iterable[str], targets: Iterable[str]) -> None:
    """Add full names of ``targets`` to ``config.exclude_modules``, whatever its form, and no other target.

    An entry of a list also excludes the modules whose names end with it.
    """
    names, excluded = list(names), config.exclude_modules
    endings = tuple(f".{name}" for name in names)
    if isinstance(excluded, str):
        patterns = [f"(?:{excluded})"]
    elif any(target.endswith(endings) for target in targets):
        patterns = [rf"(?:.*\.)?{re.escape(entry)}" for entry in excluded or ()]
    else:
        config.exclude_modules = [*(excluded or ()), *names]
        return
    config.exclude_modules = "|".join([*patterns, *(re.escape(name) for name in names)])
