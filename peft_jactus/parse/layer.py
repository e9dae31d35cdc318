"""The factorised layer that runs a part of its ranks, and who tells it which."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from peft_jactus.deployment.layers import LowRankLinear

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

    from peft_jactus.parse.kept_patterns import PromptPart
    from peft_jactus.parse.patterns import PatternBatch


PartsState = tuple[int, ...]  # see `state_of`


class ActiveExperts(ABC):
    """What runs in the calls of one thread: a choice of experts for each row of the batch."""

    @abstractmethod
    def apply(self, layer: RoutedLinear, x: Tensor) -> Tensor:
        """Return the output of ``layer`` for ``x`` ``(batch, ..., in)``, with the experts of each row."""


@dataclass
class RoutedCall:
    """What is known of a call of the model.

    Attributes:
        modules: The model and its base model, as far as they have been entered.
        ended: Those that have ended.
        num_rows: Of its `input_ids` or `inputs_embeds`.
        mask: Its attention mask.
        cache: Its key-value cache.
        past: Number of positions that are in this cache before the call.
        length: Number of positions that it adds.
        counted: How many of them the router reads, the first ones; the others are generated. ``None``: all.
        parts: Of the prompt, as far as it has been routed.
        patterns: What was chosen.
    """

    modules: list[nn.Module] = field(default_factory=list)
    ended: list[nn.Module] = field(default_factory=list)
    num_rows: int | None = None
    mask: Tensor | None = None
    cache: Cache | None = None
    past: int = 0
    length: int = 0
    counted: int | None = None
    parts: tuple[PromptPart, ...] = ()
    patterns: PatternBatch | None = None


@dataclass(frozen=True)
class Generation:
    """What is known of a running call of ``generate`` that is assisted, or assists another one, or has no cache.

    Attributes:
        prompt_end: Position after the prompt; what follows is generated.
        assists: Whether it only makes drafts, which the model that it assists will check.
    """

    prompt_end: int | None
    assists: bool


class RoutingState(threading.local):
    """The current choice of one model, for each thread. The layers and the router of a model share one.

    Attributes:
        gates: What runs whatever the router would choose, if anything.
        call: The router's notes on the call of the model that is running.
        generation: The call of ``generate`` around it, if routing must know of it.
    """

    gates: ActiveExperts | None = None
    call: RoutedCall | None = None
    generation: Generation | None = None

    @property
    def active(self) -> ActiveExperts | None:
        """What the layers run; ``None`` runs all experts."""
        if self.gates is not None or self.call is None:
            return self.gates
        return self.call.patterns

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingState:
        # A copied model runs for itself; all its layers find the same copy in `memo`.
        return RoutingState()

    def __reduce__(self) -> tuple[type[RoutingState], tuple[()]]:
        return RoutingState, ()


class RoutedLinear(LowRankLinear):
    """A low-rank layer whose rank-one terms stand in order and run as experts: ``y = up(gates * down(x))``.

    Without a router at work it runs all of them, and is a `LowRankLinear`.

    Args:
        down: ``in`` to ``rank`` features, no bias: rows of the rank-one terms.
        up: ``rank`` to ``out`` features: their columns.
        position: Number of the layer in its router's table.
        state: Of the model.
    """

    def __init__(self, down: nn.Linear, up: nn.Linear, position: int, state: RoutingState) -> None:
        super().__init__(down, up)
        self.position = position
        self.state = state
        self._product: tuple[PartsState, Tensor] | None = None  # of factors in this state

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, ..., in)`` to ``(batch, ..., out)``."""
        self._check_weight()
        active = self.state.active
        return self.run_all(x) if active is None else active.apply(self, x)

    def run_all(self, x: Tensor) -> Tensor:
        """Run all terms, as one dense product where that is cheaper: the static layer."""
        is_cheaper_dense = self.rank * (self.in_features + self.out_features) > self.in_features * self.out_features
        if is_cheaper_dense and not self.needs_gradients:
            state = self.parts_state
            if state is not None:
                return functional.linear(x, self._dense_product(state), self.up.bias)
        return super().forward(x)

    def _dense_product(self, state: PartsState) -> Tensor:
        kept = self._product
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # what inference mode makes is of use nowhere else
                kept = self._product = (state, self.dense_weight().to(self.up.weight.dtype))
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_product": None}  # a copy has factors of its own

    def forget_product(self) -> None:
        """Let go of what was computed from the factors: they have changed."""
        self._product = None

    def gated(self, x: Tensor, gates: Tensor) -> Tensor:
        """Run all terms, each times its gate.

        Args:
            x: ``(batch, ..., in)``.
            gates: ``(batch or 1, rank)``.

        Returns:
            ``(batch, ..., out)``, differentiable by ``x``, the gates and the parts, whatever the parts are.
        """
        hidden = self.down(x)
        gates = gates.to(hidden).reshape(len(gates), *[1] * (hidden.dim() - 2), self.rank)
        output: Tensor = self.up(hidden * gates)
        return output

    @property
    def parts_state(self) -> PartsState | None:
        """Where the factors are, and how often they were written to.

        ``None`` if terms are not rows and columns of two ordinary weights, and nothing may be copied from the parts:
        with LoRA around them, or int8 in them, or weights that are elsewhere until a part is called, in which a hook
        fetches them (offloaded, or in pieces in several processes).
        """
        down, up = _plain_weight(self.down), _plain_weight(self.up)
        return None if down is None or up is None else state_of(down, up)

    @property
    def needs_gradients(self) -> bool:
        """Whether the parts train now, so that copies of them won't do."""
        return torch.is_grad_enabled() and any(part.weight.requires_grad for part in (self.down, self.up))

    def gather(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of some terms, each in one piece of memory.

        Terms that stand in a row are in one piece already, and not copied; a trained router mostly takes the leading
        ones.

        Args:
            terms: ``(active,)``, int64, ascending.

        Returns:
            ``down`` ``(active, in)`` and ``up`` ``(out, active)``; on a CPU, the latter is laid out as the layer's.
        """
        down, up = self.down.weight.detach(), self.up.weight.detach()
        first, last = int(terms[0]), int(terms[-1])
        if last - first + 1 == len(terms):
            return down[first : last + 1], up[:, first : last + 1]
        terms = terms.to(down.device)
        down = down.index_select(0, terms)
        if up.is_cpu and up.is_contiguous():  # to transpose it takes longer than the product
            return down, up.index_select(1, terms)
        # Columns in one piece are copied in long runs, and read in long runs by products with few vectors.
        return down, up.mT.index_select(0, terms).mT


def state_of(*tensors: Tensor) -> PartsState:
    """Return where tensors are, and how often they were written to."""
    # torch does not count writes to what inference mode made.
    return tuple(n for t in tensors for n in (t.data_ptr(), 0 if t.is_inference() else t._version))


def _plain_weight(part: nn.Linear) -> nn.Parameter | None:
    weight = part.weight
    if type(part) is not nn.Linear or type(weight) is not nn.Parameter or weight.is_meta:
        return None
    return weight if weight.shape == (part.out_features, part.in_features) else None
