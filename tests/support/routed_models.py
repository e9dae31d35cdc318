"""Tiny routed models: compressed without data, with a random router, so that every prompt has experts of its own."""

import copy
import inspect

import torch
from transformers import Cache

from peft_jactus.deployment.export import compressed_copy
from peft_jactus.parse import RouterConfig, routed_copy
from tests.support.compressed_models import VOCABULARY, compressed


def static(model, **fields):
    """Compress; return the deployed model in evaluation mode."""
    options = {"retained_ratio": 0.8, "allocation": "uniform", **fields}
    return compressed_copy(compressed(copy.deepcopy(model), adaptation_rank=0, **options)).eval()


def routed(model, *, seed=0, spread=10.0, **fields):
    """Return a routed model whose router has random weights."""
    config = RouterConfig(**{"active_ratio": 0.5, "expert_size": 2, **fields})
    result = routed_copy(static(model), config, progress_bar=False)
    randomize_(result.rank_router, seed=seed, spread=spread)
    return result


@torch.no_grad()
def randomize_(router, *, seed=0, spread=10.0):
    generator = torch.Generator().manual_seed(seed)
    router.weight.copy_(spread * torch.randn(router.weight.shape, generator=generator))
    router.bias.copy_(torch.randn(router.bias.shape, generator=generator))
    router.input_scale.fill_(50.0)
    router.clear_cache()


def prompts(num=16, longest=14, *, seed=0):
    """Return unlike prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (num,), generator=generator).tolist()
    lengths[0] = longest
    return [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(rows, *, side="left"):
    """Return one batch of prompts, with positions that padding does not shift."""
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(rows):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def cache_of(output):
    """Return the key-value cache of an output, whatever this version of transformers calls it."""
    return next(value for value in output.values() if isinstance(value, Cache))


def with_cache(model, cache):
    """Return the argument that passes a key-value cache on."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}
