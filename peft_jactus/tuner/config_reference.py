"""The reference of the settings, made of the fields themselves.

The ``help`` of a field is the only place where it is described. The class's docstring, the page of the site and the
options of the command line show that text.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields
from textwrap import fill
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

# In the order in which one decides. The last group is not for the user to set.
GROUPS = {
    "Layers": ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "Budget": ("retained_ratio", "model_ratio", "max_model_size"),
    "Ranks": ("allocation", "rank_floor", "rank_multiple", "rank_pattern"),
    "Statistics": (
        "decomposition",
        "weight_energy",
        "input_energy",
        "gradient_energy",
        "shrinkage",
        "damping",
        "bias_correction",
        "statistics",
    ),
    "Training": (
        "adaptation_rank",
        "adaptation_init",
        "adaptation_space",
        "train_core",
        "modules_to_save",
        "init_weights",
    ),
    "Storage": ("storage", "frozen_bits", "keep_base_weights"),
    "Written by the package": ("layer_ranks", "layer_energy", "id2label", "peft_jactus_version", "adapter_format"),
}


@dataclass(frozen=True)
class DescribedField:
    """A setting as the reference shows it.

    Attributes:
        type: The values that it can have.
        default: As code, or None if its help says what the default is.
        help: What it means, in which range, what more of it does.
    """

    type: str
    default: str | None
    help: str


def described_fields(config: type) -> dict[str, DescribedField]:
    """Return the fields of a config that are in `GROUPS`, by name."""
    hints = get_type_hints(config)
    by_name = {each.name: each for each in fields(config)}
    return {
        name: DescribedField(_type_words(hints[name]), _default(by_name[name]), by_name[name].metadata["help"])
        for names in GROUPS.values()
        for name in names
    }


def with_reference(config: type[Config]) -> type[Config]:
    """Return the class, a dataclass, with its fields at the end of its docstring, group by group."""
    described = described_fields(config)
    sections = []
    for group, names in GROUPS.items():
        entries = [_entry(name, described[name]) for name in names]
        sections.append("\n".join((f"{group}:", *entries)))
    config.__doc__ = "\n\n".join(((config.__doc__ or "").rstrip(), *(_indented(each) for each in sections), ""))
    return config


def _entry(name: str, about: DescribedField) -> str:
    default = "" if about.default is None else f", default {about.default}"
    return f"    {name} ({about.type}{default}):\n" + fill(
        about.help, 111, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False
    )


def _indented(section: str) -> str:
    return "\n".join(f"    {line}" for line in section.splitlines())


def _default(field: Field[Any]) -> str | None:
    if field.default_factory is not MISSING:
        return repr(field.default_factory())
    return None if "Default: " in field.metadata["help"] else repr(field.default)


def _type_words(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, arguments))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_type_words, arguments))
    name = "None" if hint is NoneType else str(getattr(hint, "__name__", hint))
    return f"{name}[{', '.join(map(_type_words, arguments))}]" if arguments else name
