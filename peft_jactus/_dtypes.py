"""Which dtype a layer computes in, as `torch.nn.Linear` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what autocast makes of ``x`` in a product; ``None`` where it is off, or leaves ``x`` alone."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # none for `meta`
    return torch.get_autocast_dtype(device) if casts and x.dtype != torch.float64 else None


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that `torch.nn.Linear` gives its output: autocast's where that is on, else that of ``x``."""
    return autocast_dtype(x) or x.dtype
