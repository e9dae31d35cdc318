"""From the words of an option to what it means."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from peft_jactus.deployment.atomic_folder import check_target
from peft_jactus.deployment.plots import picture_formats

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def to_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name."""
    return None if name is None else getattr(torch, name)


def check_output_dir(output_dir: Path, *, overwrite: bool, read: Mapping[str, str | Path | None]) -> None:
    """Raise `ValueError` if nothing must be written there, also because of what the command reads, by its options."""
    check_target(output_dir, overwrite=overwrite, argument="OUTPUT_DIR", overwriting="--overwrite", read=read)


def check_output_file(file: Path | None, option: str) -> None:
    """Raise `ValueError` if a file that an option names, if it does, cannot be written."""
    if file is None:
        return
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file}: there is no directory {file.parent}. Make it first.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{option} {file} cannot be written: permission denied.")


def check_plot_file(file: Path | None) -> None:
    """Raise `ValueError` if no plot can be written to a file; an `ImportError` says if none can be made at all."""
    if file is None:
        return
    check_output_file(file, "--plot")
    formats = picture_formats()
    if file.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"--plot {file}: the name must end in one of .{', .'.join(sorted(formats))}.")


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
