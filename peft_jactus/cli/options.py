"""From the words of an option to what it means."""

from __future__ import annotations

import torch


def to_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name."""
    return None if name is None else getattr(torch, name)


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
