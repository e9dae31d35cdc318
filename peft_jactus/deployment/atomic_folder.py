"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def check_target(
    target: Path,
    *,
    overwrite: bool,
    argument: str = "`save_directory`",
    overwriting: str = "`overwrite=True`",
    read: Mapping[str, str | os.PathLike[str] | None] = MappingProxyType({}),
) -> None:
    """Check that a checkpoint may be written to this directory.

    Args:
        target: The directory.
        overwrite: Whether what is there may be replaced.
        argument: What the user knows ``target`` as.
        overwriting: What the user gives for ``overwrite``.
        read: Files and directories that must be there afterwards, by what the user knows each as. Names on the Hub and
            ``None`` are passed over.

    Raises:
        ValueError: If it must not.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{argument} {target} is a file; give a directory.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{argument} {target} is not empty. Give another one, or {overwriting}.")
    # What `appearing_whole` does at the very end.
    if target.resolve().is_mount():
        raise ValueError(f"{argument} {target} is a mount point, which cannot be renamed; give a folder in it.")
    parent = next(folder for folder in target.resolve().parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{argument} {target} cannot be made: {parent} is not writable. Give another one.")
    if target.is_dir():
        _check_spares(target, {**read, "the current directory": os.curdir}, argument)


def _check_spares(target: Path, kept: Mapping[str, str | os.PathLike[str] | None], argument: str) -> None:
    """Raise `ValueError` if to replace ``target`` would delete one of these."""
    for name, place in kept.items():
        if not place or not Path(place).exists():
            continue
        path = Path(place).resolve()
        if any(target.samefile(folder) for folder in (path, *path.parents)):
            holds = "is" if target.samefile(path) else "contains"
            raise ValueError(
                f"{argument} {target} {holds} {name} ({path}), which would be deleted. Give another directory."
            )


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``target``, and move it there once everything is in it."""
    target = target.resolve()  # a link stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent))
    try:
        folder.chmod(0o755)  # as mkdir would make it; mkdtemp makes folders for one user
        yield folder
        if target.exists():
            replaced = folder.with_suffix(".replaced")
            target.rename(replaced)
            try:
                folder.rename(target)
            except BaseException:
                replaced.rename(target)
                raise
            shutil.rmtree(replaced)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
