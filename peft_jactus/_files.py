"""Files of tensors: opened with errors that say what to do, written whole or not at all, known by their bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor


@contextlib.contextmanager
def opened_safetensors(
    path: Path, *, remedy: str, error_type: type[ValueError] = ValueError, expected: tuple[type[Exception], ...] = ()
) -> Iterator[Any]:
    """Open a safetensors file for reading; whatever is wrong with it becomes one kind of error.

    Args:
        path: The file.
        remedy: What the user can do about a damaged file: a sentence.
        error_type: Of the error that is raised.
        expected: Exceptions that the block may raise where the file does not hold what it should.

    Yields:
        What `safetensors.safe_open` gives; an ``error_type`` says if the file cannot be read.
    """
    failures: tuple[type[Exception], ...] = (SafetensorError, OSError, *expected)
    try:
        with safe_open(path, framework="pt") as reader:
            yield reader
    except failures as error:
        raise error_type(f"{path} cannot be read as safetensors and is damaged: {error}. {remedy}") from error


def save_safetensors(tensors: dict[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    """Write beside ``path`` and rename: a reader sees the old file or the new one, never a torn one.

    What a killed process leaves is overwritten by the next one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata=dict(header))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as safetensors stores them; without a copy where that is possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def sha256_of(*parts: bytes | memoryview | str) -> str:
    """Return the digest of all parts, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
