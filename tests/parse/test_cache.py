import copy
import os
import pickle
import random
import sys
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_jactus.parse.cache import CacheInfo, PatternCache
from peft_jactus.parse.experts import ExpertTable, LayerShape
from peft_jactus.parse.layer import RoutedLinear, RoutingState
from peft_jactus.parse.patterns import ExpertPattern
from tests.support.strategies import randn, seeds

DIM = 16
SECONDS = float(os.environ.get("JACTUS_CACHE_SECONDS", "3"))


@dataclass(frozen=True)
class StandIn:
    """What the cache looks at in a pattern."""

    digest: bytes
    num_bytes: int


def stand_in(name, num_bytes=1):
    return StandIn(str(name).encode(), num_bytes)


def axis(number):
    return torch.eye(DIM)[number]


def near(number, seed):
    """In the cluster of one axis: cosines above 0.98 among themselves, below 0.2 with those of other axes."""
    noise = randn(seed, DIM).float()
    return (0.5 + seed % 7) * (axis(number) + 0.05 * noise / noise.norm())


def at_angle(degrees):
    angle = torch.tensor(degrees).deg2rad()
    return angle.cos() * axis(0) + angle.sin() * axis(1)


@pytest.fixture(scope="module")
def routed():
    """A table of two layers, 6 to 5 features with 4 terms and 5 to 4 with 3, an expert each, and the layers."""
    state = RoutingState()
    shapes = [LayerShape(5, 6, 4), LayerShape(4, 5, 3)]
    layers = []
    for position, shape in enumerate(shapes):
        down = nn.Linear(shape.in_features, shape.rank, bias=False, dtype=torch.float64)
        up = nn.Linear(shape.rank, shape.out_features, dtype=torch.float64)
        layers.append(RoutedLinear(down, up, position, state))
    return ExpertTable(shapes, 1), layers


def pattern_of(routed, *selected):
    return ExpertPattern(torch.tensor(selected, dtype=torch.bool), *routed)


# -- hits and misses --------------------------------------------------------------------------------------


@given(seed=seeds, length=st.sampled_from([2.0**-10, 1.0, 2.0**10]))  # which round nothing
def test_the_same_prompt_is_a_hit_at_any_length_even_if_nothing_else_is_similar_enough(seed, length):
    cache, key, pattern = PatternCache(4, 10, 1.0), randn(seed, DIM), stand_in("a")
    assert cache.find(key) is None
    cache.add(key, pattern)
    assert cache.find(length * key) is pattern
    assert cache.find(key.float()) is pattern
    assert cache.find(-key) is None
    assert cache.info() == CacheInfo(hits=2, misses=2, evictions=0, entries=1, patterns=1, num_bytes=1)


@given(seed=seeds)
def test_at_a_similarity_of_one_only_equal_keys_are_a_hit(seed):
    cache, key = PatternCache(4, 10, 1.0), randn(seed, DIM).float()
    cache.add(key, stand_in("a"))
    other = key.clone()
    other[0] += 1e-5 * other.norm()
    assert float(torch.nn.functional.cosine_similarity(key.double(), other.double(), dim=0)) > 1 - 1e-9
    assert cache.find(other) is None


@pytest.mark.parametrize("similarity", [0.3, 0.9, 0.98])
def test_a_prompt_is_a_hit_from_the_threshold_on(similarity):
    cache, pattern = PatternCache(4, 10, similarity), stand_in("a")
    cache.add(at_angle(0.0), pattern)
    limit = float(torch.tensor(similarity).acos().rad2deg())
    for degrees in (limit - 0.1, 0.1 - limit):
        assert cache.find(3 * at_angle(degrees)) is pattern
    for degrees in (limit + 0.1, -limit - 0.1, 180.0):
        assert cache.find(3 * at_angle(degrees)) is None


def test_of_several_similar_prompts_the_most_similar_one_counts():
    cache, one, other = PatternCache(4, 10, 0.5), stand_in("a"), stand_in("b")
    cache.add(at_angle(0.0), one)
    cache.add(at_angle(40.0), other)
    for degrees, expected in ((-50.0, one), (15.0, one), (25.0, other), (95.0, other)):
        assert cache.find(at_angle(degrees)) is expected


def test_a_key_of_zeros_is_similar_to_nothing():
    cache = PatternCache(4, 10, 0.5)
    cache.add(torch.zeros(DIM), stand_in("a"))
    assert cache.find(torch.zeros(DIM)) is None
    assert cache.find(axis(0)) is None


def test_rows_that_hold_nothing_are_similar_to_nothing():
    cache = PatternCache(4, 10, 1e-3)
    cache.add(axis(0), stand_in("a"))
    assert cache.find(-axis(0)) is None
    assert cache.find(axis(1)) is None


def test_rows_that_hold_nothing_are_not_found_at_the_lowest_threshold():
    cache = PatternCache(4, 10, 1e-7)
    cache.add(axis(0), stand_in("a"))
    assert cache.find(-axis(0)) is None


def test_a_cache_that_began_in_inference_mode_goes_on_outside_it():
    cache = PatternCache(4, 10, 0.9)
    with torch.inference_mode():
        cache.add(axis(0), stand_in("a"))
    cache.add(axis(1), stand_in("b"))
    assert cache.find(axis(1)) == stand_in("b")


def test_a_prompt_that_is_not_finite_does_not_hide_the_others():
    cache = PatternCache(4, 10, 0.9)
    cache.add(axis(0), stand_in("a"))
    cache.add(torch.full((DIM,), torch.nan), stand_in("b"))
    assert cache.find(axis(0)) == stand_in("a")


# -- bounds and what is forgotten -------------------------------------------------------------------------


def test_the_prompt_not_used_for_longest_is_forgotten_first():
    cache = PatternCache(3, 10, 0.9)
    for number in range(3):
        cache.add(axis(number), stand_in(number))
    assert cache.find(axis(0)) == stand_in(0)
    cache.find_equal(b"1")  # no use of a prompt
    cache.add(axis(3), stand_in(3))
    assert cache.find(axis(1)) is None
    cache.add(axis(4), stand_in(4))
    assert [cache.find(axis(number)) is not None for number in range(5)] == [True, False, False, True, True]
    assert cache.info().evictions == 2


def test_a_cache_without_entries_remembers_nothing():
    cache = PatternCache(0, 10, 0.9)
    cache.add(axis(0), stand_in("a"))
    assert cache.find(axis(0)) is None
    assert cache.find_equal(b"a") is None
    assert cache.info() == CacheInfo(hits=0, misses=1, evictions=0, entries=0, patterns=0, num_bytes=0)


def test_a_pattern_larger_than_the_cache_is_not_kept_and_evicts_nothing():
    cache = PatternCache(4, 10, 0.9)
    cache.add(axis(0), stand_in("a", 10))
    cache.add(axis(1), stand_in("b", 11))
    assert cache.find(axis(1)) is None
    assert cache.find_equal(b"b") is None
    assert cache.find(axis(0)) == stand_in("a", 10)
    assert cache.info() == CacheInfo(hits=1, misses=1, evictions=0, entries=1, patterns=1, num_bytes=10)


def test_prompts_are_forgotten_until_a_pattern_fits():
    cache = PatternCache(9, 10, 0.9)
    for number, size in enumerate((3, 4, 3, 6)):
        cache.add(axis(number), stand_in(number, size))
    assert [cache.find_equal(str(number).encode()) is not None for number in range(4)] == [False, False, True, True]
    assert cache.info() == CacheInfo(hits=0, misses=0, evictions=2, entries=2, patterns=2, num_bytes=9)


def test_equal_patterns_share_memory_and_count_once(routed):
    first, equal, other = (pattern_of(routed, 1, 0, 1, 0, *rest) for rest in ((1, 0, 1), (1, 0, 1), (0, 1, 1)))
    assert first.digest == equal.digest != other.digest
    # float64: terms 0 and 2 of 6 + 5 numbers, and 0 and 2 of 5 + 4 of the second layer, or two in a row: no copies
    assert (first.num_bytes, other.num_bytes) == (8 * (2 * 11 + 2 * 9), 8 * 2 * 11)
    cache = PatternCache(3, 10_000, 0.9)
    cache.add(axis(0), first)
    cache.add(axis(1), equal)
    assert cache.find(axis(1)) is first
    assert cache.find_equal(equal.digest) is first
    cache.add(axis(2), other)
    assert (cache.info().patterns, cache.info().num_bytes) == (2, first.num_bytes + other.num_bytes)
    cache.add(axis(3), other)  # forgets the prompt of `first`, whose pattern another prompt still has
    assert cache.find(axis(0)) is None
    assert (cache.info().patterns, cache.info().num_bytes) == (2, first.num_bytes + other.num_bytes)
    cache.add(axis(4), other)
    assert cache.find_equal(first.digest) is None
    assert (cache.info().entries, cache.info().patterns, cache.info().num_bytes) == (3, 1, other.num_bytes)


def test_a_prompt_with_a_shared_pattern_evicts_nothing_where_bytes_are_short():
    cache = PatternCache(4, 10, 0.9)
    for number in range(3):
        cache.add(axis(number), stand_in("a", 10))
    assert cache.info() == CacheInfo(hits=0, misses=0, evictions=0, entries=3, patterns=1, num_bytes=10)


def test_a_cleared_cache_is_empty_keeps_its_counts_and_takes_other_keys():
    cache = PatternCache(1, 10, 0.9)
    cache.add(axis(0), stand_in("a"))
    cache.add(axis(1), stand_in("b"))
    cache.find(axis(1))
    cache.find(axis(0))
    cache.clear()
    assert cache.info() == CacheInfo(hits=1, misses=1, evictions=1, entries=0, patterns=0, num_bytes=0)
    assert cache.find_equal(b"b") is None
    assert cache.find(axis(1)) is None
    cache.add(torch.ones(DIM + 1), stand_in("c"))
    assert cache.find(torch.ones(DIM + 1)) == stand_in("c")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_the_bounds_and_nothing_else(copied):
    cache = PatternCache(2, 10, 0.9)
    cache.add(axis(0), stand_in("a"))
    cache.find(axis(0))
    other = copied(cache)
    assert other.info() == CacheInfo(hits=0, misses=0, evictions=0, entries=0, patterns=0, num_bytes=0)
    for number, size in enumerate((1, 1, 10, 11)):
        other.add(axis(number), stand_in(number, size))
    assert other.info() == CacheInfo(hits=0, misses=0, evictions=2, entries=1, patterns=1, num_bytes=10)
    assert other.find(at_angle(85.0)) is None
    assert cache.info() == CacheInfo(hits=1, misses=0, evictions=0, entries=1, patterns=1, num_bytes=1)


# -- long sequences ---------------------------------------------------------------------------------------


class SlowCache:
    """A list, oldest use first; prompts are similar if they belong to one axis."""

    def __init__(self, max_entries, max_bytes):
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.entries = []
        self.hits = self.misses = self.evictions = 0

    def find(self, number):
        for entry in self.entries:
            if entry[0] == number:
                self.hits += 1
                self.entries.remove(entry)
                self.entries.append(entry)
                return entry[1]
        self.misses += 1
        return None

    def add(self, number, pattern):
        if self.max_entries == 0 or pattern.num_bytes > self.max_bytes:
            return
        while (
            len(self.entries) == self.max_entries
            or self.num_bytes([*self.entries, (number, pattern)]) > self.max_bytes
        ):
            self.entries.pop(0)
            self.evictions += 1
        self.entries.append((number, pattern))

    @staticmethod
    def num_bytes(entries):
        return sum(pattern.num_bytes for pattern in {pattern for _, pattern in entries})

    def info(self):
        patterns = {pattern for _, pattern in self.entries}
        counts = self.hits, self.misses, self.evictions
        return CacheInfo(*counts, len(self.entries), len(patterns), self.num_bytes(self.entries))


@given(seed=seeds, max_entries=st.integers(0, 5), max_bytes=st.integers(0, 12))
def test_any_sequence_of_prompts_finds_what_a_slow_cache_finds(seed, max_entries, max_bytes):
    draw = random.Random(seed)
    cache, slow = PatternCache(max_entries, max_bytes, 0.9), SlowCache(max_entries, max_bytes)
    for _ in range(60):
        number = draw.randrange(8)
        found = cache.find(near(number, draw.getrandbits(32)))
        assert found == slow.find(number)
        if found is None:
            size = draw.randrange(6)
            pattern = stand_in(size, size)
            cache.add(near(number, draw.getrandbits(32)), pattern)
            slow.add(number, pattern)
        if draw.random() < 0.03:
            cache.clear()
            slow.entries.clear()
        assert cache.info() == slow.info()


def test_a_cache_is_bounded_under_ten_thousand_random_prompts():
    draw = random.Random(0)
    max_entries, max_bytes = 40, 1000
    patterns = [stand_in(number, draw.choice([0, 1, 10, 100, 400, 1001])) for number in range(300)]
    keys = randn(0, 10_000, DIM).float()
    cache = PatternCache(max_entries, max_bytes, 0.8)
    num_added = largest = 0
    for key in keys:
        if cache.find(key) is None:
            pattern = draw.choice(patterns)
            cache.add(key, cache.find_equal(pattern.digest) or pattern)
            num_added += pattern.num_bytes <= max_bytes
        info = cache.info()
        assert info.patterns <= info.entries <= max_entries
        assert info.num_bytes <= max_bytes
        largest = max(largest, info.num_bytes)
    live = [pattern for pattern in patterns if cache.find_equal(pattern.digest) is not None]
    assert len(live) == info.patterns
    assert sum(pattern.num_bytes for pattern in live) == info.num_bytes
    assert info.hits + info.misses == len(keys)
    assert info.entries == num_added - info.evictions
    # Both bounds were reached.
    assert info.evictions > 1000
    assert largest > 0.9 * max_bytes


# -- threads ----------------------------------------------------------------------------------------------

NUM_THREADS = 8
MAX_ENTRIES, MAX_BYTES = 10, 60


@pytest.fixture
def _hasty_threads():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def use_like_a_router(cache, seed, until):
    """Look prompts up and add missing ones until a time; return the number of look-ups.

    Two axes share each pattern, so that whatever a prompt finds must be the pattern of its own two.
    """
    draw, num_finds = random.Random(seed), 0
    keys = {(number, i): near(number, NUM_THREADS * i + seed) for number in range(DIM) for i in range(4)}
    while time.monotonic() < until:
        number = draw.randrange(DIM)
        expected = stand_in(number // 2, 5 + number // 2 * 2)
        found = cache.find(keys[number, draw.randrange(4)])
        num_finds += 1
        if found is None:
            pattern = cache.find_equal(expected.digest) or stand_in(number // 2, 5 + number // 2 * 2)
            assert pattern == expected
            cache.add(keys[number, draw.randrange(4)], pattern)
        else:
            assert found == expected
        if draw.random() < 0.002:
            cache.clear()
        info = cache.info()
        assert info.patterns <= info.entries <= MAX_ENTRIES
        assert info.num_bytes <= MAX_BYTES
        assert info.hits + info.misses >= num_finds
    return num_finds


@pytest.mark.usefixtures("_hasty_threads")
def test_threads_find_only_what_was_added_for_similar_prompts_inside_the_bounds():
    cache, errors, num_finds = PatternCache(MAX_ENTRIES, MAX_BYTES, 0.9), [], []
    until = time.monotonic() + SECONDS

    def work(seed):
        try:
            num_finds.append(use_like_a_router(cache, seed, until))
        except BaseException as error:  # noqa: BLE001 - whatever a thread raises fails the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    info = cache.info()
    assert len(num_finds) == NUM_THREADS
    assert info.hits + info.misses == sum(num_finds)
    assert min(info.hits, info.misses, info.evictions) > 0
    live = [cache.find_equal(str(number).encode()) for number in range(DIM // 2)]
    live = [pattern for pattern in live if pattern is not None]
    assert (len(live), sum(pattern.num_bytes for pattern in live)) == (info.patterns, info.num_bytes)
