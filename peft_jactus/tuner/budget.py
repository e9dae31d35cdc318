"""What a budget leaves to the targeted layers, and their ranks within it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING

from peft_jactus.errors import NumericalWarning
from peft_jactus.numerics.factorization import choose_ranks
from peft_jactus.tuner.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft_jactus.numerics.allocation import Allocation, LayerGains
    from peft_jactus.numerics.factorization import FactorizationOptions
    from peft_jactus.tuner.config import JactusConfig
    from peft_jactus.tuner.model_size import ModelSize

_SEARCH_STEPS = 20  # for a share of the parameters, to one in a million


def budget_ratio(config: JactusConfig, size: ModelSize) -> float:
    """Return the share of the targeted layers' parameters that the config's budget allows, in (0, 1].

    Of a limit in bytes, each layer gets the same share, whatever its numbers take.

    Raises:
        ValueError: If what is not targeted takes all of the budget.
    """
    if config.model_ratio is not None:
        allowed = config.model_ratio * size.num_parameters - size.other_parameters
        least = f"{size.other_parameters / size.num_parameters:.1%} of the parameters"
    elif config.max_model_size is not None:
        others = size.other_bytes + sum(size.bytes_beside(name, config.storage) for name in size.shapes)
        num_bytes = sum(math.prod(shape) * size.itemsizes[name] for name, shape in size.shapes.items())
        allowed = (parse_size(config.max_model_size) - others) / num_bytes * size.targeted_parameters
        least = f"{others / 1e6:.1f} MB"
    else:
        return config.retained_ratio
    if allowed <= 0:
        raise ValueError(
            f"{config.asked_budget} cannot be reached: what is not targeted (embeddings, heads, norms) already takes "
            f"{least}. Raise the budget, or target more layers."
        )
    return min(1.0, allowed / size.targeted_parameters)


def ranks_within_budget(
    config: JactusConfig, size: ModelSize, gains: Mapping[str, LayerGains], fixed_ranks: Mapping[str, int]
) -> Allocation:
    """Return the ranks of all layers under the config's budget; `choose_ranks` says what it raises and warns of.

    A limit in bytes is a share of the parameters if all layers have one dtype. Otherwise the share is searched for,
    because what the layers of each dtype get depends on the gains.
    """
    options, ratio = config.factorization_options(), budget_ratio(config, size)
    if config.max_model_size is not None and ratio < 1 and len(set(size.itemsizes.values())) > 1:
        ratio = _share_that_fits(parse_size(config.max_model_size), size, gains, options, fixed_ranks)
    options = dataclasses.replace(options, retained_ratio=ratio)
    return choose_ranks(gains, options, fixed_ranks, asked_budget=config.asked_budget)


def _share_that_fits(
    limit: int,
    size: ModelSize,
    gains: Mapping[str, LayerGains],
    options: FactorizationOptions,
    fixed_ranks: Mapping[str, int],
) -> float:
    """Return the largest share of the targeted layers' parameters with which a checkpoint has ``limit`` bytes."""
    low, high = 0.0, 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        for _ in range(_SEARCH_STEPS):
            share = (low + high) / 2
            try:
                ranks = choose_ranks(gains, dataclasses.replace(options, retained_ratio=share), fixed_ranks).ranks
                fits = size.compressed_bytes(ranks, options.storage) <= limit
            except ValueError:  # the fixed ranks alone have more
                fits = True
            low, high = (share, high) if fits else (low, share)
    return low
