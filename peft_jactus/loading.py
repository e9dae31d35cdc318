"""What makes ``AutoModel*.from_pretrained`` rebuild a compressed checkpoint.

To transformers, a compressed checkpoint is one of a quantisation method named ``jactus``: ``config.json`` lists the
factorised layers, and the quantizer puts them into the empty model before the tensors are read.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_jactus._version import __version__
from peft_jactus.integrity import METADATA_KEY, NOT_COMPUTED, CheckpointFiles, DamagedCheckpointError, digest_metadata
from peft_jactus.layer import make_dense_layer
from peft_jactus.low_rank import FORMS, FactorizedLinear

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

QUANT_METHOD = "jactus"
FORMAT_VERSION = 1
DENSE = "dense"  # storage of a targeted layer for which factors don't pay


@dataclass(frozen=True)
class LayerForm:
    """How one targeted layer is stored.

    Attributes:
        storage: ``"factored"``, ``"pivoted"``, or ``"dense"``: a plain layer, because factors don't pay.
        rank: Its rank; full for a dense one.
        energy_kept: Share of the weighted energy that the rank keeps, in [0, 1]; ``None`` if it is not known.
    """

    storage: str
    rank: int
    energy_kept: float | None = None

    @classmethod
    def parse(cls, name: str, values: object) -> LayerForm:
        """Return the form that a ``config.json`` gives to a layer; a `ValueError` says what is wrong with it."""
        where = f"config.json: `quantization_config.layers[{name!r}]`"
        if not isinstance(values, dict) or not {"storage", "rank"} <= set(values) <= {
            "storage",
            "rank",
            "energy_kept",
        }:
            raise ValueError(f"{where} must have `storage`, `rank` and perhaps `energy_kept`; got {values!r:.200}.")
        form = cls(**values)
        if form.storage not in (*FORMS, DENSE):
            raise ValueError(f"{where}: `storage` must be one of {(*FORMS, DENSE)}; got {form.storage!r:.200}.")
        if type(form.rank) is not int or form.rank < 1:  # JSON also has booleans and floats
            raise ValueError(f"{where}: `rank` must be a positive integer; got {form.rank!r:.200}.")
        return form


class CompressionConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint.

    Args:
        layers: `LayerForm`, or its JSON, of each targeted layer, by the name of the layer in the checkpoint's files.
        format_version: Of this format.
        retained_ratio: Share of the targeted parameters that was asked for.
        base_model: Name or path of the model that was compressed.
        peft_jactus_version: Package that wrote the checkpoint.
        transformers_version: Package that the checkpoint was written with.
        quant_method: ``"jactus"``.

    Raises:
        ValueError: If a value is not what this package writes.
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        *,
        format_version: int = FORMAT_VERSION,
        retained_ratio: float | None = None,
        base_model: str | None = None,
        peft_jactus_version: str = __version__,
        transformers_version: str = transformers.__version__,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format version {format_version!r:.200} (written by peft-jactus "
                f"{peft_jactus_version!r:.200}); this is peft-jactus {__version__}, which reads version "
                f"{FORMAT_VERSION}. Upgrade peft-jactus."
            )
        if quant_method != QUANT_METHOD or unknown:
            raise ValueError(f"config.json: `quantization_config` has fields that it cannot have: {sorted(unknown)}.")
        if not isinstance(layers, dict) or not layers:
            raise ValueError("config.json: `quantization_config.layers` must say how each layer is stored.")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum of transformers' own methods
        self.format_version = format_version
        self.layers = {
            name: form if isinstance(form, LayerForm) else LayerForm.parse(name, form) for name, form in layers.items()
        }
        self.retained_ratio = retained_ratio
        self.base_model = base_model
        self.peft_jactus_version = peft_jactus_version
        self.transformers_version = transformers_version

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into ``config.json``."""
        return {**vars(self), "layers": {name: asdict(form) for name, form in self.layers.items()}}


@dataclass(frozen=True)
class _LoadingOptions:
    verify: bool = False
    dense: bool = False


_DEFAULT_OPTIONS = _LoadingOptions()
_OPTIONS = ContextVar("peft_jactus_loading_options", default=_DEFAULT_OPTIONS)


@contextmanager
def loading_options(*, verify: bool = False, dense: bool = False) -> Iterator[None]:
    """Set how compressed checkpoints are loaded in this block; ``from_pretrained`` has no argument for it.

    Args:
        verify: Read all tensors once more and compare them with the digests that the checkpoint carries.
        dense: Multiply the factors out: gives plain layers, and saves a checkpoint that loads without this package, at
            the size of the base model.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from peft_jactus import loading_options
        >>> with loading_options(verify=True):  # doctest: +SKIP
        ...     model = AutoModelForCausalLM.from_pretrained("compressed")
    """
    token = _OPTIONS.set(_LoadingOptions(verify=verify, dense=dense))
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
        # By module name, which can differ from the name in the checkpoint's files.
        self.module_forms: dict[str, LayerForm] = {}
        self.conv1d_layers: set[str] = set()

    # -- loading ------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        del kwargs
        files = None
        if checkpoint_files is not None:
            files = CheckpointFiles.read(checkpoint_files)
            files.check_contents(all_bytes=self.options.verify)
        renamed = _Renaming(model)
        layers = {name: renamed(name) for name in self.quantization_config.layers}
        unknown = [name for name, module_name in layers.items() if module_name is None]
        if unknown and files is not None and renamed.without_tensors(files.entries):
            raise ValueError(
                f"{type(model).__name__} has no layers {unknown[:5]}, which the checkpoint holds, and has layers that "
                "the checkpoint does not hold. Load it with the class it was made for (`architectures` in "
                "config.json), or with the version of transformers that it was written with: "
                f"{self.quantization_config.transformers_version}."
            )
        for name, module_name in layers.items():
            form = self.quantization_config.layers[name]
            if module_name is None:
                continue
            self.module_forms[module_name] = form
            if form.storage == DENSE:
                continue
            layer = self._empty_layer(model.get_submodule(module_name), module_name, form)
            if files is not None:
                _check_shapes(name, layer, files)
            model.set_submodule(module_name, layer)
        return model

    def _empty_layer(self, dense: nn.Module, module_name: str, form: LayerForm) -> FactorizedLinear:
        if isinstance(dense, Conv1D):
            self.conv1d_layers.add(module_name)
            in_features, out_features = dense.weight.shape
        elif isinstance(dense, nn.Linear):
            out_features, in_features = dense.weight.shape
        else:
            raise DamagedCheckpointError(
                f"config.json lists {module_name} as a factorised layer; in this model it is a {type(dense).__name__}."
            )
        if form.rank >= min(in_features, out_features):
            raise DamagedCheckpointError(
                f"config.json gives {module_name} rank {form.rank}; its weight is {out_features} x {in_features}."
            )
        return FORMS[form.storage].empty(
            in_features,
            out_features,
            form.rank,
            bias=dense.bias is not None,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        del kwargs
        if self.options.dense:
            self._dequantize(model)
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        # The tensors are ordinary ones: `.to(dtype)`, the Trainer and PEFT may treat the model as any other.
        _set_attributes(model, is_quantized=False)
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                module.config._is_quantized = False
        return model

    @torch.no_grad()
    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put plain layers into ``model``; ``dtype`` is for the interface: weights get that of their layer."""
        del dtype
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)]
        for name, layer in layers:
            if layer.weight.device.type == "meta":
                raise ValueError(f"{name} is offloaded to disk; load the model without offloading to make it dense.")
            weight = layer.dense_weight().to(layer.weight.dtype)
            model.set_submodule(name, make_dense_layer(weight, layer.bias, is_conv1d=name in self.conv1d_layers))
        return model

    # -- saving -------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return the digests of the tensors as `save_pretrained` is about to write them."""
        tensors = model.state_dict()
        if any(tensor.is_meta or type(tensor) not in (torch.Tensor, nn.Parameter) for tensor in tensors.values()):
            return None, {METADATA_KEY: NOT_COMPUTED}
        tensors = {name: t for name, t in tensors.items() if name not in (model._keys_to_ignore_on_save or ())}
        tensors = remove_tied_weights_from_state_dict(tensors, model)
        return None, digest_metadata(revert_weight_conversion(model, tensors))

    def is_serializable(self) -> bool:
        """Return that `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """That the Trainer may train the factors."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """That the Trainer may train the factors."""
        return True

    @property
    def is_compileable(self) -> bool:
        """That `torch.compile` works."""
        return True


class _Renaming:
    """Where transformers puts the tensors of a checkpoint: some families are stored under older names."""

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        self._converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._tensors = model.state_dict()
        self._modules = dict(model.named_modules())

    def __call__(self, checkpoint_name: str) -> str | None:
        """Return the name of the module, ``None`` if this model has none of that name."""
        name = self._key(f"{checkpoint_name}.weight").removesuffix(".weight")
        return name if name in self._modules else None

    def _key(self, key: str) -> str:
        key, _ = rename_source_key(key, self._renamings, self._converters, self._prefix, self._tensors)
        return key

    def without_tensors(self, keys: Iterable[str]) -> list[str]:
        """Return the linear layers of the model's body whose weight is not among a checkpoint's tensors."""
        found = {self._key(key) for key in keys}
        return [
            name
            for name, module in self._modules.items()
            if name.startswith(f"{self._prefix}.")
            and isinstance(module, (nn.Linear, Conv1D))
            and f"{name}.weight" not in found
        ]


def checkpoint_names(model: PreTrainedModel, module_names: Iterable[str]) -> dict[str, str]:
    """Return under which names `save_pretrained` writes modules.

    Raises:
        ValueError: If a module's weight is not written by itself.
    """
    weights = {f"{name}.weight": cast("Tensor", model.get_submodule(name).weight) for name in module_names}
    written = {tensor.data_ptr(): key for key, tensor in revert_weight_conversion(model, weights).items()}
    names = {}
    for key, tensor in weights.items():
        if not written.get(tensor.data_ptr(), "").endswith(".weight"):
            raise ValueError(
                f"{key}: transformers stores this weight merged with others, so that its layer has no factors of its "
                "own in a checkpoint. Add the layer to `exclude_modules`."
            )
        names[key.removesuffix(".weight")] = written[tensor.data_ptr()].removesuffix(".weight")
    return names


def attach_compression(
    model: PreTrainedModel,
    forms: Mapping[str, LayerForm],
    conv1d_layers: Iterable[str],
    *,
    retained_ratio: float,
    base_model: str | None,
) -> None:
    """Make a model whose layers have been replaced the same as one that was loaded from its checkpoint.

    Args:
        model: With its deployed layers in place.
        forms: By module name.
        conv1d_layers: Names of those modules that were a Conv1D.
        retained_ratio: As for `CompressionConfig`.
        base_model: As for `CompressionConfig`.
    """
    names = checkpoint_names(model, forms)
    config = CompressionConfig(
        {names[name]: form for name, form in forms.items()}, retained_ratio=retained_ratio, base_model=base_model
    )
    quantizer = JactusQuantizer(config)
    quantizer.module_forms |= forms
    quantizer.conv1d_layers |= set(conv1d_layers)
    model.config.quantization_config = config
    _set_attributes(model, hf_quantizer=quantizer, quantization_method=QUANT_METHOD, is_quantized=False)


def _set_attributes(model: PreTrainedModel, **values: object) -> None:
    """Set what transformers sets from outside, too; its classes do not declare them."""
    for name, value in values.items():
        setattr(model, name, value)


def _check_shapes(name: str, layer: FactorizedLinear, files: CheckpointFiles) -> None:
    expected = {f"{name}.{key}": tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
    found = {key: entry.shape for key, entry in files.entries.items() if re.match(rf"{re.escape(name)}\.", key)}
    if expected != found:
        raise DamagedCheckpointError(
            f"{name}: config.json describes a {layer.storage} layer of rank {layer.rank}, with tensors {expected}; "
            f"the checkpoint holds {found}. Download or export it again."
        )
