"""Files of calibration statistics.

One safetensors file holds the statistics of all layers. Those of a model that is calibrated a part at a time are in a
file for each part, with an index beside them that is named as transformers names that of a sharded checkpoint. A path
has one of the two: writing either removes the other, as the last step. Until then the index counts; it is only written
once all its files are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from peft_jactus._files import opened_safetensors, save_safetensors
from peft_jactus.numerics import sketches
from peft_jactus.numerics.moments import TENSORS, LayerStatistics, SecondMoment
from peft_jactus.numerics.sketches import GradientSketch

if TYPE_CHECKING:
    import contextlib

    from torch import Tensor

# 1 had no sums of absolute values, and no Fisher information of rows; 2 had sums around zero in float32, which may not
# have one correct digit of a small variance.
FORMAT_VERSION = 3
# Keys of a statistics file, with the layer's name behind them.
_ROW_FISHER = "row_fisher."
_SKETCH = {name: f"weight_gradient_{name}." for name in sketches.TENSORS}
_INDEX_SUFFIX = ".index.json"
_REMEDY = "Delete it and calibrate again."


def save_statistics_file(path: Path, layers: Mapping[str, LayerStatistics], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all; it takes the place of an index that was there.

    Args:
        path: The file to write; its folder is made if need be.
        layers: Statistics by full module name; what layers share is stored once.
        metadata: Further strings to store in the file's header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers: dict[object, int] = {}
    tensors: dict[str, Tensor] = {}
    index: dict[str, list[int]] = {}
    counts: list[int] = []
    for name, layer in layers.items():
        for moment in (layer.input, layer.gradient):
            if moment.identity not in numbers:
                number = numbers[moment.identity] = len(counts)
                counts.append(moment.num_tokens)
                tensors |= {f"{number}.{key}": getattr(moment, key).cpu().contiguous() for key in TENSORS}
        index[name] = [numbers[layer.input.identity], numbers[layer.gradient.identity]]
        if layer.row_fisher is not None:
            tensors[_ROW_FISHER + name] = layer.row_fisher.cpu()
        if layer.weight_gradient is not None:
            for key, prefix in _SKETCH.items():
                tensors[prefix + name] = getattr(layer.weight_gradient, key).cpu().contiguous()
    header = {
        **metadata,
        "format_version": str(FORMAT_VERSION),
        "layers": json.dumps(index),
        "num_tokens": json.dumps(counts),
    }
    save_safetensors(tensors, path, header)
    index_path(path).unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the header strings of a statistics file without reading its tensors."""
    with opened_safetensors(path, remedy=_REMEDY) as file:
        return dict(file.metadata() or {})


class StatisticsFile(Mapping[str, LayerStatistics]):
    """The layers of one file, each read when it is asked for; what they share is shared while it is in use."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
            self.num_loss_terms: int | None = json.loads(header.get("num_loss_terms", "null"))
            self._counts: list[int] = json.loads(header["num_tokens"])
            self._identities = [object() for _ in self._counts]
            self._index: dict[str, list[int]] = json.loads(header["layers"])
            self._keys = set(file.keys())

    def __getitem__(self, name: str) -> LayerStatistics:
        inputs, gradients = self._index[name]
        with self._opened() as file:
            key = _ROW_FISHER + name
            row_fisher = file.get_tensor(key) if key in self._keys else None
            return LayerStatistics(
                self._moment(file, inputs), self._moment(file, gradients), row_fisher, self._sketch(file, name)
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def _sketch(self, file: Any, name: str) -> GradientSketch | None:
        if _SKETCH["left"] + name not in self._keys:
            return None
        return GradientSketch(**{key: file.get_tensor(prefix + name) for key, prefix in _SKETCH.items()})

    def _moment(self, file: Any, number: int) -> SecondMoment:
        moment = self._moments.get(number)
        if moment is None:
            tensors = {key: file.get_tensor(f"{number}.{key}") for key in TENSORS}
            moment = SecondMoment(**tensors, num_tokens=self._counts[number], identity=self._identities[number])
            self._moments[number] = moment
        return moment

    def _opened(self) -> contextlib.AbstractContextManager[Any]:
        wrong = (KeyError, json.JSONDecodeError, IndexError)
        return opened_safetensors(self.path, remedy=_REMEDY, expected=wrong)


class StatisticsParts(Mapping[str, LayerStatistics]):
    """The layers of several files that an index names."""

    def __init__(self, index: Path) -> None:
        paths, self.memory_limit = _read_index(index)
        files = [StatisticsFile(path) for path in paths]
        self._files = {name: file for file in files for name in file}
        self.path = index.with_name(index.name.removesuffix(_INDEX_SUFFIX))
        self.num_batches = files[0].num_batches if files else 0
        self.num_loss_terms = files[0].num_loss_terms if files else None

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
        raise ValueError(f"{index} is damaged ({error!r}). {_REMEDY}") from error
    paths = [index.parent / Path(name).name for name in file_names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {missing}, which are not there. {_REMEDY}")
    return paths, memory_limit


def files_at(path: Path) -> list[Path]:
    """Return the safetensors files that together are the statistics at ``path``; none if there are none."""
    if index_path(path).is_file():
        return _read_index(index_path(path))[0]
    return [path] if path.is_file() else []


def files_of(path: Path) -> list[Path]:
    """Return all files of the statistics at ``path``, the index too: what to delete to be rid of them."""
    index = index_path(path)
    return [index, *files_at(path)] if index.is_file() else files_at(path)


def remains_at(path: Path) -> list[Path]:
    """Return all files of any statistics at ``path``, also those that an interrupted run has left."""
    parts = [f"{path.stem}-*-of-*{path.suffix}", f"{path.stem}.process-*-of-*{path.suffix}"]
    left = [file for pattern in parts for file in path.parent.glob(pattern)]
    return sorted({*files_of(path), *left})


def index_path(path: Path) -> Path:
    """Return where the index of several files is, that together are the statistics at ``path``."""
    return path.with_name(path.name + _INDEX_SUFFIX)


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
