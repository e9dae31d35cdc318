"""Which layers to take statistics of at a time, so that these fit into a stated memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft_jactus.tuner.sizes import parse_size
from peft_jactus.tuner.targeting import device_and_dtype, features_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from peft_jactus.numerics.moments import StatisticsNeeds


def parse_memory_limit(limit: int | str | None) -> int | None:
    """Return bytes; raise `ValueError` for what is no size."""
    if limit is None:
        return None
    try:
        return parse_size(limit)
    except ValueError as error:
        raise ValueError(f"`max_statistics_memory` {error}") from error


def split_into_groups(
    targets: Mapping[str, nn.Module], limit: int | None, needs: StatisticsNeeds
) -> list[dict[str, nn.Module]]:
    """Return runs of neighbours whose statistics fit into ``limit`` bytes; all of them if there is no limit.

    Each layer is counted with an input covariance of its own: which layers share one is only seen in a forward pass.

    Raises:
        ValueError: If the statistics of one layer alone do not fit; names it.
    """
    if limit is None:
        return [dict(targets)]
    groups: list[dict[str, nn.Module]] = []
    free = 0
    for name, module in targets.items():
        needed = statistics_bytes(module, needs)
        if needed > limit:
            raise ValueError(
                f"`max_statistics_memory` is {limit:,} bytes, but {name} alone needs {needed:,}. Raise the limit, or "
                "add the name to `exclude_modules`."
            )
        if needed > free:
            groups.append({})
            free = limit
        groups[-1][name] = module
        free -= needed
    return groups


def statistics_bytes(module: nn.Module, needs: StatisticsNeeds) -> int:
    """Return what the sums of one layer take."""
    _, dtype = device_and_dtype(module)
    return needs.num_bytes(*features_of(module), torch.promote_types(dtype, torch.float32))
