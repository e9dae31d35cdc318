"""What a `JactusConfig` must hold; each check names the field, what it must be and what it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from peft_jactus._version import __version__
from peft_jactus.numerics.adaptation import AdaptationInit, AdaptationSpace
from peft_jactus.numerics.allocation import Storage
from peft_jactus.numerics.approximation import Decomposition
from peft_jactus.numerics.quantization import BITS, bitsandbytes_functional
from peft_jactus.tuner.adapter_format import READABLE_FORMATS
from peft_jactus.tuner.sizes import parse_size

if TYPE_CHECKING:
    from peft_jactus.tuner.config import JactusConfig

# What a saved config says instead of the user's `init_weights`: shapes come from `layer_ranks`, values from
# the checkpoint, nothing is decomposed.
FROM_CHECKPOINT = "empty"

_CHOICES = {
    "allocation": ("global", "uniform"),
    "storage": get_args(Storage),
    "decomposition": get_args(Decomposition),
    "adaptation_init": (*get_args(AdaptationInit), None),
    "adaptation_space": get_args(AdaptationSpace),
}
_NUMBERS = ("retained_ratio", "weight_energy", "input_energy", "gradient_energy", "damping", "rank_floor")


def targets_all_linear(target_modules: object) -> bool:
    """Whether ``target_modules`` is PEFT's word for all linear layers, in whatever case."""
    return isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def check_config(config: JactusConfig) -> None:
    """Raise `ValueError` or `TypeError` for a value that a field cannot have."""
    _check_targets(config)
    _check_choices(config)
    _check_numbers(config)
    _check_what_trains(config)


def check_can_be_made(config: JactusConfig) -> None:
    """Check, before any work, that an adapter of this config can be made or loaded here.

    Raises:
        ValueError: If it was saved in a format that this version would misread, or a field was set to what it cannot
            have. An `ImportError` says if it needs what is not installed.
    """
    check_config(config)
    if config.from_checkpoint and config.adapter_format not in READABLE_FORMATS:
        raise ValueError(
            f"The adapter has format {config.adapter_format} (written by peft-jactus {config.peft_jactus_version}); "
            f"this is {__version__}, which reads formats {READABLE_FORMATS}. Load it with the version that wrote it."
        )
    if config.frozen_bits == 4:
        bitsandbytes_functional()


def check_not_calibrated(config: JactusConfig) -> None:
    """Raise `ValueError` if statistics, from which nothing would be computed, are in a saved adapter's config."""
    if config.from_checkpoint and config.statistics is not None:
        raise ValueError(
            "This config is from a saved adapter, so values come from the adapter's file, but it has calibration "
            "statistics. Set `config.init_weights = True` to compute new values from them."
        )


def _check_targets(config: JactusConfig) -> None:
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise ValueError(
            "`layers_to_transform` cannot be used when `target_modules` is a str; put the layer indices into the "
            "regular expression."
        )
    if isinstance(config.target_modules, str) and config.layers_pattern is not None:
        raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def _check_choices(config: JactusConfig) -> None:
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"`{name}` must be one of {choices}; got {getattr(config, name)!r}.")
    if config.init_weights not in (True, False, FROM_CHECKPOINT):
        raise ValueError(
            f"`init_weights` must be True or False; got {config.init_weights!r}. For a start without "
            'calibration data use `decomposition="svd"`.'
        )


def _check_numbers(config: JactusConfig) -> None:
    for name in _NUMBERS:
        if not _is_number(getattr(config, name)):
            raise TypeError(f"`{name}` must be a number; got {getattr(config, name)!r}.")
    if not 0 < config.retained_ratio <= 1:
        raise ValueError(
            f"`retained_ratio` must be in (0, 1]; got {config.retained_ratio}. It is the kept fraction: 0.8 "
            "keeps 80% of the parameters."
        )
    _check_budget(config)
    if not 0 < config.weight_energy <= 1:
        raise ValueError(f"`weight_energy` must be in (0, 1]; got {config.weight_energy}.")
    for name in ("input_energy", "gradient_energy", "rank_floor"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"`{name}` must be in [0, 1]; got {getattr(config, name)}.")
    if config.shrinkage != "ledoit-wolf" and not (_is_number(config.shrinkage) and 0 <= float(config.shrinkage) <= 1):
        raise ValueError(f"`shrinkage` must be 'ledoit-wolf' or a number in [0, 1]; got {config.shrinkage!r}.")
    if not 0 < config.damping < math.inf:
        raise ValueError(f"`damping` must be positive and finite; got {config.damping}.")
    _check_ranks(config)


def _check_budget(config: JactusConfig) -> None:
    if config.model_ratio is not None and not (_is_number(config.model_ratio) and 0 < config.model_ratio <= 1):
        raise ValueError(f"`model_ratio` must be in (0, 1], or None; got {config.model_ratio!r}.")
    if config.max_model_size is not None:
        try:
            parse_size(config.max_model_size)
        except ValueError as error:
            raise ValueError(f"`max_model_size` {error}") from error
    other = [name for name in ("model_ratio", "max_model_size") if getattr(config, name) is not None]
    if len(other) > 1 or (other and config.retained_ratio != type(config).retained_ratio):
        raise ValueError(
            f"Give only one budget: `{other[0]}` replaces `retained_ratio`={config.retained_ratio:g} and any other "
            "budget. Leave the others at their defaults."
        )


def _check_ranks(config: JactusConfig) -> None:
    for name, least in (("rank_multiple", 1), ("adaptation_rank", 0)):
        value = getattr(config, name)
        if type(value) is not int or value < least:  # JSON also gives floats and booleans
            raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}.")
    if not isinstance(config.rank_pattern, dict):
        raise TypeError(f"`rank_pattern` must be a dict of ranks by module name; got {config.rank_pattern!r}.")
    for pattern, rank in config.rank_pattern.items():
        if type(rank) is not int or rank < 1:
            raise ValueError(f"`rank_pattern` must hold positive integers; got {rank!r} for {pattern!r}.")


def _check_what_trains(config: JactusConfig) -> None:
    bits = config.frozen_bits
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise ValueError(f"`frozen_bits` must be one of {BITS}, or None; got {bits!r}.")
    cause = "`train_core`=True" if config.train_core else "`adaptation_rank`=0"
    if bits is not None and config.core_trains:
        raise ValueError(
            f"`frozen_bits`={bits} cannot be used with {cause}: then cores train, and little is frozen. Train only "
            "adaptation ranks: `adaptation_rank` of at least 1, and `train_core=False`."
        )
    if config.adaptation_space == "retained" and config.core_trains:
        raise ValueError(
            f"`adaptation_space`='retained' cannot be used with {cause}: then a core trains in that space. Train only "
            "adaptation ranks: `adaptation_rank` of at least 1, and `train_core=False`."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
