"""Calibration statistics of all targeted layers: they add up, and lie in files.

One safetensors file holds the statistics of all layers. Those of a model that is calibrated a part at a time are in a
file for each part, with an index beside them that is named as transformers names that of a sharded checkpoint. A path
has one of the two: writing either removes the other, as the last step; until then the index counts, which is only
written once all its files are there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_jactus.numerics.moments import TENSORS, LayerStatistics, SecondMoment

if TYPE_CHECKING:
    from torch import Tensor

# 1 had no sums of absolute values, and no Fisher information of rows; 2 had sums around zero in float32, which may not
# have one correct digit of a small variance.
FORMAT_VERSION = 3
_ROW_FISHER = "row_fisher."  # and the layer's name: key of a statistics file


class CalibrationStatistics(Mapping[str, LayerStatistics]):
    """Statistics by full module name, as `calibrate` returns them.

    Statistics of disjoint parts of the data add up (`merge`), and safetensors files hold them
    (`save`, `load`), so that several runs, or several machines, can share the work.

    Args:
        layers: Statistics by full module name, without PEFT's ``base_model.model.`` prefix. Not copied: it may read
            them from a file as they are asked for.
        num_batches: How many batches were seen.
        memory_limit: What may be held at a time, in bytes. It limits what `get_peft_model` keeps between the choice of
            ranks and the factors, too. Default: no limit.
    """

    def __init__(
        self, layers: Mapping[str, LayerStatistics], *, num_batches: int = 0, memory_limit: int | None = None
    ) -> None:
        self._layers = layers
        self.num_batches = num_batches
        self.memory_limit = memory_limit

    def __getitem__(self, name: str) -> LayerStatistics:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"CalibrationStatistics({len(self)} layers, {self.num_batches} batches)"

    def merge(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """Return the statistics of the union of two disjoint parts of the data.

        Args:
            other: Statistics of the same layers.

        Raises:
            ValueError: If the layers or their shapes differ.
        """
        if set(self) != set(other):
            raise ValueError(
                f"`other` must cover the same layers; these are in one only: {sorted(set(self) ^ set(other))}."
            )
        moments: dict[tuple[object, object], SecondMoment] = {}

        def merged(mine: SecondMoment, theirs: SecondMoment) -> SecondMoment:
            key = (mine.identity, theirs.identity)
            if key not in moments:
                moments[key] = mine.clone()
                moments[key].merge_(theirs)
            return moments[key]

        layers = {
            name: LayerStatistics(
                merged(layer.input, other[name].input),
                merged(layer.gradient, other[name].gradient),
                _added(layer.row_fisher, other[name].row_fisher),
            )
            for name, layer in self.items()
        }
        return CalibrationStatistics(layers, num_batches=self.num_batches + other.num_batches)

    def save(self, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: The file to write; its folder is made if need be. It takes the place of an index that was there.
            metadata: Further strings to store in the file's header.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers: dict[object, int] = {}
        tensors: dict[str, Tensor] = {}
        index: dict[str, list[int]] = {}
        counts: list[int] = []
        for name, layer in self.items():
            for moment in (layer.input, layer.gradient):
                if moment.identity not in numbers:
                    number = numbers[moment.identity] = len(counts)
                    counts.append(moment.num_tokens)
                    tensors |= {f"{number}.{key}": getattr(moment, key).cpu().contiguous() for key in TENSORS}
            index[name] = [numbers[layer.input.identity], numbers[layer.gradient.identity]]
            if layer.row_fisher is not None:
                tensors[_ROW_FISHER + name] = layer.row_fisher.cpu()
        header = {
            **(metadata or {}),
            "format_version": str(FORMAT_VERSION),
            "num_batches": str(self.num_batches),
            "layers": json.dumps(index),
            "num_tokens": json.dumps(counts),
        }
        _replace_atomically(tensors, header, path)
        index_path(path).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationStatistics:
        """Read what `save` wrote, or what `calibrate` did under a memory limit.

        Args:
            path: The safetensors file. If it has an index of several files (``path`` and ``.index.json``), these stay
                where they are, and each layer is read when it is asked for.

        Returns:
            Equal statistics, on the CPU. A `ValueError` says if a file is damaged, or not a statistics file of this
            format version, a `FileNotFoundError` if there is none.
        """
        path = Path(path)
        stored = open_statistics(path)
        return stored if index_path(path).is_file() else cls(dict(stored), num_batches=stored.num_batches)


def open_statistics(path: Path) -> CalibrationStatistics:
    """Return what `CalibrationStatistics.load` does, each layer read when it is asked for.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if index_path(path).is_file():
        parts = _StatisticsParts(index_path(path))
        return CalibrationStatistics(parts, num_batches=parts.num_batches, memory_limit=parts.memory_limit)
    if path.is_file():
        file = _StatisticsFile(path)
        return CalibrationStatistics(file, num_batches=file.num_batches)
    raise FileNotFoundError(f"No statistics file at {path}.")


class _StatisticsFile(Mapping[str, LayerStatistics]):
    """The layers of one file, each read when it is asked for; what they share is shared while it is in use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._moments: WeakValueDictionary[int, SecondMoment] = WeakValueDictionary()
        with self._opened() as file:
            header = file.metadata() or {}
            if header.get("format_version") != str(FORMAT_VERSION):
                raise ValueError(
                    f"{path} is not a statistics file of format version {FORMAT_VERSION}; its header says "
                    f"{header.get('format_version')!r}. Calibrate again with this version of peft_jactus, to another "
                    "file, or delete this one first."
                )
            self.num_batches: int = json.loads(header["num_batches"])
            self._counts: list[int] = json.loads(header["num_tokens"])
            self._identities = [object() for _ in self._counts]
            self._index: dict[str, list[int]] = json.loads(header["layers"])
            self._keys = set(file.keys())

    def __getitem__(self, name: str) -> LayerStatistics:
        inputs, gradients = self._index[name]
        with self._opened() as file:
            key = _ROW_FISHER + name
            row_fisher = file.get_tensor(key) if key in self._keys else None
            return LayerStatistics(self._moment(file, inputs), self._moment(file, gradients), row_fisher)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def _moment(self, file: Any, number: int) -> SecondMoment:
        moment = self._moments.get(number)
        if moment is None:
            tensors = {key: file.get_tensor(f"{number}.{key}") for key in TENSORS}
            moment = SecondMoment(**tensors, num_tokens=self._counts[number], identity=self._identities[number])
            self._moments[number] = moment
        return moment

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self._path, framework="pt") as file:
                yield file
        except (SafetensorError, KeyError, json.JSONDecodeError, IndexError) as error:
            raise ValueError(f"{self._path} is damaged ({error}). Delete it and calibrate again.") from error


class _StatisticsParts(Mapping[str, LayerStatistics]):
    """The layers of several files that an index names."""

    def __init__(self, index: Path) -> None:
        paths, self.memory_limit = _read_index(index)
        files = [_StatisticsFile(path) for path in paths]
        self._files = {name: file for file in files for name in file}
        self.num_batches = files[0].num_batches if files else 0

    def __getitem__(self, name: str) -> LayerStatistics:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _read_index(index: Path) -> tuple[list[Path], int | None]:
    """Return the files that an index names, and for which memory limit they were made."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        file_names = list(content["files"])
        memory_limit: int | None = content.get("memory_limit")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}). Delete it and calibrate again.") from error
    paths = [index.parent / Path(name).name for name in file_names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {missing}, which are not there. Delete it and calibrate again.")
    return paths, memory_limit


def files_at(path: Path) -> list[Path]:
    """Return the safetensors files that together are the statistics at ``path``; none if there are none."""
    if index_path(path).is_file():
        return _read_index(index_path(path))[0]
    return [path] if path.is_file() else []


def index_path(path: Path) -> Path:
    """Return where the index of several files is, that together are the statistics at ``path``."""
    return path.with_name(path.name + ".index.json")


def part_path(path: Path, number: int, count: int) -> Path:
    """Return where part ``number`` of ``count`` is, counted from 1."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def save_index(path: Path, parts: list[Path], memory_limit: int) -> None:
    """Write the index of ``parts``, in this order, which together are the statistics at ``path``.

    It takes the place of a single file that was there.
    """
    temporary = index_path(path).with_suffix(".tmp")
    content = {"files": [part.name for part in parts], "memory_limit": memory_limit}
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(index_path(path))
    path.unlink(missing_ok=True)


def _added(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    return None if mine is None or theirs is None else mine + theirs.to(mine)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the header strings of a statistics file without reading its tensors."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _replace_atomically(tensors: dict[str, Tensor], header: dict[str, str], path: Path) -> None:
    """Write beside ``path`` and rename: a reader sees the old file or the new one, never a torn one.

    What a killed process leaves is overwritten by the next one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata=header)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
