"""The only writer of PEFT's and transformers' registries."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from peft_jactus.deployment.config import QUANT_METHOD, CompressionConfig
from peft_jactus.deployment.extensions import register_extension
from peft_jactus.deployment.quantizer import JactusQuantizer
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.tuner.model import JactusModel
from peft_jactus.tuner.peft_type import NAME, jactus_peft_type

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft_jactus.deployment.extensions import CheckpointExtension

# As `peft_jactus.parse.installation` calls them; a test holds them together.
_ROUTER_FIELD, _ROUTER_NAME = "router", "rank_router"


def register() -> None:
    """Make PEFT know the tuner ``JACTUS``, and transformers its checkpoints. Calling it again changes nothing.

    An `ImportError` says if another package registered a method of this name.
    """
    _register_tuner()
    _register_quantizer()
    register_extension(_ROUTER_FIELD, _ROUTER_NAME, _load_router_extension)


def _load_router_extension() -> CheckpointExtension:
    from peft_jactus.parse.installation import RouterExtension  # only for those who route

    return RouterExtension()


def _register_quantizer() -> None:
    registered = AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD)
    if registered is CompressionConfig:
        return
    if registered is not None:
        raise ImportError(
            f"transformers has a quantisation method {QUANT_METHOD} already, from {registered.__module__}. Import "
            "either that or peft_jactus."
        )
    register_quantization_config(QUANT_METHOD)(CompressionConfig)
    register_quantizer(QUANT_METHOD)(JactusQuantizer)


def _register_tuner() -> None:
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(jactus_peft_type())
    if registered is JactusConfig:
        return
    if registered is not None:
        raise ImportError(
            f"PEFT has a method {NAME} already, from {registered.__module__}. Import either that or peft_jactus."
        )
    register_peft_method(name=NAME.lower(), config_cls=JactusConfig, model_cls=JactusModel)
    counting = _counting_frozen_bases(PeftModel.get_nb_trainable_parameters)
    setattr(PeftModel, counting.__name__, counting)


def _counting_frozen_bases(
    count: Callable[[PeftModel], tuple[int, int]],
) -> Callable[[PeftModel], tuple[int, int]]:
    # PEFT counts parameters, and its contract wants frozen tensors of an adapter to be buffers: without them
    # `print_trainable_parameters` would leave most of the compressed model out of its total. Models without JACTUS
    # layers are counted as before.

    @functools.wraps(count)
    def get_nb_trainable_parameters(self: PeftModel) -> tuple[int, int]:
        trainable, total = count(self)
        if isinstance(self.base_model, JactusModel):
            total += self.base_model.num_in_buffers()
        return trainable, total

    return get_nb_trainable_parameters
