"""From the words of an option to what it means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft_jactus.deployment.atomic_folder import check_target

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def to_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name."""
    return None if name is None else getattr(torch, name)


def check_output_dir(output_dir: Path, *, overwrite: bool, read: Mapping[str, str | Path | None]) -> None:
    """Raise `ValueError` if nothing must be written there, also because of what the command reads, by its options."""
    check_target(output_dir, overwrite=overwrite, argument="OUTPUT_DIR", overwriting="--overwrite", read=read)


def to_device(name: str | None) -> torch.device:
    """Return a device that is there.

    Args:
        name: Of the device. Default: a GPU if there is one.

    Raises:
        ValueError: If it is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter, where torch has no CUDA
        raise ValueError(f"--device {name} cannot be used: {error}") from error
    return device
