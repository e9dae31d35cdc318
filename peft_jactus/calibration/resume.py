"""The file in which `calibrate` keeps what it has: to go on after an interruption, or to be used again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peft_jactus._files import bytes_of, sha256_of
from peft_jactus._processes import gather_objects, num_processes, process_index
from peft_jactus.calibration.statistics import CalibrationStatistics, open_statistics
from peft_jactus.calibration.statistics_files import files_at, index_path, part_path, read_metadata
from peft_jactus.tuner.planning import check_statistics
from peft_jactus.tuner.targeting import dense_weight, weight_loaded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from peft_jactus.numerics.moments import StatisticsNeeds

# Keys of a file's header.
_COMPLETE = "complete"
_WEIGHTS = "weights"


@dataclass(frozen=True)
class SavedStatistics:
    """What a file holds, and whether it is of all batches."""

    statistics: CalibrationStatistics
    complete: bool


class StatisticsStore:
    """Statistics of some layers at a path, with digests of the weights, since they are of no other.

    In several processes each has a file of its own until its statistics are part of what is at the path.

    Args:
        path: Of the safetensors file.
        targets: The layers by full module name, adapted or not.
        needs: What the statistics have to hold.
        digests: Of the weights of all targeted layers. Default: of ``targets``.
    """

    def __init__(
        self,
        path: Path,
        targets: Mapping[str, nn.Module],
        needs: StatisticsNeeds,
        *,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        if path.is_dir():
            raise ValueError(f"`statistics_file` {path} is a directory; give a file in it.")
        self.path = path
        self._is_part = False
        self._targets = targets
        self._needs = needs
        if digests is None:
            digests = {name: _weight_digest(module) for name, module in targets.items()}
        self._digests = digests

    def part(self, targets: Mapping[str, nn.Module], number: int, count: int) -> StatisticsStore:
        """Return the store of a group of the layers, ``number`` of ``count``, counted from 1."""
        path = part_path(self.path, number, count)
        # A change of one layer changes what others see, so each part has all digests.
        store = StatisticsStore(path, targets, self._needs, digests=self._digests)
        store._is_part = True
        return store

    def read(self, *, lazily: bool) -> SavedStatistics | None:
        """Return the complete statistics, if every process finds them; else what this process has of its own part.

        Args:
            lazily: Read each layer when it is asked for.

        Returns:
            ``None`` if there are none. A `ValueError` says if a file is damaged, or of other layers or weights.
        """
        saved = self._read(self.path, lazily=lazily)
        if num_processes() == 1 or all(gather_objects(saved is not None and saved.complete)):
            return saved
        return self._read(self._own_path, lazily=lazily)

    def save_part(self, statistics: CalibrationStatistics) -> None:
        """Save what this process has so far."""
        statistics.save(self._own_path, metadata=self._header(complete=False))

    def save(self, statistics: CalibrationStatistics) -> None:
        """Save the complete statistics, which are the same in all processes, and remove this process's part."""
        if process_index() == 0:
            statistics.save(self.path, metadata=self._header(complete=True))
        gather_objects(None)  # wait for it
        self.remove_own_part()

    def remove_own_part(self) -> None:
        """Remove what this process has of its own, once it is part of what is at the path."""
        if self._own_path != self.path:
            self._own_path.unlink(missing_ok=True)

    @property
    def _own_path(self) -> Path:
        if num_processes() == 1:
            return self.path
        return self.path.with_name(
            f"{self.path.stem}.process-{process_index()}-of-{num_processes()}{self.path.suffix}"
        )

    def _header(self, *, complete: bool) -> dict[str, str]:
        return {_COMPLETE: json.dumps(complete), _WEIGHTS: json.dumps(self._digests)}

    def _read(self, path: Path, *, lazily: bool) -> SavedStatistics | None:
        files = files_at(path)
        if not files:
            return None
        statistics = open_statistics(path) if lazily else CalibrationStatistics.load(path)
        if self._is_part and set(statistics) != set(self._targets):
            return None  # of groups for another memory limit
        source = f"`statistics_file` {path}"
        check_statistics(statistics, self._targets, self._needs, source=source)
        headers = [read_metadata(file) for file in files]
        for header in headers:  # a file that a user saved has no digests
            self._check_weights(json.loads(header.get(_WEIGHTS, "{}")), source)
        complete = index_path(path).exists() or headers[0].get(_COMPLETE) == json.dumps(True)
        return SavedStatistics(statistics, complete)

    def _check_weights(self, digests: Mapping[str, str], source: str) -> None:
        for name, digest in self._digests.items():
            if digests.get(name, digest) != digest:
                raise ValueError(
                    f"{source} has statistics of {name} with other weights, or in another dtype. Delete it, or give "
                    "another file; to use it anyway, set `config.statistics = CalibrationStatistics.load(...)` "
                    "instead of calling `calibrate`."
                )


def _weight_digest(module: nn.Module) -> str:
    """Return a digest of the first and the last row of a layer's weight, which any training changes."""
    with weight_loaded(module):
        weight = dense_weight(module)
        edges = torch.stack([weight[0], weight[-1]]).cpu()
    return sha256_of(f"{edges.dtype} {list(weight.shape)} ", bytes_of(edges))[:16]
