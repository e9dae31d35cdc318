"""The member `PeftType.JACTUS`, added from outside PEFT."""

from __future__ import annotations

from peft.utils.peft_types import PeftType

NAME = "JACTUS"


def jactus_peft_type() -> PeftType:
    """Return ``PeftType.JACTUS``, adding it to PEFT's enumeration if it is not there yet.

    PEFT finds the classes of a method by this member, and its tables are keyed by members of the enumeration; a
    plain string lacks the ``.value`` that transformers and the Trainer read.

    Raises:
        ImportError: If this Python's enumerations cannot be extended this way.
    """
    existing = PeftType.__members__.get(NAME)
    if existing is not None:
        return existing
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]  # as enum.EnumType sets it
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]  # likewise
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)
    if hashable_values is not None:  # newer Pythons look `"X" in PeftType` up here
        hashable_values.append(NAME)
    if PeftType(NAME) is not member or NAME not in list(PeftType):
        raise ImportError(
            "peft_jactus could not register itself with PEFT on this Python version; please use another one."
        )
    return member
