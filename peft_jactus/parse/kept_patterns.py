"""What a key-value cache keeps of its prompts, row by row: which experts run, and the states that chose them.

It must say what the tokens in the cache would have chosen, whatever has been done to the cache since. So it is kept by
parts of the prompt, and follows the cache's own methods. What has been done in another way shows in length and keys.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

import torch
from transformers import Cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from peft_jactus.parse.layer import RoutingState
    from peft_jactus.parse.patterns import PatternBatch

# What models of transformers, and blocks of them, call what they keep of earlier tokens.
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache", "cache_params", "state", "mems")


@dataclass(frozen=True)
class PooledStates:
    """Sums of what the router reads of a batch's rows, which add up over the parts of a prompt.

    Attributes:
        total: ``(batch, dim)``, float64, so that padding does not show in the last digit; float32 where there is none.
        count: ``(batch, 1)``: how many positions.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def of(
        cls,
        states: Tensor,
        mask: Tensor | Mapping[str, Tensor] | None,
        *,
        start: int = 0,
        counted: int | None = None,
    ) -> PooledStates:
        """Return the sums over the positions that the mask keeps; see `inputs.pool_states`.

        Args:
            states: As there.
            mask: As there.
            start: Number of positions in the key-value cache before these.
            counted: How many positions at most, the first ones. Default: all.
        """
        wide = torch.float32 if states.device.type == "mps" else torch.float64
        states = states.detach().flatten(1, -2)
        kept = _kept_positions(mask, start, states.shape[1])
        states = states[:, :counted].to(wide)
        if kept is None:
            count = states.new_full((len(states), 1), states.shape[1])
            return cls(states.sum(1), count)
        kept = kept[:, :counted].to(states).unsqueeze(2)  # (batch, positions, 1)
        return cls(states.masked_fill(kept == 0, 0).sum(1), kept.sum(1))  # what padding becomes may be NaN

    def mean(self) -> Tensor:
        """Return ``(batch, dim)``."""
        return self.total / self.count.clamp(min=1)

    def __add__(self, other: PooledStates) -> PooledStates:
        return PooledStates(self.total + other.total.to(self.total), self.count + other.count.to(self.count))

    def selected(self, rows: Sequence[int]) -> PooledStates:
        """Return those of these rows, in their order."""
        return PooledStates(self.total[list(rows)], self.count[list(rows)])


def _kept_positions(mask: Tensor | Mapping[str, Tensor] | None, start: int, num_positions: int) -> Tensor | None:
    """Return ``(batch, positions)``, zero for padding, of the positions from ``start`` on; ``None`` keeps all."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or mask.shape[-1] < num_positions:
        return None
    # Of a cache that forgets, a mask has the last positions only; one that is as long as a static cache goes beyond.
    first = min(start, mask.shape[-1] - num_positions)
    mask = mask[..., first : first + num_positions]
    if mask.dim() < 4:
        return mask
    return _seen_in_steps(mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0)


def _seen_in_steps(seen: Tensor) -> Tensor:
    """Return which positions the last one sees, or those that it sees, and so on, as where each sees a window.

    What padding sees does not count, unless it is last.

    Args:
        seen: ``(batch, queries, keys)``, bool, of the same positions.

    Returns:
        ``(batch, keys)``, bool.
    """
    found = seen[:, -1]
    while True:
        further = found | (found.unsqueeze(2) & seen).any(1)
        if torch.equal(further, found):
            return found
        found = further


@dataclass(frozen=True)
class PromptPart:
    """A part of the prompts in a key-value cache that was routed at once, with all parts before it.

    Attributes:
        start: First position in the cache.
        end: Position after its last.
        batch: One pattern for each row.
        pooled: What chose them: this part and all before it.
    """

    start: int
    end: int
    batch: PatternBatch
    pooled: PooledStates

    def selected(self, rows: Sequence[int]) -> PromptPart:
        """Return it for these rows, in their order."""
        return PromptPart(self.start, self.end, self.batch.selected(rows), self.pooled.selected(rows))


@dataclass(frozen=True)
class _Stamp:
    """Recognises the keys of a cache, also in a copy: by the last position in the last layer, which all others reach.

    Attributes:
        keys: The tensor that has them.
        version: How often it was written to.
        last: ``(batch, head width)``: of one head.
    """

    keys: weakref.ref[Tensor]
    version: int
    last: Tensor

    @classmethod
    def of(cls, cache: Cache, length: int) -> _Stamp | None:
        """Return that of a cache; ``None`` if no layer has its keys as they are."""
        keys = _last_keys(cache)
        return None if keys is None else cls(weakref.ref(keys), _version_of(keys), _last_of(keys, length).clone())

    def fits(self, cache: Cache, length: int) -> bool:
        """Whether a cache of the same length has these keys, or one row of them for each row."""
        keys = _last_keys(cache)
        if keys is None:
            return False
        if self.keys() is keys and self.version == _version_of(keys):  # no look at the numbers, which a GPU waits for
            return True
        last = _last_of(keys, length).to(self.last)
        return torch.equal(last, self.last.expand_as(last) if len(self.last) == 1 else self.last)


def _last_keys(cache: Cache) -> Tensor | None:
    for layer in reversed(getattr(cache, "layers", ())):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor) and keys.dim() == 4 and keys.numel():
            return keys
    return None


def _last_of(keys: Tensor, length: int) -> Tensor:
    return keys.detach()[:, 0, min(length, keys.shape[2]) - 1]


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class KeptPatterns:
    """What is kept of the prompts in a key-value cache; a copied cache shares it.

    Attributes:
        parts: Of the prompts, at least one, in their order. Positions in no part were generated.
        length: Positions in the cache.
        stamp: Of its keys.
        state: Of the model that the patterns were chosen for.
    """

    parts: tuple[PromptPart, ...]
    length: int
    stamp: _Stamp | None
    state: RoutingState

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptPatterns:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a pickled cache goes to a model that is not this one

    @property
    def batch(self) -> PatternBatch:
        """The patterns that run now."""
        return self.parts[-1].batch

    @property
    def pooled(self) -> PooledStates:
        """What chose them."""
        return self.parts[-1].pooled

    def selected(self, rows: Sequence[int]) -> KeptPatterns:
        """Return what is kept of these rows, in their order."""
        return replace(self, parts=tuple(part.selected(rows) for part in self.parts))

    def shortened(self, length: int) -> KeptPatterns | None:
        """Return what is kept of the first positions; nothing of none."""
        parts = tuple(part for part in self.parts if part.start < length)
        return replace(self, parts=parts, length=length) if parts else None

    def describes(self, cache: Cache, length: int) -> bool:
        """Whether this is kept of what is in a cache, which has this length."""
        return length == self.length and (self.stamp is None or self.stamp.fits(cache, length))

    def check(self, cache: Cache, length: int) -> None:
        """Raise `ValueError` if these are not the ranks of the tokens in a cache, which has this length."""
        if not self.describes(cache, length):
            raise ValueError(
                "The key-value cache was changed without its own methods after the last call of this routed model (it "
                f"had {self.length} positions and has {length}), so it is not known which ranks belong to it. Change "
                "it with `crop`, `reorder_cache` and so on, or fill a new one; or set "
                "`model.rank_router.reroute_continuations = False`, to keep the ranks."
            )
        start, end = self.parts[-1].start, self.parts[-1].end
        if end > length:
            raise ValueError(
                f"The key-value cache was cut after {length} positions, inside a part of the prompt (positions "
                f"{start} to {end}), all of which chose its ranks. Fill the cache in two calls and cut it where the "
                "second one began, or fill a new one; or set `model.rank_router.reroute_continuations = False`, to "
                "keep the ranks."
            )

    def repeated(self, num_rows: int) -> KeptPatterns:
        """Return it for a batch of one row that was repeated.

        Raises:
            ValueError: If there are other rows here, so that it isn't known which row is which.
        """
        here = len(self.batch.patterns)
        if num_rows == here:
            return self
        if here > 1:
            raise ValueError(
                f"The key-value cache was filled by a batch of {here} rows, whose rank experts are kept; it is now "
                f"used with {num_rows} rows. Use it with the same rows, or change them by the methods of the cache "
                "(`batch_repeat_interleave`, `batch_select_indices`), or fill a new one."
            )
        return self.selected([0] * num_rows)


def cache_among(arguments: Mapping[str, Any]) -> Cache | None:
    """Return the key-value cache among a call's arguments, by name.

    Raises:
        TypeError: If there is one of a class that can't be followed: a model's own, or a tuple of tensors.
    """
    for value in arguments.values():
        if isinstance(value, Cache):
            return value
    for name in CACHE_ARGUMENTS:
        value = arguments.get(name)
        if value is not None:
            raise TypeError(
                f"`{name}` is a {type(value).__name__}, not a `Cache` of transformers, so it cannot carry the ranks of"
                " its prompts. Call the model with `use_cache=False`, also in `generate`; `generate_batch` always has"
                " such a cache, so it cannot be used."
            )
    return None


def length_of(cache: Cache | None) -> int:
    """Return how many positions are in a cache."""
    if cache is None:
        return 0
    counted = _counted_by(cache)
    if counted is not None:
        return counted
    kept = cache.jactus_patterns if isinstance(cache, _FollowingCache) else None
    return int(cache.has_previous_state()) if kept is None else kept.length


def _counted_by(cache: Cache) -> int | None:
    try:
        return int(cache.get_seq_length())
    except ValueError:  # it has only layers of linear attention, which do not count
        return None


def keep_on(cache: Cache, parts: tuple[PromptPart, ...], state: RoutingState, *, length: int) -> None:
    """Let ``cache`` carry the ranks of its prompts, and change them as its keys and values change.

    Args:
        cache: After a call.
        parts: Of its prompts, as in `KeptPatterns`.
        state: As in `KeptPatterns`.
        length: Number of positions, for caches that do not count them.
    """
    if not isinstance(cache, _FollowingCache):
        cache.__class__ = _following(type(cache))
    counted = _counted_by(cache)
    length = length if counted is None else counted
    kept = KeptPatterns(parts, length, _Stamp.of(cache, length), state)
    cast("_FollowingCache", cache).jactus_patterns = kept


def kept_on(cache: Cache | None, state: RoutingState) -> KeptPatterns | None:
    """Return what a cache carries for the model of ``state``."""
    kept = cache.jactus_patterns if isinstance(cache, _FollowingCache) else None
    return kept if kept is not None and kept.state is state else None


class _FollowingCache(Cache):
    """Comes before the class of a cache, and lets what it carries move with its keys and values.

    Attributes:
        jactus_patterns: What is kept; ``None`` if it is not known any more.
    """

    jactus_patterns: KeptPatterns | None

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        own_class = type(self).__mro__[2]  # after the class that was made, and this one
        return _new_following, (own_class,), vars(self).copy()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        kept = self._known()
        super().reorder_cache(beam_idx)
        self._select(kept, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        kept = self._known()
        super().batch_select_indices(indices)
        self._select(kept, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        kept = self._known()
        super().batch_repeat_interleave(repeats)
        self._select(kept, slice(None), repeats)

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]  # transformers: untyped
        self.jactus_patterns = None

    def crop(self, tokens_to_remove: int) -> None:
        kept, before = self._known(), length_of(self)
        super().crop(tokens_to_remove)
        counted, left = _counted_by(self), max(before - abs(tokens_to_remove), 0)
        # As those with quantised layers do, a cache may lose tokens without counting them.
        self._keep(kept.shortened(left) if kept is not None and counted in (None, left) else None)

    def _known(self) -> KeptPatterns | None:
        """Return what is kept, if it is of what is in the cache now."""
        kept, length = self.jactus_patterns, length_of(self)
        return kept if kept is not None and kept.describes(self, length) else None

    def _select(self, kept: KeptPatterns | None, rows: Tensor | slice, repeats: int = 1) -> None:
        if kept is not None:
            index = rows.cpu() if isinstance(rows, torch.Tensor) else rows  # numbers, or a mask
            numbers = torch.arange(len(kept.batch.patterns))[index].repeat_interleave(repeats)
            kept = kept.selected(numbers.tolist())
        self._keep(kept)

    def _keep(self, kept: KeptPatterns | None) -> None:
        self.jactus_patterns = kept and replace(kept, stamp=_Stamp.of(self, kept.length))


def _following(own_class: type[Cache]) -> type[Cache]:
    if own_class not in _FOLLOWING:
        _FOLLOWING[own_class] = type(own_class.__name__, (_FollowingCache, own_class), {})
    return _FOLLOWING[own_class]


def _new_following(own_class: type[Cache]) -> Cache:
    """Return a cache without contents, for copies and pickles."""
    following = _following(own_class)
    return following.__new__(following)


_FOLLOWING: dict[type[Cache], type[Cache]] = {}  # by the class that a cache came with
