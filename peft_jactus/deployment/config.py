"""What ``config.json`` says about a compressed checkpoint: how each targeted layer is stored."""

from __future__ import annotations

import json
import reprlib
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import transformers
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_jactus._version import __version__
from peft_jactus.deployment.extensions import find_extension
from peft_jactus.deployment.layers import FORMS
from peft_jactus.numerics.allocation import DENSE
from peft_jactus.numerics.quantization import BITS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from peft_jactus.deployment.extensions import ExtensionConfig

QUANT_METHOD = "jactus"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerForm:
    """How one targeted layer is stored.

    Attributes:
        storage: ``"factored"``, ``"pivoted"``, or ``"dense"``: a plain layer, because factors don't pay.
        rank: Its rank; full for a dense one.
        energy_kept: Share of the weighted energy that the rank keeps, in [0, 1]; ``None`` if it is not known.
        bits: 8 or 4 for a weight that is stored in so few bits a number; ``None`` for floating point.
        features: Of such a layer, whose tensors do not tell: outputs and inputs.
    """

    storage: str
    rank: int
    energy_kept: float | None = None
    bits: int | None = None
    features: tuple[int, int] | None = None

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.storage} layer of rank {self.rank}" + ("" if self.bits is None else f" in {self.bits} bits")

    @classmethod
    def parse(cls, name: str, values: object) -> LayerForm:
        """Return the form that a ``config.json`` gives to a layer; a `ValueError` says what is wrong with it."""
        where = f"layers[{name!r}]"
        known = {field.name for field in fields(cls)}
        is_form = isinstance(values, dict) and {"storage", "rank"} <= set(values) <= known
        _check_field(where, values, is_form, "have `storage`, `rank` and perhaps `energy_kept`, `bits`, `features`")
        form = cls(**cast("dict[str, Any]", values))
        storages = (*FORMS, DENSE)
        _check_field(f"{where}.storage", form.storage, form.storage in storages, f"be one of {storages}")
        # JSON also has booleans and floats
        _check_field(f"{where}.rank", form.rank, type(form.rank) is int and form.rank >= 1, "be a positive integer")
        kept = form.energy_kept
        _check_field(f"{where}.energy_kept", kept, kept is None or _is_share(kept), "be null or in [0, 1]")
        has_bits = form.bits is None or (type(form.bits) is int and form.bits in BITS)
        _check_field(f"{where}.bits", form.bits, has_bits, f"be null or one of {BITS}")
        if form.bits is None:
            return form
        features: Any = form.features
        are_two = isinstance(features, list | tuple) and len(features) == 2
        are_features = are_two and all(type(number) is int and number >= 1 for number in features)
        _check_field(f"{where}.features", features, are_features, "be two positive integers, where there are `bits`")
        return replace(form, features=tuple(features))

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into ``config.json``; releases before ``bits`` do not know that field."""
        values = asdict(self)
        return values if self.bits is not None else {k: v for k, v in values.items() if k not in ("bits", "features")}


def is_compression(quantization: object) -> bool:
    """Whether the ``quantization_config`` of a model is that of a compressed checkpoint, parsed or not."""
    if isinstance(quantization, dict):
        return quantization.get("quant_method") == QUANT_METHOD
    return isinstance(quantization, CompressionConfig)


def is_export(folder: Path) -> bool:
    """Whether a folder has a compressed checkpoint: then its name may also be that of a base model on the Hub."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return is_compression(config.get("quantization_config"))


class CompressionConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint.

    Args:
        layers: `LayerForm`, or its JSON, of each targeted layer, by the name of the layer in the checkpoint's files.
        format_version: Of this format.
        original_format: Whether transformers' conversions of names and weights apply to the files, as they do to those
            of the base model; ``False``: the files hold what the modules hold.
        retained_ratio: Share of the targeted parameters that was asked for.
        base_model: Name or path of the model that was compressed.
        peft_jactus_version: Package that wrote the checkpoint.
        transformers_version: Package that the checkpoint was written with.
        quant_method: ``"jactus"``.
        **extensions: Settings of extensions, or their JSON, by field; see `deployment.extensions`.

    Raises:
        ValueError: If a value is not what this package writes.
    """

    def __init__(
        self,
        /,  # in a file, any word may be the name of a field
        layers: Mapping[str, Any] | None = None,
        *,
        format_version: int = FORMAT_VERSION,
        original_format: bool = True,
        retained_ratio: float | None = None,
        base_model: str | None = None,
        peft_jactus_version: str = __version__,
        transformers_version: str = transformers.__version__,
        quant_method: str = QUANT_METHOD,
        **extensions: Any,
    ) -> None:
        if type(format_version) is not int or format_version != FORMAT_VERSION:  # JSON also has booleans and floats
            raise ValueError(
                f"config.json: `quantization_config.format_version` is {reprlib.repr(format_version)} (written by "
                f"peft-jactus {reprlib.repr(peft_jactus_version)}); this is peft-jactus {__version__}, which reads "
                f"version {FORMAT_VERSION}. Upgrade peft-jactus."
            )
        unknown = [field for field in extensions if find_extension(field) is None]
        if quant_method != QUANT_METHOD or unknown:
            raise ValueError(f"config.json: `quantization_config` has unknown fields: {sorted(unknown)}.")
        if not isinstance(layers, dict) or not layers:
            raise ValueError("config.json: `quantization_config.layers` must say how each layer is stored.")
        _check_field("original_format", original_format, isinstance(original_format, bool), "be true or false")
        is_share = retained_ratio is None or _is_share(retained_ratio)
        _check_field("retained_ratio", retained_ratio, is_share, "be null or in [0, 1]")
        _check_field("base_model", base_model, isinstance(base_model, str | None), "be null or a name")
        for package, version in (("peft_jactus", peft_jactus_version), ("transformers", transformers_version)):
            _check_field(f"{package}_version", version, isinstance(version, str), "be a string")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum of transformers' own methods
        self.format_version = format_version
        self.layers = {
            name: form if isinstance(form, LayerForm) else LayerForm.parse(name, form) for name, form in layers.items()
        }
        self.original_format = original_format
        self.retained_ratio = retained_ratio
        self.base_model = base_model
        self.peft_jactus_version = peft_jactus_version
        self.transformers_version = transformers_version
        self.extensions = {
            field: _parse_extension(field, values) for field, values in extensions.items() if values is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into ``config.json``."""
        values = {**vars(self), "layers": {name: form.to_dict() for name, form in self.layers.items()}}
        extensions = values.pop("extensions")
        if self.original_format:  # as most are; releases before this field do not know it
            del values["original_format"]
        return {**values, **{field: config.to_dict() for field, config in extensions.items()}}


def _parse_extension(field: str, values: Any) -> ExtensionConfig:
    entry = find_extension(field)
    assert entry is not None
    if hasattr(values, "to_dict"):  # made by this process: JSON has no such thing
        config: ExtensionConfig = values
        return config
    try:
        return entry.load().parse(values)
    except ValueError as error:
        raise ValueError(f"config.json: `quantization_config.{field}`: {error}") from error


def _check_field(field: str, value: object, holds: bool, must: str) -> None:
    if not holds:
        # Not all of what somebody else wrote: it may be long, or nested deeper than `repr` goes.
        raise ValueError(f"config.json: `quantization_config.{field}` must {must}; got {reprlib.repr(value)}.")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1  # not NaN
