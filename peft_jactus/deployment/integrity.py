"""Is a checkpoint the one that was saved? Headers and digests of safetensors files.

Each file of a compressed checkpoint carries, in its header, a digest of every tensor of the whole checkpoint. Reading
headers and the edges of each tensor costs next to nothing, and finds missing, exchanged and foreign tensors; reading
everything also finds a flipped bit.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_jactus._files import bytes_of, opened_safetensors, sha256_of
from peft_jactus.errors import DamagedCheckpointError

if TYPE_CHECKING:
    import contextlib
    import os
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

METADATA_KEY = "jactus_digests"
# In place of digests, where the tensors had no values in memory when the checkpoint was saved (sharded over devices).
NOT_COMPUTED = "not computed"

_EDGE_BYTES = 4096
_EDGE_DIGEST_LENGTH = 16  # hex digits
_HASHING_THREADS = 4  # hashlib releases the GIL
_REMEDY = "Download or export it again."


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it

    def __str__(self) -> str:
        return _described(self.shape, is_floating=self.dtype.startswith(("F", "BF")))


@dataclass(frozen=True)
class CheckpointFiles:
    """The headers of all safetensors files of a checkpoint.

    Attributes:
        entries: The file, shape and dtype of each tensor.
        digests: Digests by tensor name, ``(edges, all bytes)``; ``None`` if they were not computed on saving.
    """

    entries: dict[str, _Entry]
    digests: dict[str, tuple[str, str]] | None

    @classmethod
    def read(
        cls, paths: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str] | None = None
    ) -> CheckpointFiles:
        """Read the headers and check that they belong together.

        Args:
            paths: All files of the checkpoint.
            folder: Where they must be, if it is a directory.

        Returns:
            What the headers say.

        Raises:
            DamagedCheckpointError: If a file cannot be read, if files contradict each other or their index, or
                if the tensors are not those that were saved.
        """
        files = [Path(path) for path in paths]
        _check_names(files, None if folder is None else Path(folder))
        entries: dict[str, _Entry] = {}
        digests: set[str | None] = set()
        for file in files:
            with _opened(file) as reader:
                digests.add((reader.metadata() or {}).get(METADATA_KEY))
                for name in reader.keys():  # noqa: SIM118  # not a mapping
                    if name in entries:
                        raise DamagedCheckpointError(f"{file} and {entries[name].file} both hold {name}. {_REMEDY}")
                    part = reader.get_slice(name)
                    entries[name] = _Entry(file, tuple(part.get_shape()), part.get_dtype())
        if len(digests) != 1:
            raise DamagedCheckpointError(
                f"The files in {files[0].parent} are from different checkpoints: their digests differ. {_REMEDY}"
            )
        _check_index(files, entries)
        checked = cls(entries, _parse_digests(digests.pop(), files[0]))
        checked._check_tensor_names(files[0].parent)
        return checked

    def _check_tensor_names(self, folder: Path) -> None:
        if self.digests is None:
            return
        missing, unknown = sorted(set(self.digests) - set(self.entries)), sorted(set(self.entries) - set(self.digests))
        if missing or unknown:
            raise DamagedCheckpointError(
                f"{folder} does not hold the tensors that were saved: missing {missing[:5]}, unknown {unknown[:5]}. "
                f"{_REMEDY}"
            )

    def check_layer_names(self, names: Collection[str]) -> None:
        """Check that each of the layers in ``config.json`` has tensors, and each factorised layer is one of them.

        Args:
            names: Of the layers that ``config.json`` lists.

        Raises:
            DamagedCheckpointError: Naming the layers for which this does not hold.
        """
        suffix = ".weight"
        weights = {name.removesuffix(suffix): entry for name, entry in self.entries.items() if name.endswith(suffix)}
        with_parts = {name.rpartition(".")[0] for name in weights}
        # The weight of a factorised layer is one number beside its parts.
        factorised = {name for name, entry in weights.items() if entry.shape == (1,) and name in with_parts}
        missing, unlisted = sorted(set(names) - set(weights)), sorted(factorised - set(names))
        if missing or unlisted:
            raise DamagedCheckpointError(
                f"config.json: `quantization_config.layers` lists {missing[:5]}, which the checkpoint does not hold, "
                f"or does not list {unlisted[:5]}, which it holds factorised. {_REMEDY}"
            )

    def check_layer(self, name: str, tensors: Mapping[str, Tensor], description: str) -> None:
        """Check shapes, and what is a floating point number.

        Args:
            name: Of a layer in the checkpoint.
            tensors: What it must hold, by the name inside of the layer; may be on the meta device.
            description: What ``config.json`` says about the layer.

        Raises:
            DamagedCheckpointError: If the layer has other tensors.
        """
        expected = {
            f"{name}.{key}": _described(tensor.shape, is_floating=tensor.is_floating_point())
            for key, tensor in tensors.items()
        }
        found = {key: str(entry) for key, entry in self.entries.items() if key.startswith(f"{name}.")}
        if expected != found:
            raise DamagedCheckpointError(
                f"{name}: config.json describes a {description}, with tensors {expected}; the checkpoint holds "
                f"{found}. {_REMEDY}"
            )

    def check_contents(self, *, all_bytes: bool) -> None:
        """Compare tensors with their digests.

        Args:
            all_bytes: Read everything. Default: 4 KiB at both ends of each tensor, which finds exchanged and foreign
                tensors, but not one flipped bit.

        Raises:
            DamagedCheckpointError: Naming tensors that differ, or if there are no digests to compare ``all_bytes``
                with.
        """
        if self.digests is None:
            if all_bytes:
                raise DamagedCheckpointError(
                    "The checkpoint carries no digests: it was saved from a model spread over devices. Load it on one "
                    "device and save it again."
                )
            return
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            differing = pool.map(lambda file: self._differing(file, all_bytes=all_bytes), self._files())
            names = [name for found in differing for name in found]
        if names:
            raise DamagedCheckpointError(
                f"{len(names)} tensors in {self._files()[0].parent} are not what was saved: {names[:5]}. {_REMEDY}"
            )

    def _files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    def _differing(self, file: Path, *, all_bytes: bool) -> list[str]:
        assert self.digests is not None
        found = []
        with _opened(file) as reader:
            for name in reader.keys():  # noqa: SIM118  # not a mapping
                edges, whole = self.digests[name]
                tensor = reader.get_tensor(name)
                if edges != _edge_digest(tensor) or (all_bytes and whole != sha256_of(bytes_of(tensor))):
                    found.append(name)
        return found


def digest_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the header entry for a checkpoint of these tensors; all of them, also if they go to several files."""
    digests = {name: (_edge_digest(tensor), sha256_of(bytes_of(tensor))) for name, tensor in tensors.items()}
    return {METADATA_KEY: json.dumps(digests)}


def _described(shape: Sequence[int], *, is_floating: bool) -> str:
    """Return what a tensor must be, for comparisons and messages: its precision may differ."""
    return f"{'floating' if is_floating else 'integer'} {list(shape)}"


def _edge_digest(tensor: Tensor) -> str:
    data = bytes_of(tensor)
    edges = (data[:_EDGE_BYTES], data[-_EDGE_BYTES:])
    return sha256_of(f"{tensor.dtype} {list(tensor.shape)} ", *edges)[:_EDGE_DIGEST_LENGTH]


def _opened(file: Path) -> contextlib.AbstractContextManager[Any]:
    return opened_safetensors(file, remedy=_REMEDY, error_type=DamagedCheckpointError)


def _check_names(files: Sequence[Path], folder: Path | None) -> None:
    is_outside = len({file.parent for file in files}) > 1
    if folder is not None and folder.is_dir():
        is_outside |= any(not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts for file in files)
    if is_outside:
        raise DamagedCheckpointError(
            f"The checkpoint's index names files outside of its folder: {sorted(map(str, files))[:5]}."
        )
    for file in files:
        if file.suffix != ".safetensors":
            raise DamagedCheckpointError(f"{file} is not a safetensors file; a compressed checkpoint has no other.")


def check_index(folder: str | os.PathLike[str]) -> None:
    """Check the form of the index in ``folder``, if there is one; a `DamagedCheckpointError` says what is wrong."""
    for path in Path(folder).glob("*.safetensors.index.json"):
        _read_weight_map(path)


def _check_index(files: Sequence[Path], entries: Mapping[str, _Entry]) -> None:
    """Compare the headers with the index beside them, if there is one."""
    for path in sorted(files[0].parent.glob("*.safetensors.index.json")):
        weight_map = _read_weight_map(path)
        if not {file.name for file in files} & set(weight_map.values()):
            continue  # another variant's
        wrong = [name for name, file in weight_map.items() if name not in entries or entries[name].file.name != file]
        if wrong:
            raise DamagedCheckpointError(f"{path} does not say where these tensors are: {wrong[:5]}. {_REMEDY}")


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map, metadata = index["weight_map"], index["metadata"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read as the index of a checkpoint. {_REMEDY}") from error
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
        or not isinstance(metadata, dict)
    ):
        raise DamagedCheckpointError(
            f"{path} must have `metadata`, and `weight_map` with the file of each tensor. {_REMEDY}"
        )
    return weight_map


def _parse_digests(text: str | None, file: Path) -> dict[str, tuple[str, str]] | None:
    if text == NOT_COMPUTED:
        return None
    try:
        digests = json.loads(text or "")
        return {str(name): (str(edges), str(whole)) for name, (edges, whole) in digests.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{file} carries no digests of its tensors in its header (`{METADATA_KEY}`), unlike every compressed "
            f"checkpoint. {_REMEDY}"
        ) from error
