"""Which layers to take statistics of at a time, so that these fit into a stated memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft_jactus.numerics.moments import SecondMoment
from peft_jactus.tuner.sizes import parse_size
from peft_jactus.tuner.targeting import dense_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


def parse_memory_limit(limit: int | str | None) -> int | None:
    """Return bytes; raise `ValueError` for what is no size."""
    if limit is None:
        return None
    try:
        return parse_size(limit)
    except ValueError as error:
        raise ValueError(f"`max_statistics_memory` {error}") from error


def split_into_groups(
    targets: Mapping[str, nn.Module], limit: int | None, *, row_fisher: bool
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
        needed = statistics_bytes(module, row_fisher=row_fisher)
        if needed > limit:
            raise ValueError(
                f"`max_statistics_memory` is {limit / 2**20:.1f} MiB, but {name} alone needs {needed / 2**20:.1f} "
                "MiB. Raise the limit, or add the name to `exclude_modules`."
            )
        if needed > free:
            groups.append({})
            free = limit
        groups[-1][name] = module
        free -= needed
    return groups


def statistics_bytes(module: nn.Module, *, row_fisher: bool) -> int:
    """Return what the sums of one layer take: of its inputs, of its gradients, and the Fisher information of rows."""
    weight = dense_weight(module)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    out_features, in_features = weight.shape
    moments = SecondMoment.num_bytes(out_features, dtype) + SecondMoment.num_bytes(in_features, dtype)
    return moments + (out_features * dtype.itemsize if row_fisher else 0)
