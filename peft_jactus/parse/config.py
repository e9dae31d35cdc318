"""How a compressed model chooses ranks: fields and checks, nothing computed."""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from peft_jactus.parse.experts import ExpertAllocation

RouterKind = Literal["linear", "mlp"]
RouterInput = Literal["embeddings", "first_block"]


@dataclass(frozen=True)
class RouterConfig:
    """Rank experts, their router and its cache (PARSE: Zhu et al., arXiv:2605.08568).

    Attributes:
        active_ratio: Number of parameters that run for one prompt, as a share of the dense weights of the routed
            layers, in (0, 1]. It can be changed at any time: one router serves all budgets.
        expert_size: Number of consecutive rank-one terms that are chosen together. A smaller size gives a finer choice
            and a larger router: it has a weight for each expert and each of the model's hidden features. 16 suits a
            width of 1,000, and 64 a width of 4,000. A multiple of 8 keeps the products fast.
        allocation: ``"global"``: one budget for all layers; ``"uniform"``: every layer runs the same share.
        router_kind: How the router computes scores from what it reads: ``"linear"``, or ``"mlp"`` with one hidden
            layer.
        hidden_features: Width of that hidden layer.
        cache_entries: Largest number of prompts whose choice is cached; 0 caches none.
        cache_bytes: Largest memory for the gathered factors of cached choices. Default: as much as the dense weights
            of the routed layers; one choice takes about ``active_ratio`` of this.
        cache_similarity: A prompt reuses a cached choice if the cosine between their (standardised) router inputs is
            at least this, in (0, 1]. At 1 the inputs must be equal, so no result depends on earlier prompts. A smaller
            value reuses more choices, but results then depend on earlier prompts.
        reroute_continuations: Whether more than one new token on a filled key-value cache (text after a cached system
            prompt, the next chunk of a long prompt, another turn) is routed again, by all parts so far. If not, the
            first part decides for all that follows, whatever is done to the cache. ``generate`` never takes the drafts
            of assisted generation for a part of the prompt; other loops that check several tokens in one call need
            this to be off.
        router_input: What the router reads, as a mean over the prompt's tokens: their ``"embeddings"``, or the output
            of the model's ``"first_block"``, which knows more of the prompt. This block runs once more for each prompt
            then, with all its ranks; generated tokens cost nothing.
    """

    active_ratio: float = 0.6
    expert_size: int = 16
    allocation: ExpertAllocation = "global"
    router_kind: RouterKind = "linear"
    hidden_features: int = 256
    cache_entries: int = 64
    cache_bytes: int | None = None
    cache_similarity: float = 1.0
    reroute_continuations: bool = True
    router_input: RouterInput = "embeddings"

    def __post_init__(self) -> None:
        self._check("active_ratio", _is_number(self.active_ratio) and 0 < self.active_ratio <= 1, "be in (0, 1]")
        for name, least in (("expert_size", 1), ("hidden_features", 1), ("cache_entries", 0)):
            value = getattr(self, name)
            self._check(name, type(value) is int and value >= least, f"be an integer of at least {least}")
        limit = self.cache_bytes
        self._check("cache_bytes", limit is None or (type(limit) is int and limit >= 0), "be null or not negative")
        similarity = self.cache_similarity
        self._check("cache_similarity", _is_number(similarity) and 0 < similarity <= 1, "be in (0, 1]")
        self._check("reroute_continuations", isinstance(self.reroute_continuations, bool), "be true or false")
        hints = get_type_hints(type(self))
        for name in ("allocation", "router_kind", "router_input"):
            choices = get_args(hints[name])
            self._check(name, getattr(self, name) in choices, f"be one of {choices}")

    def _check(self, name: str, holds: bool, must: str) -> None:
        if not holds:
            raise ValueError(f"`{name}` must {must}; got {reprlib.repr(getattr(self, name))}.")

    @classmethod
    def parse(cls, values: object) -> RouterConfig:
        """Return the config that a ``config.json`` holds; a `ValueError` says what is wrong with it."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= known:
            raise ValueError(f"must have no other fields than {sorted(known)}; got {reprlib.repr(values)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into ``config.json``."""
        return asdict(self)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
