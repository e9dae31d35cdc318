"""What a key-value cache keeps of its prompts, row by row: which experts run, and the embeddings that chose them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import Cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from peft_jactus.parse.layer import RoutingState
    from peft_jactus.parse.patterns import PatternBatch


@dataclass(frozen=True)
class PooledEmbeddings:
    """Sums of the embeddings of a batch's rows, which add up over the parts of a prompt.

    Attributes:
        total: ``(batch, dim)``, float64, so that padding does not show in the last digit; float32 where there is none.
        count: ``(batch, 1)``: how many positions.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def of(cls, embeddings: Tensor, mask: Tensor | Mapping[str, Tensor] | None) -> PooledEmbeddings:
        """Return the sums over the positions that the mask keeps; see `router.pool_embeddings`."""
        wide = torch.float32 if embeddings.device.type == "mps" else torch.float64
        embeddings = embeddings.detach().flatten(1, -2).to(wide)
        if isinstance(mask, Mapping):
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is not None and mask.dim() == 4:
            seen_by_last = mask[:, 0, -1, : embeddings.shape[1]]
            mask = seen_by_last if seen_by_last.dtype == torch.bool else seen_by_last == 0
        if mask is None or mask.shape[-1] < embeddings.shape[1]:
            count = embeddings.new_full((len(embeddings), 1), embeddings.shape[1])
            return cls(embeddings.sum(1), count)
        kept = mask[:, -embeddings.shape[1] :].to(embeddings).unsqueeze(2)  # (batch, positions, 1)
        return cls((embeddings * kept).sum(1), kept.sum(1))

    def mean(self) -> Tensor:
        """Return ``(batch, dim)``."""
        return self.total / self.count.clamp(min=1)

    def __add__(self, other: PooledEmbeddings) -> PooledEmbeddings:
        return PooledEmbeddings(self.total + other.total.to(self.total), self.count + other.count.to(self.count))

    def selected(self, rows: Sequence[int]) -> PooledEmbeddings:
        """Return those of these rows, in their order."""
        return PooledEmbeddings(self.total[list(rows)], self.count[list(rows)])


@dataclass(frozen=True)
class KeptPatterns:
    """What is kept of the prompts in a key-value cache; a copied cache shares it.

    Attributes:
        batch: One pattern for each row.
        pooled: What chose them.
        state: Of the model that they were chosen for.
    """

    batch: PatternBatch
    pooled: PooledEmbeddings
    state: RoutingState

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptPatterns:
        return self

    def selected(self, rows: Sequence[int]) -> KeptPatterns:
        """Return what is kept of these rows, in their order."""
        return KeptPatterns(self.batch.selected(rows), self.pooled.selected(rows), self.state)

    def repeated(self, num_rows: int) -> KeptPatterns:
        """Return it for a batch whose rows were repeated in place, as `generate` does for beams.

        Raises:
            ValueError: If ``num_rows`` is no multiple of the rows here.
        """
        here = len(self.batch.patterns)
        if num_rows == here:
            return self
        if num_rows % here:
            raise ValueError(
                f"The key-value cache was filled by a batch of {here} rows, whose rank experts are kept; it is now "
                f"used with {num_rows} rows. Use it with the same rows, or fill a new one."
            )
        return self.selected([row for row in range(here) for _ in range(num_rows // here)])


def keep_on(cache: Cache, kept: KeptPatterns) -> None:
    """Let ``cache`` carry ``kept``, and change its rows as those of its keys and values change."""
    if not isinstance(cache, _FollowingCache):
        own_class = type(cache)
        if own_class not in _FOLLOWING:
            _FOLLOWING[own_class] = type(own_class.__name__, (_FollowingCache, own_class), {})
        cache.__class__ = _FOLLOWING[own_class]
    cast("_FollowingCache", cache).jactus_patterns = kept


def kept_on(cache: Cache | None, state: RoutingState) -> KeptPatterns | None:
    """Return what a filled cache carries for the model of ``state``."""
    if not isinstance(cache, _FollowingCache) or cache.jactus_patterns.state is not state:
        return None
    return cache.jactus_patterns if cache.get_seq_length() else None


class _FollowingCache(Cache):
    """Comes before the class of a cache, and lets what it carries move with its rows."""

    jactus_patterns: KeptPatterns

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(torch.arange(self._num_rows)[indices.cpu()].tolist())  # also of a mask

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select([row for row in range(self._num_rows) for _ in range(repeats)])

    @property
    def _num_rows(self) -> int:
        return len(self.jactus_patterns.batch.patterns)

    def _select(self, rows: Sequence[int]) -> None:
        self.jactus_patterns = self.jactus_patterns.selected(rows)


_FOLLOWING: dict[type[Cache], type] = {}  # by the class that a cache came with
