"""Calibration statistics of all targeted layers, which can be added."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from peft_jactus.calibration.statistics_files import (
    StatisticsFile,
    StatisticsParts,
    index_path,
    save_statistics_file,
)
from peft_jactus.numerics.moments import LayerStatistics, SecondMoment

if TYPE_CHECKING:
    import os

    from torch import Tensor

    from peft_jactus.numerics.sketches import GradientSketch


class CalibrationStatistics(Mapping[str, LayerStatistics]):
    """Statistics by full module name, as `calibrate` returns them.

    Statistics of disjoint parts of the data can be added (`merge`) and stored as safetensors files (`save`, `load`).
    So several runs or several machines can share the work.

    They can take gigabytes, so they are never copied. Copies of a `JactusConfig` share them (`copy`, `deepcopy`,
    `dataclasses.replace`). If they are pickled for another process, they are not sent, and using them there raises an
    error. Statistics that are read from a file are opened again there.

    Args:
        layers: Statistics by full module name, without PEFT's ``base_model.model.`` prefix. Not copied: the mapping
            may read each layer from a file when it is needed.
        num_batches: How many batches were seen.
        num_loss_terms: Number of terms in the losses of all batches: examples, or tokens that have a label.
            `RankPlan.loss_rise` is that of one term. Default: not known.
        memory_limit: How much may be in memory at a time, in bytes. It also limits what `get_peft_model` keeps between
            the choice of ranks and the factorization. Default: no limit.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerStatistics],
        *,
        num_batches: int = 0,
        num_loss_terms: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self._layers = layers
        self.num_batches = num_batches
        self.num_loss_terms = num_loss_terms
        self.memory_limit = memory_limit

    def __getitem__(self, name: str) -> LayerStatistics:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __copy__(self) -> CalibrationStatistics:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CalibrationStatistics:
        return self  # nothing changes the sums any more

    def __reduce__(self) -> tuple[Any, ...]:
        counts = {
            "num_batches": self.num_batches,
            "num_loss_terms": self.num_loss_terms,
            "memory_limit": self.memory_limit,
        }
        stored = self._layers
        source = stored.path if isinstance(stored, StatisticsFile | StatisticsParts) else list(self)
        return _unpickled, (source, counts)

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
                "`other` must cover the same layers; these are only in one of the two: "
                f"{sorted(set(self) ^ set(other))}."
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
                _added_tensors(layer.row_fisher, other[name].row_fisher),
                _added_sketches(layer.weight_gradient, other[name].weight_gradient),
            )
            for name, layer in self.items()
        }
        return CalibrationStatistics(
            layers,
            num_batches=self.num_batches + other.num_batches,
            num_loss_terms=_added(self.num_loss_terms, other.num_loss_terms),
        )

    def save(self, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: The file to write; its folder is created if needed. It replaces an index that was there.
            metadata: More strings to store in the file's header.
        """
        counts = {"num_batches": self.num_batches, "num_loss_terms": self.num_loss_terms}
        save_statistics_file(
            Path(path), self, {**(metadata or {}), **{name: json.dumps(count) for name, count in counts.items()}}
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationStatistics:
        """Read what `save` wrote, or what `calibrate` wrote with a memory limit.

        Args:
            path: The safetensors file. If there is an index of several files (``path`` and ``.index.json``), the files
                stay where they are, and each layer is read when it is needed.

        Returns:
            Equal statistics, on the CPU. A `ValueError` says if a file is damaged, or not a statistics file of this
            format version, a `FileNotFoundError` if there is none.
        """
        path = Path(path)
        stored = open_statistics(path)
        if index_path(path).is_file():
            return stored
        return cls(dict(stored), num_batches=stored.num_batches, num_loss_terms=stored.num_loss_terms)


class _LeftBehind(Mapping[str, LayerStatistics]):
    """What another process gets of statistics that are in memory."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> NoReturn:
        raise RuntimeError(
            "These calibration statistics stayed in the process that made them: a copy for each process could take "
            "gigabytes. Save them there (`statistics.save(path)`), and use `CalibrationStatistics.load(path)` here."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _unpickled(source: Path | list[str], counts: dict[str, Any]) -> CalibrationStatistics:
    if isinstance(source, Path):
        statistics = open_statistics(source)
        statistics.memory_limit = counts["memory_limit"]
        return statistics
    return CalibrationStatistics(_LeftBehind(source), **counts)


def open_statistics(path: Path) -> CalibrationStatistics:
    """Return what `CalibrationStatistics.load` does, each layer read when it is asked for.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    stored: StatisticsFile | StatisticsParts
    memory_limit = None
    if index_path(path).is_file():
        stored = StatisticsParts(index_path(path))
        memory_limit = stored.memory_limit
    elif path.is_file():
        stored = StatisticsFile(path)
    else:
        raise FileNotFoundError(f"No statistics file at {path}.")
    return CalibrationStatistics(
        stored, num_batches=stored.num_batches, num_loss_terms=stored.num_loss_terms, memory_limit=memory_limit
    )


def _added(mine: int | None, theirs: int | None) -> int | None:
    return None if mine is None or theirs is None else mine + theirs


def _added_sketches(mine: GradientSketch | None, theirs: GradientSketch | None) -> GradientSketch | None:
    if mine is None or theirs is None:
        return None
    total = mine.clone()
    total.merge_(theirs)
    return total


def _added_tensors(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    return None if mine is None or theirs is None else mine + theirs.to(mine)
