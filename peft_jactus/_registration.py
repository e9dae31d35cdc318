"""The only writer of PEFT's and transformers' registries."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from peft_jactus.deployment.model_card import add_adapter_loading
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
            f"transformers already has a quantisation method {QUANT_METHOD}, from {registered.__module__}. Import "
            "either that package or peft_jactus."
        )
    register_quantization_config(QUANT_METHOD)(CompressionConfig)
    register_quantizer(QUANT_METHOD)(JactusQuantizer)


def _register_tuner() -> None:
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(jactus_peft_type())
    if registered is JactusConfig:
        return
    if registered is not None:
        raise ImportError(
            f"PEFT already has a method {NAME}, from {registered.__module__}. Import either that package or "
            "peft_jactus."
        )
    register_peft_method(name=NAME.lower(), config_cls=JactusConfig, model_cls=JactusModel)
    for changed in (
        _counting_frozen_bases(PeftModel.get_nb_trainable_parameters),
        _saying_how_to_load(PeftModel.create_or_update_model_card),
        _keeping_the_card(PeftModel._upload_modified_files),
    ):
        setattr(PeftModel, changed.__name__, changed)


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


def _saying_how_to_load(write: Callable[[PeftModel, str], None]) -> Callable[[PeftModel, str], None]:
    # PEFT and the Trainer write model cards by this method alone, and ask no tuner what it wants to say. Who loads the
    # adapter elsewhere meets a bare KeyError, and finds the remedy in the card only.

    @functools.wraps(write)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        write(self, output_dir)
        if isinstance(self.base_model, JactusModel):
            add_adapter_loading(Path(output_dir) / "README.md")

    return create_or_update_model_card


def _keeping_the_card(upload: Callable[..., Any]) -> Callable[..., Any]:
    # `push_to_hub` is transformers' own, and puts a card in the place of that which `save_pretrained` has written.

    @functools.wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.base_model, JactusModel):
            self.create_or_update_model_card(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    return _upload_modified_files
