"""The router, and how it steers a model: through hooks, so that calls and ``generate`` stay as they are.

A prompt is routed as soon as what the router reads of it is computed, and keeps its experts while tokens are generated
one by one: the choice travels on the key-value cache. A further part of a prompt is routed with all parts so far. What
is routed with which earlier parts follows from the tokens in the cache; where these are not known, a call raises an
error.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, EncoderDecoderCache, GenerationMixin

from peft_jactus.errors import RoutingWarning
from peft_jactus.parse.cache import CacheInfo, PatternCache
from peft_jactus.parse.experts import ExpertTable, LayerShape, select_experts
from peft_jactus.parse.generation import RoutedGenerate
from peft_jactus.parse.inputs import block_output, check_not_checkpointed, check_rows, first_block
from peft_jactus.parse.kept_patterns import PooledStates, PromptPart, cache_among, keep_on, kept_on, length_of
from peft_jactus.parse.layer import RoutedCall, state_of
from peft_jactus.parse.patterns import ExpertPattern, GateBatch, PatternBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_jactus.parse.config import RouterConfig
    from peft_jactus.parse.layer import PartsState, RoutedLinear

# Length of the router's input. Adam moves every weight alike, and a short input makes the sum of many weights move as
# slowly as the bias: with length one, routers of a small Llama were worse on text of another kind than no router.
FEATURE_LENGTH = 0.1


class RankRouter(nn.Module):
    """Scores every rank expert for a prompt, from a mean over its tokens, and runs the best experts.

    Its numbers stay float32 when the model is converted to another dtype.

    Args:
        config: Budget, kind and cache.
        layers: The layers to route, in the order of the experts.
        in_features: Width of what it reads.
        device: Of the parameters.

    Attributes:
        layers: As given.
        table: Their experts.
        input_mean: ``(in,)``: subtracted from the router's input; the mean over prompts.
        input_scale: ``(in,)``: multiplied with it; one over the standard deviation.
        weight: ``(experts, in)``, or ``(experts, hidden)`` of a two-layer router.
        bias: ``(experts,)``: scores of the average prompt.
        hidden_weight: ``(hidden, in)``, of a two-layer router.
        hidden_bias: ``(hidden,)``, of a two-layer router.

    References:
        Zhu et al., "Different Prompts, Different Ranks", arXiv:2605.08568.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(
        self,
        config: RouterConfig,
        layers: Sequence[RoutedLinear],
        in_features: int,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.router_config = config
        # In a tuple: they are not the router's own modules.
        self.layers = tuple(layers)
        self.table = ExpertTable([LayerShape.of(layer) for layer in self.layers], config.expert_size)
        self._state = self.layers[0].state
        self._budgets = self.table.budgets(config.active_ratio, config.allocation)
        num_bytes = config.cache_bytes
        if num_bytes is None:
            num_bytes = int(self.table.dense_costs.sum()) * self.layers[0].down.weight.element_size()
        self._patterns = PatternCache(config.cache_entries, num_bytes, config.cache_similarity)
        self._states: list[PartsState | None] = []
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.register_buffer("input_mean", torch.zeros(in_features, **options))
        self.register_buffer("input_scale", torch.ones(in_features, **options))
        features = in_features
        if config.router_kind == "mlp":
            features = config.hidden_features
            hidden = torch.empty(features, in_features, **options)
            nn.init.normal_(hidden, std=math.sqrt(2) / FEATURE_LENGTH)
            self.hidden_weight = nn.Parameter(hidden)
            self.hidden_bias = nn.Parameter(torch.zeros(features, **options))
        self.weight = nn.Parameter(torch.zeros(len(self.table), features, **options))
        self.bias = nn.Parameter(torch.zeros(len(self.table), **options))

    # -- scoring and choosing -----------------------------------------------------------------------------

    def features(self, pooled: Tensor) -> Tensor:
        """Return the router's input ``(batch, in)``, float32: standardised over prompts, then brought to one length.

        The length would say how unusual a prompt is; without it, the router cannot extrapolate to ones unlike any it
        has seen.
        """
        standardized = (pooled.float() - self.input_mean) * self.input_scale
        return FEATURE_LENGTH * functional.normalize(standardized, dim=1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return a score for each expert.

        Args:
            pooled: ``(batch, in)``: means over prompts, see `inputs.pool_states`.

        Returns:
            ``(batch, experts)``, float32: the log of the worth of a parameter, on no particular scale.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            features = self.features(pooled)
            if self.router_config.router_kind == "mlp":
                hidden = functional.linear(features, self.hidden_weight.float(), self.hidden_bias.float())
                features = functional.relu(hidden) / math.sqrt(hidden.shape[1])
            return functional.linear(features, self.weight.float(), self.bias.float())

    @property
    def active_ratio(self) -> float:
        """The budget: parameters that run, over those of the dense layers. Set it to serve with another one."""
        return self.router_config.active_ratio

    @active_ratio.setter
    def active_ratio(self, value: float) -> None:
        config = dataclasses.replace(self.router_config, active_ratio=value)
        self._budgets = self.table.budgets(value, config.allocation)
        self.router_config = config
        self._patterns.clear()

    @property
    def reroute_continuations(self) -> bool:
        """Whether further parts of a prompt are routed again; see `RouterConfig`. Set it to serve in the other way."""
        return self.router_config.reroute_continuations

    @reroute_continuations.setter
    def reroute_continuations(self, value: bool) -> None:
        self.router_config = dataclasses.replace(self.router_config, reroute_continuations=value)

    def budgets(self, active_ratio: float) -> Tensor:
        """Return the budgets of another active ratio; see `ExpertTable.budgets`."""
        return self.table.budgets(active_ratio, self.router_config.allocation)

    @torch.no_grad()
    def select(self, pooled: Tensor) -> Tensor:
        """Return ``(batch, experts)``, bool: the choice for each prompt, of means over prompts ``(batch, in)``."""
        return select_experts(self(pooled), self.table, self._budgets, self.router_config.allocation)

    @torch.no_grad()
    def choose(self, pooled: Tensor) -> PatternBatch:
        """Return the patterns of prompts: remembered ones for prompts that are similar to earlier ones.

        Args:
            pooled: ``(batch, in)``.
        """
        self._forget_if_changed()
        # Offloaded buffers have values in calls of the router only: then no prompt is remembered.
        keys: list[Tensor] = [] if self.input_mean.is_meta else list(self.features(pooled))
        patterns: list[ExpertPattern | None] = [self._patterns.find(key) for key in keys] or [None] * len(pooled)
        missing = [row for row, pattern in enumerate(patterns) if pattern is None]
        if missing:
            for row, selected in zip(missing, self.select(pooled[missing]).cpu(), strict=True):
                pattern = self._patterns.find_equal(selected.numpy().tobytes())
                pattern = pattern or ExpertPattern(selected, self.table, self.layers)
                if keys:
                    self._patterns.add(keys[row], pattern)
                patterns[row] = pattern
        return PatternBatch([pattern for pattern in patterns if pattern is not None])

    def _forget_if_changed(self) -> None:
        """Clear the cache if an optimizer or the like has written to the factors or the router, or moved them."""
        states = [state_of(*self.parameters(), *self.buffers()), *(layer.parts_state for layer in self.layers)]
        if states != self._states:
            self.clear_cache()
            self._states = states

    def cache_info(self) -> CacheInfo:
        """Return what the pattern cache holds, and how often it helped."""
        return self._patterns.info()

    def clear_cache(self) -> None:
        """Forget all remembered prompts; needed after weights have been changed through ``weight.data``."""
        self._patterns.clear()
        for layer in self.layers:
            layer.forget_product()

    # Whatever changes weights, or where the layers have them, passes through one of these.

    def train(self, mode: bool = True) -> RankRouter:
        """Set the mode; training changes weights."""
        self.clear_cache()
        return super().train(mode)

    # torch has no annotation of this method
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> RankRouter:
        self.clear_cache()

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)  # in another dtype, scores would be rounded, and other experts chosen
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        module: RankRouter = super()._apply(moved, *args, **kwargs)  # type: ignore[no-untyped-call]  # torch: untyped
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.clear_cache()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.clear_cache()  # layers lay out their factors anew, and patterns would keep the old ones
        super()._save_to_state_dict(*args, **kwargs)

    # -- running the model with given experts -------------------------------------------------------------

    @contextmanager
    def gated(self, gates: Tensor) -> Iterator[None]:
        """Make the layers run all experts, each times its gate, instead of what the router would choose.

        Args:
            gates: ``(batch, experts)``; gradients reach them, also if the backward pass runs in the block.
        """
        previous, self._state.gates = self._state.gates, GateBatch(gates, self.table)
        try:
            yield
        finally:
            self._state.gates = previous

    # -- hooks --------------------------------------------------------------------------------------------

    def attach(self, model: PreTrainedModel) -> None:
        """Register the hooks that route each call of ``model``."""
        for module in dict.fromkeys((model, model.base_model)):
            module.register_forward_pre_hook(self._begin, with_kwargs=True)
            module.register_forward_hook(self._end, always_call=True)
        if self._reads_embeddings:
            model.get_input_embeddings().register_forward_hook(self._route_embeddings)
        else:
            first_block(model).register_forward_pre_hook(self._route_block, with_kwargs=True)
        if isinstance(model, GenerationMixin) and "generate" not in vars(model):  # a checkpoint may bring its own
            model.generate = RoutedGenerate(model, self._state)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._state.gates is not None:
            return
        call = self._state.call
        # A model is not called by itself, nor its base model twice: that call was interrupted (Ctrl-C), where torch
        # runs no hooks.
        if call is None or module in (*call.modules, *call.ended) or self in module.children():
            if torch.is_grad_enabled() and module.training:
                check_not_checkpointed(module)
            call = self._state.call = RoutedCall()
        call.modules.append(module)
        arguments = kwargs
        if args:
            arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask = arguments.get("attention_mask")
        call.mask = call.mask if mask is None else mask
        cache = cache_among(arguments)
        call.cache = call.cache if cache is None else cache
        if call.patterns is not None:
            return
        embeddings = arguments.get("inputs_embeds")
        inputs = arguments.get("input_ids") if embeddings is None else embeddings
        call.num_rows = call.num_rows if inputs is None else len(inputs)
        call.past = length_of(call.cache)
        if inputs is not None and (call.cache is not None or self._state.generation is not None):
            self._continue(call, *inputs.shape[:2])
        if embeddings is not None and self._reads_embeddings:
            self._route_embeddings(module, args, embeddings)

    def _continue(self, call: RoutedCall, num_rows: int, length: int) -> None:
        """Note what a call's cache and `generate` say of it: earlier parts of the prompt, and whether this is another.

        Raises:
            ValueError: If it does not say which tokens are in it, and results may depend on them.
        """
        call.length = length
        call.counted = self._prompt_positions(call, length)
        if call.cache is None or not call.past:
            return
        kept = kept_on(call.cache, self._state)
        if self._follows_tokens():
            if kept is None:
                raise ValueError(
                    f"The key-value cache has {call.past} positions, but not from calls of this routed model, so the "
                    "prompt in it is not known, by which ranks are chosen. Fill a new cache with this model; or set "
                    "`model.rank_router.reroute_continuations = False`, to choose by what follows."
                )
            kept.check(call.cache, call.past)
        if kept is None:
            call.counted = length
            return
        kept = kept.repeated(num_rows)
        call.parts = kept.parts
        if not call.counted:
            call.patterns = kept.batch

    def _follows_tokens(self) -> bool:
        """Whether the tokens in a filled cache choose what runs now, not just the part that was first."""
        generation = self._state.generation
        return self.router_config.reroute_continuations and not (generation is not None and generation.assists)

    def _prompt_positions(self, call: RoutedCall, length: int) -> int:
        """Return how many positions are text that the router reads: not one token on a filled cache, nor drafts."""
        generation = self._state.generation
        end = None if generation is None else generation.prompt_end
        counted = length if end is None else min(max(end - call.past, 0), length)
        if not call.past:
            return counted
        whole = isinstance(call.cache, EncoderDecoderCache)  # the encoder has read all of the prompt
        return counted if self._follows_tokens() and counted > 1 and not whole else 0

    def _route_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        del module, args
        call = self._state.call
        if call is not None and call.patterns is None:
            self._route(call, output)

    def _route_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._state.call
        if call is not None and call.patterns is None:
            self._route(call, block_output(block, args, kwargs, past=call.past))  # nothing is chosen: all ranks run

    @property
    def _reads_embeddings(self) -> bool:
        return self.router_config.router_input == "embeddings"

    def _route(self, call: RoutedCall, states: Tensor) -> None:
        check_rows(states, call.num_rows)
        pooled = PooledStates.of(states, call.mask, start=call.past, counted=call.counted)
        if call.parts:
            pooled = call.parts[-1].pooled + pooled
        call.length = call.length or states.shape[1]
        end = call.past + (call.length if call.counted is None else call.counted)
        call.patterns = self.choose(pooled.mean())
        call.parts = (*call.parts, PromptPart(call.past, end, call.patterns, pooled))

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del args
        call = self._state.call
        if call is None or module not in call.modules:
            return
        while call.modules.pop() is not module:  # an exception may have skipped some
            pass
        call.ended.append(module)
        is_last = call.cache is None or not call.modules  # a cache that was given can wait for the end of the call
        if call.patterns is not None and output is not None and is_last:
            cache = _cache_of(output) if call.cache is None else call.cache
            if cache is not None:
                keep_on(cache, call.parts, self._state, length=call.past + call.length)
        if call.modules:
            return
        self._state.call = None
        if call.patterns is None and output is not None:
            warnings.warn(
                f"{type(module).__name__} was called without computing what its router reads (input embeddings or "
                "the first block), so nothing was routed and all ranks ran.",
                RoutingWarning,
                stacklevel=2,
            )

    def detach_from(self, model: nn.Module) -> None:
        """Remove the hooks of this router from all modules of ``model``."""
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__self__", None) is self:
                        del hooks[key]  # what torch notes beside them (`with_kwargs`) has no effect without
        if isinstance(vars(model).get("generate"), RoutedGenerate):
            del model.generate


def _cache_of(output: Any) -> Cache | None:
    values: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple):
        return None
    return next((value for value in values if isinstance(value, Cache)), None)
