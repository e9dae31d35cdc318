"""Context managers that leave the model and the random generators as they were."""

from __future__ import annotations

import contextlib
import functools
import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_jactus.tuner.base_weights import let_gradients_through_
from peft_jactus.tuner.layer import JactusLayer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn


@contextlib.contextmanager
def prepared_for_calibration(model: nn.Module, *, train_mode: bool) -> Iterator[None]:
    """Freeze ``model``, set its mode, let it compute with dense weights and keep no cache; restore all at the end."""
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, modes, trainable)
        model.train(train_mode)
        for module in modes:
            if getattr(module, "track_running_stats", False):  # of BatchNorm; they are to stay
                module.training = False  # not what is inside it
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in modes:
            let_gradients_through_(module)
        _use_dense_weights(modes, stack)
        _disable_caches(modes, stack)
        if not train_mode:
            _checkpoint_blocks(modes, stack)
        elif any(getattr(module, "gradient_checkpointing", False) for module in modes):
            # Reentrant checkpointing only runs a block again if an input of it requires a gradient.
            embeddings = model.get_input_embeddings()  # type: ignore[operator]  # a transformers model
            handle = embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
            stack.callback(handle.remove)
        yield


def _use_dense_weights(modules: Iterable[nn.Module], stack: contextlib.ExitStack) -> None:
    """Until ``stack`` closes, put aside adapters that are there: a further one approximates the dense weights."""
    for module in modules:
        if isinstance(module, JactusLayer) and not module.base_weights_freed:
            stack.callback(setattr, module, "_disable_adapters", module.disable_adapters)
            module._disable_adapters = True


def _disable_caches(modules: Iterable[nn.Module], stack: contextlib.ExitStack) -> None:
    """Until ``stack`` closes, keep models from collecting keys and values; a block that runs again adds them again."""
    for module in modules:
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and getattr(config, "use_cache", False):
            stack.callback(setattr, config, "use_cache", config.use_cache)
            config.use_cache = False


def _checkpoint_blocks(modules: Iterable[nn.Module], stack: contextlib.ExitStack) -> None:
    """Until ``stack`` closes, checkpoint the blocks that do so in training mode; transformers does it there only."""
    for module in modules:
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            forward = module.forward
            if "forward" in vars(module):  # accelerate's, which loads an offloaded block
                stack.callback(setattr, module, "forward", forward)
            else:
                stack.callback(delattr, module, "forward")
            module.forward = functools.partial(checkpoint, forward, use_reentrant=False)


def _restore(modes: dict[nn.Module, bool], trainable: dict[nn.Parameter, bool]) -> None:
    for module, training in modes.items():
        module.training = training
    for parameter, requires_grad in trainable.items():
        parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Give the random generators of torch, numpy and Python back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  # the legacy one is global
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
