"""The pattern cache: similar prompts run the same experts, so their choice and its gathered factors are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from peft_jactus.parse.patterns import ExpertPattern


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds, and how often it helped.

    Attributes:
        hits: Look-ups that found a similar prompt.
        misses: Look-ups that did not.
        evictions: Prompts that were forgotten to stay inside the bounds.
        entries: Prompts that are remembered now.
        patterns: Different patterns among them.
        num_bytes: Memory of these patterns' factors.
    """

    hits: int
    misses: int
    evictions: int
    entries: int
    patterns: int
    num_bytes: int


class PatternCache:
    """Patterns by prompt, found by similarity; the one that was not used for longest goes first. Thread-safe.

    Args:
        max_entries: Prompts at most; 0 remembers none.
        max_bytes: Memory of the patterns' factors at most. A pattern counts once, however many prompts share it.
        similarity: Least cosine between the keys of two prompts that share a pattern, in (0, 1]; at 1 the keys must be
            equal, which a cosine near 1 does not say.
    """

    def __init__(self, max_entries: int, max_bytes: int, similarity: float) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._similarity = similarity
        self._lock = threading.Lock()
        self._hits = self._misses = self._evictions = 0
        self._reset()

    def _reset(self) -> None:
        self._keys: Tensor | None = None  # (entries at most, dim), normalised
        self._patterns: OrderedDict[int, ExpertPattern] = OrderedDict()  # by row of the keys, oldest use first
        self._free = list(range(self._max_entries))
        self._shared: dict[bytes, tuple[ExpertPattern, int]] = {}  # by digest, with the number of entries
        self._num_bytes = 0

    def __deepcopy__(self, memo: dict[int, object]) -> PatternCache:
        # A copied model has factors of its own.
        return PatternCache(*self.__reduce__()[1])

    def __reduce__(self) -> tuple[type[PatternCache], tuple[int, int, float]]:
        return PatternCache, (self._max_entries, self._max_bytes, self._similarity)

    def clear(self) -> None:
        """Forget all prompts: the factors have changed."""
        with self._lock:
            self._reset()

    def find(self, key: Tensor) -> ExpertPattern | None:
        """Return the pattern of the most similar prompt, if it is similar enough.

        Args:
            key: ``(dim,)``; its length does not matter.
        """
        key = _normalised(key)
        with self._lock:
            row = self._similar(key, self._similarity)
            if row is None:
                self._misses += 1
                return None
            self._hits += 1
            self._patterns.move_to_end(row)
            return self._patterns[row]

    def _similar(self, key: Tensor, similarity: float) -> int | None:
        if self._keys is None or not self._patterns:
            return None
        rows = list(self._patterns)
        if similarity == 1:
            equal = (self._keys[rows] == key.to(self._keys)).all(1).nonzero()
            return rows[int(equal[0])] if len(equal) else None
        cosine, place = (self._keys[rows] @ key.to(self._keys)).max(0)
        return rows[int(place)] if float(cosine) >= similarity else None

    def find_equal(self, digest: bytes) -> ExpertPattern | None:
        """Return the pattern of this choice, whichever prompt made it; no look-up in the statistics."""
        with self._lock:
            pattern, _ = self._shared.get(digest, (None, 0))
            return pattern

    def add(self, key: Tensor, pattern: ExpertPattern) -> None:
        """Remember a prompt's pattern, if it fits at all."""
        key = _normalised(key)
        if not self._max_entries or pattern.num_bytes > self._max_bytes or not bool(key.isfinite().all()):
            return
        with self._lock:
            if self._similar(key, 1.0) is not None:  # another thread was faster, or it is twice in a batch
                return
            if self._keys is None or self._keys.device != key.device:
                self._keys = self._keys_on(key)
            held, count = self._shared.get(pattern.digest, (pattern, 0))
            if not count:
                self._num_bytes += held.num_bytes
            self._shared[held.digest] = (held, count + 1)
            while not self._free or self._num_bytes > self._max_bytes:
                self._forget_oldest()
            row = self._free.pop()
            self._keys[row] = key
            self._patterns[row] = held

    def _keys_on(self, key: Tensor) -> Tensor:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside
            if self._keys is not None:
                return self._keys.to(key.device)
            return torch.zeros(self._max_entries, len(key), device=key.device)

    def _forget_oldest(self) -> None:
        row, pattern = self._patterns.popitem(last=False)
        self._free.append(row)
        self._evictions += 1
        held, count = self._shared[pattern.digest]
        if count > 1:
            self._shared[pattern.digest] = (held, count - 1)
        else:
            del self._shared[pattern.digest]
            self._num_bytes -= held.num_bytes

    def info(self) -> CacheInfo:
        """Return counts since the model was built or loaded."""
        with self._lock:
            return CacheInfo(
                self._hits,
                self._misses,
                self._evictions,
                entries=len(self._patterns),
                patterns=len(self._shared),
                num_bytes=self._num_bytes,
            )


def _normalised(key: Tensor) -> Tensor:
    key = key.detach().float()
    return torch.nn.functional.normalize(key, dim=0)
