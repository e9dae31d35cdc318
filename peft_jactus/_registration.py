"""The only writer of PEFT's and transformers' registries."""

from __future__ import annotations

import contextlib
import functools
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM, get_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import load_peft_weights, register_peft_method
from safetensors import SafetensorError
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from peft_jactus.deployment.config import QUANT_METHOD, CompressionConfig
from peft_jactus.deployment.extensions import register_extension
from peft_jactus.deployment.model_card import add_adapter_loading
from peft_jactus.deployment.quantizer import JactusQuantizer
from peft_jactus.tuner.checkpoint_checks import check_heads_in_file
from peft_jactus.tuner.config import JactusConfig
from peft_jactus.tuner.first_adapter import check_file, check_generates, put_back_if_it_fails
from peft_jactus.tuner.model import JactusModel
from peft_jactus.tuner.peft_type import NAME, jactus_peft_type
from peft_jactus.tuner.snapshot import all_or_no_switches, all_or_nothing

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
        _saving_whole_adapters(PeftModel.save_pretrained),
        _naming_missing_heads(PeftModel.load_adapter),
    ):
        setattr(PeftModel, changed.__name__, changed)
    for kind in (PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()):
        if "__init__" in vars(kind):  # or it has that of PeftModel
            made = _making_whole_models(vars(kind)["__init__"])
            setattr(kind, made.__name__, made)
    loading = _loading_whole_models(vars(PeftModel)["from_pretrained"].__func__)
    setattr(PeftModel, loading.__name__, classmethod(loading))
    for method, guard in (
        (PeftModel.add_adapter, all_or_nothing),
        (PeftModel.load_adapter, all_or_nothing),
        (PeftModel.delete_adapter, all_or_nothing),
        (PeftModel.set_adapter, all_or_no_switches),
    ):
        setattr(PeftModel, method.__name__, _whole(method, guard))


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


def _saving_whole_adapters(save: Callable[..., None]) -> Callable[..., None]:
    # PEFT asks a tuner for the tensors of one adapter after the other, with the folder and the card already written.

    @functools.wraps(save)
    def save_pretrained(
        self: PeftModel,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if isinstance(self.base_model, JactusModel):
            if kwargs.get("state_dict") is None:
                kwargs["state_dict"] = self.state_dict()
            for name in set(self.peft_config).intersection(selected_adapters or self.peft_config):
                get_peft_model_state_dict(self, kwargs["state_dict"], name, save_embedding_layers=False)
        save(self, save_directory, safe_serialization, selected_adapters, *args, **kwargs)

    return save_pretrained


def _naming_missing_heads(load: Callable[..., Any]) -> Callable[..., Any]:
    # PEFT looks up what the file should have of a head before it asks the tuner: a bare KeyError names one tensor.

    @functools.wraps(load)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, model_id, adapter_name, *args, **kwargs)
        except KeyError:
            config = self.peft_config.get(adapter_name)
            if isinstance(self.base_model, JactusModel) and isinstance(config, JactusConfig):
                hub_options, _ = self._split_kwargs(kwargs)
                names = load_peft_weights(model_id, device="cpu", **hub_options)
                check_heads_in_file(self, config, adapter_name, names)
            raise

    return load_adapter


@dataclass(frozen=True)
class _File:
    """What `from_pretrained` will load, once the model is made.

    Attributes:
        read: Returns its tensors.
        any_shape: Whether heads of other shapes are left out.
        until_loaded: Closed once it is loaded.
    """

    read: Callable[[], dict[str, Any]]
    any_shape: bool
    until_loaded: contextlib.ExitStack


_FILE: ContextVar[_File | None] = ContextVar("_FILE", default=None)


def _making_whole_models(make: Callable[..., None]) -> Callable[..., None]:
    # PEFT asks for what a task needs, and reads an adapter's file, when the dense weights are gone. Its classes for
    # tasks change the config before that.

    @functools.wraps(make)
    def made(self: PeftModel, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(peft_config, JactusConfig):
            make(self, model, peft_config, *args, **kwargs)
            return
        file = _FILE.get()
        _FILE.set(None)
        if file is not None:
            if peft_config.from_checkpoint:
                adapter_name = args[0] if args else kwargs.get("adapter_name", "default")
                check_file(model, peft_config, adapter_name, file.read(), any_shape=file.any_shape)
            file.until_loaded.enter_context(put_back_if_it_fails(model, peft_config))
        if isinstance(self, PeftModelForCausalLM | PeftModelForSeq2SeqLM):
            check_generates(model, peft_config)
        with put_back_if_it_fails(model, peft_config):
            make(self, model, peft_config, *args, **kwargs)

    return made


def _loading_whole_models(load: Callable[..., PeftModel]) -> Callable[..., PeftModel]:
    # The model is made and the file read in one call: if reading fails, the base model is as it was.

    @functools.wraps(load)
    def from_pretrained(cls: type[PeftModel], model: Any, model_id: Any, *args: Any, **kwargs: Any) -> PeftModel:
        hub_options, others = cls._split_kwargs(kwargs)
        key_mapping = others.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", {})

        def read() -> dict[str, Any]:
            try:
                return dict(load_peft_weights(model_id, device="cpu", key_mapping=key_mapping, **hub_options))
            except SafetensorError as error:
                raise SafetensorError(
                    f"The adapter's file in {model_id} cannot be read and is damaged: {error}. Save the adapter "
                    "again, or download it again."
                ) from error

        with contextlib.ExitStack() as until_loaded:
            any_shape = others.get("ignore_mismatched_sizes", False)
            until_loaded.callback(_FILE.reset, _FILE.set(_File(read, any_shape, until_loaded)))
            return load(cls, model, model_id, *args, **kwargs)

    return from_pretrained


def _whole(
    method: Callable[..., Any], all_or_nothing_of: Callable[[PeftModel], contextlib.AbstractContextManager[None]]
) -> Callable[..., Any]:
    # The PeftModel has a note of its own of the active adapter, and adds and loads in several steps.

    @functools.wraps(method)
    def whole(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.base_model, JactusModel):
            return method(self, *args, **kwargs)
        with all_or_nothing_of(self):
            return method(self, *args, **kwargs)

    return whole
