"""What makes ``AutoModel*.from_pretrained`` rebuild a compressed checkpoint.

To transformers, a compressed checkpoint is one of a quantisation method named ``jactus``: ``config.json`` lists the
factorised layers, and the quantizer puts them into the empty model before the tensors are read.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from peft_jactus.deployment.config import QUANT_METHOD, CompressionConfig, LayerForm
from peft_jactus.deployment.extensions import extension_configs, extensions_in, find_extension
from peft_jactus.deployment.integrity import METADATA_KEY, NOT_COMPUTED, CheckpointFiles, check_index, digest_metadata
from peft_jactus.deployment.layers import FORMS, FactorizedLinear, PivotedLinear, arrange_parts_
from peft_jactus.deployment.names import Renaming, are_found_again, checkpoint_names, without_numbers
from peft_jactus.deployment.parts import unreadable_parts
from peft_jactus.deployment.quantization import with_empty_codes
from peft_jactus.deployment.quantized_linear import QuantizedLinear
from peft_jactus.deployment.saving import SAVING, SavePretrained, state_dict_to_save
from peft_jactus.errors import DamagedCheckpointError
from peft_jactus.numerics.allocation import DENSE
from peft_jactus.tuner.dense_layers import make_dense_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from peft_jactus.deployment.extensions import ExtensionConfig


@dataclass(frozen=True)
class _LoadingOptions:
    verify: bool = False
    dense: bool = False
    column_layout: bool = False


_DEFAULT_OPTIONS = _LoadingOptions()
_OPTIONS = ContextVar("peft_jactus_loading_options", default=_DEFAULT_OPTIONS)


@contextmanager
def loading_options(*, verify: bool = False, dense: bool = False, column_layout: bool = False) -> Iterator[None]:
    """Set how compressed checkpoints are loaded in this block; ``from_pretrained`` has no arguments for this.

    Args:
        verify: Read all tensors once more and compare them with the checkpoint's digests.
        dense: Multiply the factors to get plain layers of the base model's size. A model that is saved like this loads
            without this package.
        column_layout: On a CPU in float32, store weights with more rows than columns by columns. This makes it faster
            to decode a single sequence. It has no effect elsewhere. Tools that flatten parameters
            (`torch.optim.LBFGS`, `torch.nn.utils.parameters_to_vector`) raise an error for these weights, until
            ``train()`` or ``state_dict()`` of the model stores them by rows again.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from peft_jactus import loading_options
        >>> with loading_options(verify=True):  # doctest: +SKIP
        ...     model = AutoModelForCausalLM.from_pretrained("compressed")
    """
    token = _OPTIONS.set(_LoadingOptions(verify, dense, column_layout))
    try:
        yield
    finally:
        _OPTIONS.reset(token)


class JactusQuantizer(HfQuantizer):
    """Puts factorised layers into an empty model, checks the files they come from, and signs what is saved."""

    requires_calibration = True
    quantization_config: CompressionConfig

    def __init__(self, quantization_config: CompressionConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.options = _OPTIONS.get()
        self.original_format = quantization_config.original_format
        # By module name, which can differ from the name in the checkpoint's files.
        self.module_forms: dict[str, LayerForm] = {}
        self.conv1d_layers: set[str] = set()

    # -- loading ------------------------------------------------------------------------------------------

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Check the index of a local checkpoint: this is the last call before transformers reads it."""
        if config.name_or_path:
            check_index(config.name_or_path)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        del kwargs
        files = None
        if checkpoint_files is not None:
            files = CheckpointFiles.read(checkpoint_files, model.config.name_or_path)
            files.check_contents(all_bytes=self.options.verify)
            files.check_layer_names(self.quantization_config.layers)
        renamed = Renaming(model, original_format=self.original_format)
        layers = {name: renamed(name) for name in self.quantization_config.layers}
        if files is not None:
            self._check_class(model, layers, renamed.without_tensors(files.entries))
        for name, module_name in layers.items():
            form = self.quantization_config.layers[name]
            if module_name is None:
                continue
            self.module_forms[module_name] = form
            layer = self._empty_layer(model.get_submodule(module_name), module_name, form)
            if files is not None:
                files.check_layer(name, layer.state_dict(), str(form))
            model.set_submodule(module_name, layer)
        for field, config in self.quantization_config.extensions.items():
            self._install_extension(model, field, config, layers, files)
        _keep_from_initialization_(model)
        return model

    def _install_extension(
        self,
        model: PreTrainedModel,
        field: str,
        config: ExtensionConfig,
        layers: Mapping[str, str | None],
        files: CheckpointFiles | None,
    ) -> None:
        entry = find_extension(field)
        assert entry is not None
        if self.options.dense:  # plain layers only
            ignored = rf"^{entry.module_name}\."
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), ignored}
            return
        ordered = [name for _, name in sorted(layers.items()) if name is not None]
        extension = entry.load()
        module = extension.install(model, ordered, config)
        if files is not None:
            files.check_layer(entry.module_name, module.state_dict(), extension.title_of(module))

    def _check_class(
        self, model: PreTrainedModel, layers: Mapping[str, str | None], without_tensors: Sequence[str]
    ) -> None:
        unknown = [name for name, module_name in layers.items() if module_name is None]
        is_other_class = unknown and any(name.startswith(f"{model.base_model_prefix}.") for name in without_tensors)
        # The blocks of a stack differ in a number alone: here some have no place, or no tensors.
        known = {without_numbers(name) for pair in layers.items() if pair[1] is not None for name in pair if name}
        is_other_depth = any(without_numbers(name) in known for name in (*unknown, *without_tensors))
        if is_other_class or is_other_depth:
            raise ValueError(
                f"{type(model).__name__} has no layers {unknown[:5]}, which the checkpoint holds, or has layers that "
                f"the checkpoint does not hold: {without_tensors[:5]}. Load it with the class it was made for "
                "(`architectures` in config.json), with the same number of blocks, and with the version of "
                f"transformers that wrote it: {self.quantization_config.transformers_version}."
            )

    def _empty_layer(self, dense: nn.Module, module_name: str, form: LayerForm) -> nn.Module:
        if isinstance(dense, Conv1D):
            in_features, out_features = dense.weight.shape
        elif isinstance(dense, nn.Linear):
            out_features, in_features = dense.weight.shape
        else:
            raise DamagedCheckpointError(
                f"config.json lists {module_name} as a linear layer; in this model it is a {type(dense).__name__}."
            )
        full_rank, is_dense = min(in_features, out_features), form.storage == DENSE
        if form.rank > full_rank or is_dense != (form.rank == full_rank):
            raise DamagedCheckpointError(
                f"config.json gives the {form.storage} {module_name} rank {form.rank}; its weight is {out_features} x "
                f"{in_features}."
            )
        if is_dense and form.bits is None:
            return dense
        if isinstance(dense, Conv1D):
            self.conv1d_layers.add(module_name)
        if form.bits is not None and form.features != (out_features, in_features):
            raise DamagedCheckpointError(
                f"config.json gives {module_name} the features {form.features}; its weight is {out_features} x "
                f"{in_features}."
            )
        options: Any = {
            "bias": dense.bias is not None, "device": dense.weight.device, "dtype": dense.weight.dtype
        }  # fmt: skip
        if is_dense and form.bits is not None:
            return QuantizedLinear(in_features, out_features, form.bits, **options)
        layer = FORMS[form.storage].empty(in_features, out_features, form.rank, **options)
        return layer if form.bits is None else with_empty_codes(layer, form.bits)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Return what transformers does to the names and weights of the files: nothing, where modules wrote them."""
        del model
        return weight_conversions if self.original_format else []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        del kwargs
        for name, layer in model.named_modules():
            if isinstance(layer, PivotedLinear):
                _check_index_tensors(name, layer)
            if isinstance(layer, FactorizedLinear) and self.options.column_layout:
                arrange_parts_(layer)
        if self.options.dense:
            self._dequantize(model)
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        else:
            _set_attributes(model, save_pretrained=SavePretrained(model))
        # Where no layer has few bits, all tensors are ordinary ones: `.to(dtype)`, the Trainer and PEFT may treat the
        # model as any other. Else the Trainer has to know that these weights do not train.
        has_bits = self._has_bits and not self.options.dense
        _set_attributes(model, is_quantized=has_bits)
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                module.config._is_quantized = has_bits
        return model

    @torch.no_grad()
    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put plain layers into ``model``; ``dtype`` is for the interface: tensors get that of their layer."""
        del dtype
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, FactorizedLinear)
            or (name in self.module_forms and isinstance(layer, QuantizedLinear))
        }
        check_readable(model, layers, would_lose_it="dense layers")
        offloaded = [name for name, layer in layers.items() if layer.weight.device.type == "meta"]
        if offloaded:
            raise ValueError(
                f"{offloaded[:5]} are offloaded to disk; load the model without offloading to make it dense."
            )
        for name, layer in layers.items():
            own = layer.weight.dtype  # of a part, with its bias, it may be another
            bias = None if layer.bias is None else layer.bias.to(own)
            dense = make_dense_layer(layer.dense_weight().to(own), bias, is_conv1d=name in self.conv1d_layers)
            trains = any(parameter.requires_grad for parameter in layer.parameters())
            model.set_submodule(name, dense.requires_grad_(trains))
        for entry in extensions_in(model):
            entry.load().remove(model)
        return model

    # -- saving -------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `save_pretrained` is about to write, and its digests; name the layers in config.json alike."""
        asked = SAVING.get()
        if not model._hf_peft_config_loaded:
            # Not those of the checkpoint that was loaded, if that was of another class, with or without a head.
            names = checkpoint_names(model, self.module_forms) if asked.save_original_format else {}
            self.quantization_config.layers = {names.get(name, name): form for name, form in self.module_forms.items()}
        self.quantization_config.original_format = asked.save_original_format and self.original_format
        self.quantization_config.extensions = extension_configs(model)
        saved = state_dict_to_save(model) if asked.state_dict is None else dict(asked.state_dict)
        if any(tensor.is_meta or type(tensor) not in (torch.Tensor, nn.Parameter) for tensor in saved.values()):
            return saved, {METADATA_KEY: NOT_COMPUTED}
        tensors = {name: t for name, t in saved.items() if name not in (model._keys_to_ignore_on_save or ())}
        tensors = remove_tied_weights_from_state_dict(tensors, model)
        if asked.save_original_format:
            tensors = revert_weight_conversion(model, tensors)
        return saved, digest_metadata(tensors)

    def is_serializable(self) -> bool:
        """Return that `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """That the Trainer may train the factors."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the Trainer may train the factors: not those of 8 or 4 bits, on which it takes an adapter."""
        return not self._has_bits

    @property
    def _has_bits(self) -> bool:
        return any(form.bits is not None for form in self.module_forms.values())

    @property
    def is_compileable(self) -> bool:
        """That `torch.compile` works: not with an extension, such as a router, which chooses by values."""
        return not self.quantization_config.extensions


def attach_compression(
    model: PreTrainedModel,
    forms: Mapping[str, LayerForm],
    conv1d_layers: Iterable[str],
    *,
    retained_ratio: float | None,
    base_model: str | None,
) -> None:
    """Make a model whose layers have been replaced the same as one that was loaded from its checkpoint.

    Args:
        model: With its deployed layers in place; it may have been a compressed model before.
        forms: By module name.
        conv1d_layers: Names of those modules that were a Conv1D.
        retained_ratio: As for `CompressionConfig`.
        base_model: As for `CompressionConfig`.
    """
    earlier = vars(model).get("hf_quantizer")
    if isinstance(earlier, JactusQuantizer):  # some layers were compressed before
        forms, retained_ratio = {**earlier.module_forms, **forms}, None
        conv1d_layers = {*earlier.conv1d_layers, *conv1d_layers}
    names = checkpoint_names(model, forms)
    original_format = len(names) == len(forms) and are_found_again(model, names)
    if not original_format:
        _set_attributes(model, _weight_conversions=[])  # those that saving reverts
        names = {name: name for name in forms}
    config = CompressionConfig(
        {names[name]: form for name, form in forms.items()},
        original_format=original_format,
        retained_ratio=retained_ratio,
        base_model=base_model,
    )
    quantizer = JactusQuantizer(config)
    quantizer.module_forms |= forms
    quantizer.conv1d_layers |= set(conv1d_layers)
    model.config.quantization_config = config
    _set_attributes(
        model,
        hf_quantizer=quantizer,
        quantization_method=QUANT_METHOD,
        is_quantized=quantizer._has_bits,
        save_pretrained=SavePretrained(model),
    )


def check_readable(model: nn.Module, layers: Mapping[str, nn.Module], *, would_lose_it: str) -> None:
    """Check that the weights of deployed layers say all that these layers do.

    Args:
        model: With the layers.
        layers: By name.
        would_lose_it: What is going to be made of them.

    Raises:
        ValueError: If an adapter is on a layer, or a part was replaced by something without a readable weight.
    """
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(
            f"`model` has an adapter, which {would_lose_it} would lose. It is on {adapted[:5]}. Merge it first "
            "(`merge_and_unload`)."
        )
    unreadable = [f"{name}.{part}" for name, layer in layers.items() for part in unreadable_parts(layer)]
    if unreadable:
        raise ValueError(
            f"`model` has layers whose weights cannot be read as numbers, as in a quantised model: {unreadable[:5]}. "
            "Load it again, and do this before you quantise it or replace modules in it."
        )


def _keep_from_initialization_(model: PreTrainedModel) -> None:
    """Keep `_init_weights` of the model's class away from what its class does not know.

    It goes by types and names: it takes a part of a layer for a linear layer of the model, and a layer for one with a
    dense weight, since "Linear" is in its name. It has nothing to do: a checkpoint has all tensors of these layers.
    """
    extensions = {entry.module_name for entry in extensions_in(model)}
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear | QuantizedLinear) or name in extensions:
            for part in layer.modules():
                part._is_hf_initialized = True


def _set_attributes(model: PreTrainedModel, **values: object) -> None:
    """Set what transformers sets from outside, too; its classes do not declare them."""
    for name, value in values.items():
        setattr(model, name, value)


def _check_index_tensors(name: str, layer: PivotedLinear) -> None:
    """Check that nothing is read beside a tensor: `index_select` on a GPU would not raise an error."""
    for key, index in layer.named_buffers(recurse=False):
        if not key.endswith("_index") or index.is_meta:
            continue
        order = torch.arange(len(index), dtype=torch.int32, device=index.device)
        if index.dtype != order.dtype or not torch.equal(index.sort().values, order):
            raise DamagedCheckpointError(
                f"{name}.{key} must hold each of 0 to {len(index) - 1} once. Download or export the checkpoint again."
            )
