"""What a key-value cache keeps of its prompts, row by row: which experts run, and the embeddings that chose them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import Cache

    from peft_jactus.parse.layer import RoutingState
    from peft_jactus.parse.patterns import PatternBatch

# The attribute of a cache.
_ON_CACHE = "_jactus_patterns"


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
    if not hasattr(cache, _ON_CACHE):
        cache.__class__ = _following(type(cache))  # type: ignore[arg-type]  # a class can be hashed
    setattr(cache, _ON_CACHE, kept)


def kept_on(cache: Cache | None, state: RoutingState) -> KeptPatterns | None:
    """Return what a filled cache carries for the model of ``state``."""
    kept: KeptPatterns | None = getattr(cache, _ON_CACHE, None)
    if cache is None or kept is None or kept.state is not state or not cache.get_seq_length():
        return None
    return kept


@functools.cache
def _following(cache_class: type[Cache]) -> type[Cache]:
    """Return a class of caches whose kept patterns move with their rows."""

    class Following(cache_class):  # type: ignore[misc,valid-type]  # known when it is called
        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._select(beam_idx.tolist())

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            rows = range(len(self._jactus_patterns.batch.patterns))
            self._select(torch.tensor(rows)[indices.cpu()].tolist())  # also of a mask

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            rows = range(len(self._jactus_patterns.batch.patterns))
            self._select([row for row in rows for _ in range(repeats)])

        def _select(self, rows: Sequence[int]) -> None:
            self._jactus_patterns: KeptPatterns = self._jactus_patterns.selected(rows)

    Following.__name__, Following.__qualname__ = cache_class.__name__, cache_class.__qualname__
    return Following
