"""What an export is given, checked before any work; each error names the argument, and what to give."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

if TYPE_CHECKING:
    from pathlib import Path

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(dtype: object) -> None:
    """Raise `TypeError` for anything but a dtype that a checkpoint can have, or ``None``."""
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"`dtype` must be one of {', '.join(map(str, _DTYPES))}; got {dtype!r}.")


def check_shard_size(size: object) -> None:
    """Raise `ValueError` or `TypeError` for a size that `save_pretrained` cannot read."""
    if isinstance(size, bool) or not isinstance(size, (str, Real)):
        raise TypeError(f"`max_shard_size` must be a number of bytes, or a size such as '5GB'; got {size!r}.")
    if not isinstance(size, str):
        return
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"`max_shard_size` must be a number with KB, MB, GB or TB, such as '5GB'; got {size!r}."
        ) from error


def check_processor(processor: object) -> None:
    """Raise `TypeError` for what cannot be written: a name, or a class."""
    if processor is None:
        return
    if isinstance(processor, type) or not callable(getattr(processor, "save_pretrained", None)):
        raise TypeError(
            f"`processor` must be a tokenizer, an image processor or a processor; got {processor!r}. Load it first, "
            "for example with `AutoTokenizer.from_pretrained(name)`."
        )


def check_card_fields(metrics: object, datasets: object) -> None:
    """Raise `TypeError` for what cannot be shown in the model card."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(
            f"`metrics` must be a dict of results by name, as `trainer.evaluate()` returns it; got {metrics!r}."
        )
    names = datasets if isinstance(datasets, list) else [datasets]
    if datasets is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"`datasets` must be the name of a data set on the Hub, or a list of names; got {datasets!r}.")


def check_repo_id(repo_id: str | None, folder: Path, argument: str = "`repo_id`") -> str:
    """Return the name of the repository to upload to.

    Args:
        repo_id: What the user gave.
        folder: It has the name of the repository, if ``repo_id`` is not given.
        argument: What the user knows ``repo_id`` as.

    Raises:
        ValueError: If the Hub has no repositories with such names.
    """
    name = repo_id or folder.name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{argument}: a repository cannot be called {name!r}. Give another name, such as 'user/name'. {error}"
        ) from error
    return name
