"""What a router reads of a prompt: its token embeddings, or what the model's first block makes of them."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_jactus.parse.kept_patterns import PooledStates, cache_among

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import PreTrainedModel

    from peft_jactus.calibration.batches import Batch
    from peft_jactus.parse.config import RouterInput


def first_block(model: PreTrainedModel) -> nn.Module:
    """Return the first transformer block of a model: of its text model, where it has several.

    Raises:
        TypeError: If it has none that is known as such.
    """
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]  # transformers: untyped
    for module in decoder.modules():
        if isinstance(module, GradientCheckpointingLayer):
            return module
    raise TypeError(
        f"{type(model).__name__} has no block that transformers marks as one (`GradientCheckpointingLayer`), so its "
        "router cannot read the first one. Set `router_input='embeddings'`."
    )


@torch.no_grad()
def block_output(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, past: int = 0) -> Tensor:
    """Run a block by itself, without the hooks on it and without a key-value cache.

    Args:
        block: A transformer block.
        args: Of the call.
        kwargs: Of the call. Of an attention mask ``(..., keys)``, only the keys of this call are used.
        past: Number of positions that are in the key-value cache before this call. The block does not see them.

    Returns:
        The block's hidden states ``(batch, positions, dim)``.
    """
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    signature = inspect.signature(block.forward)
    # Raises if there is one still, which the block would fill.
    cache_among(signature.bind_partial(*args).arguments | kwargs)
    call = signature.bind(*args, **kwargs)
    length = call.args[0].shape[1]
    mask = call.arguments.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() > 1 and mask.shape[-1] > length:
        first = min(past, mask.shape[-1] - length)
        call.arguments["attention_mask"] = mask[..., first : first + length]
    output = block.forward(*call.args, **call.kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def prompt_states(model: PreTrainedModel, batch: Batch, router_input: RouterInput) -> Tensor:
    """Return what a router of ``model`` reads, before it is averaged: ``(batch, ..., dim)``.

    Args:
        model: A routed model. Of its first block, all ranks run, as when a prompt is served.
        batch: Its keyword arguments.
        router_input: As in `RouterConfig`.

    Raises:
        RuntimeError: If the model's first block was not called.
    """
    if router_input == "embeddings":
        inputs = batch.get("input_ids")
        embeddings: Tensor = model.get_input_embeddings()(batch[model.main_input_name] if inputs is None else inputs)
        return embeddings

    outputs = []

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outputs.append(block_output(block, args, kwargs))
        raise _FirstBlockError

    handle = first_block(model).register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad(), suppress(_FirstBlockError):
            model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        handle.remove()
    if not outputs:
        raise RuntimeError(f"{type(model).__name__} was called, but its first block was not.")
    return outputs[0]


class _FirstBlockError(Exception):
    """Ends the call of a model of which only the first block is wanted; never leaves this module."""


def check_not_checkpointed(model: nn.Module) -> None:
    """Raise `ValueError` if blocks run again in the backward pass, when nobody knows any more what was chosen."""
    # Where transformers has switched it on, a module has the attribute in itself; to look further takes much longer.
    if any(vars(module).get("gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "`model` uses gradient checkpointing, which does not work with routing; disable it: "
            "`model.activation_checkpointing_disable()`."
        )


def check_rows(states: object, num_rows: int | None) -> None:
    """Check that what a router reads has the rows of the call's inputs, as far as they are known.

    Args:
        states: ``(batch, ..., dim)``.
        num_rows: Of the inputs; ``None`` if there are none of tokens.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has other rows.
    """
    if not isinstance(states, Tensor):
        raise TypeError(
            f"The router reads what the model's input embeddings return, which is a {type(states).__name__} here and "
            "not a tensor of one state for each position. Use the model without a router (`static_copy`)."
        )
    if num_rows not in (None, len(states)):
        raise ValueError(
            f"The model was called with {num_rows} rows, but what its router reads has {len(states)}: the model puts "
            "the sequence first, or several rows into one. So ranks cannot be chosen by row. Use the model without a "
            "router (`static_copy`)."
        )


def pool_states(states: Tensor, mask: Tensor | Mapping[str, Tensor] | None) -> Tensor:
    """Return the mean of each row's states over the positions that the mask keeps.

    Args:
        states: ``(batch, ..., dim)``.
        mask: ``(batch, positions)``, zero for padding; or as `generate` makes it for static caches, ``(batch, 1,
            queries, keys)``, true or zero where a query sees a key, perhaps several by name. ``None`` keeps all.

    Returns:
        ``(batch, dim)``; float64, so that padding does not show in the last digit (float32 where there is no float64).
    """
    return PooledStates.of(states, mask).mean()
