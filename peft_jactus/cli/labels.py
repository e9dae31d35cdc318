"""Labels of a data set as a model counts its classes."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedConfig

# Names that only count: those that transformers makes up, and the like.
_NUMBERED = re.compile(r"((label|class)[ _-]?)?\d+", re.IGNORECASE)


def label_reader(
    config: PreTrainedConfig, column: str, class_names: Sequence[str] | None
) -> Callable[[Mapping[str, Any]], int | float]:
    """Return what gives a row's label as the model counts them.

    Args:
        config: Of the model.
        column: Of the labels.
        class_names: What the data set calls the classes that it has by number, if it says so. A `ValueError` says if
            the model has some of these names, with other numbers, but not all.
    """
    num_labels = int(cast("int", config.num_labels))
    numbers = cast("dict[str, int]", config.label2id)
    places = None if class_names is None or num_labels == 1 else _places(class_names, numbers)

    def label_of(row: Mapping[str, Any]) -> int | float:
        label = row[column]
        if num_labels == 1:
            return float(label)
        number = _find(label, numbers) if isinstance(label, str) else label
        if places is not None and 0 <= number < len(places):
            number = places[number]
        if not 0 <= number < num_labels:
            raise ValueError(
                f"The model has {num_labels} classes ({list(numbers)[:10]}); the data has the label "
                f"{label!r} in column {column!r}. Set --label-column, or calibrate on the data that the model was "
                "fine-tuned on."
            )
        return int(number)

    return label_of


def _places(class_names: Sequence[str], numbers: Mapping[str, int]) -> list[int] | None:
    """Return the model's number of each class of the data; ``None`` if they are the same."""
    found = [_find(name, numbers) for name in class_names]
    if all(number >= 0 for number in found):
        return found
    if any(all(_NUMBERED.fullmatch(name.strip()) for name in names) for names in (class_names, numbers)):
        return None
    named = f"The data's classes are called {list(class_names)[:10]}, those of the model {list(numbers)[:10]}"
    if any(number not in (-1, place) for place, number in enumerate(found)):
        raise ValueError(
            f"{named}. Some names are the same, but not their numbers, so the others cannot be told. Give the model "
            "the data's names (`id2label` and `label2id` in its config.json), in its own order."
        )
    warnings.warn(f"{named}. The first ones are taken for each other, and so on: check that.", stacklevel=2)
    return None


def _find(name: str, numbers: Mapping[str, int]) -> int:
    """Return the number of a class, also if its name is written with other capitals; -1 if it is not there."""
    if name in numbers:
        return numbers[name]
    folded = [number for other, number in numbers.items() if other.strip().casefold() == name.strip().casefold()]
    return folded[0] if len(folded) == 1 else -1
