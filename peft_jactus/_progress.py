"""Progress bars: one kind for all that takes longer than a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from peft_jactus._processes import process_index

if TYPE_CHECKING:
    from collections.abc import Iterable


def progress(
    items: Iterable[Any] | None = None, *, description: str, unit: str, total: int | None = None, shown: bool = True
) -> Any:
    """Return a tqdm bar, over ``items`` if there are any; `transformers.logging.disable_progress_bar` is for it, too.

    Args:
        items: To go through. Default: call the bar's ``update``.
        description: What is being done.
        unit: What is counted.
        total: How many there will be. Default: ``len(items)``.
        shown: Whether the user wants it. Only the first of several processes shows it.
    """
    disabled = not shown or process_index() != 0
    return logging.tqdm(items, desc=description, unit=unit, total=total, disable=disabled)
