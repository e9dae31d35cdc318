"""The file in which `calibrate` keeps what it has: to go on after an interruption, or to be used again."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peft_jactus._files import bytes_of, sha256_of
from peft_jactus._processes import gather_objects, num_processes, process_index
from peft_jactus.calibration.statistics import CalibrationStatistics, open_statistics
from peft_jactus.calibration.statistics_files import files_at, index_path, part_path, read_metadata
from peft_jactus.tuner.base_weights import quantization_of_tensor
from peft_jactus.tuner.model_size import other_parameters
from peft_jactus.tuner.planning import check_statistics
from peft_jactus.tuner.targeting import dense_weight, weight_loaded

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from peft_jactus.numerics.moments import StatisticsNeeds

logger = logging.getLogger(__name__)

# Keys of a file's header.
_COMPLETE = "complete"
_WEIGHTS = "weights"
_OTHERS = "other_weights"
_MOST_NAMED = 4  # parameters
# Numbers of a parameter that its digest is made of, spread over it.
_SAMPLE = 4096


@dataclass(frozen=True)
class SavedStatistics:
    """What a file holds, whether it is of all batches, and what else in the model has changed since."""

    statistics: CalibrationStatistics
    complete: bool
    changed: tuple[str, ...] = ()


def of_these_batches(saved: SavedStatistics | None, own: int, total: int) -> SavedStatistics | None:
    """Return what was saved if it is of the batches of this run, complete or the first ones; else None.

    Args:
        saved: What a file has.
        own: Number of batches of this process.
        total: Of all processes, as complete statistics have.
    """
    if saved is None:
        return None
    found = saved.statistics.num_batches
    if saved.complete and found != total:
        return replace(saved, complete=False) if found < own == total else None
    return saved if saved.complete or found <= own else None


def warn_of_changes(saved: SavedStatistics | None, path: str | os.PathLike[str] | None) -> None:
    """Log what else in the model has changed since statistics were saved."""
    if saved is not None and saved.changed:
        named, others = saved.changed[-_MOST_NAMED:], len(saved.changed) - _MOST_NAMED
        logger.warning(
            "`statistics_file` %s: when it was written, the model had other values in %s%s. A new head needs a seed "
            "before the model is loaded. To calibrate this model from the beginning, delete the file.",
            path,
            ", ".join(named),
            f" and {others} more" if others > 0 else "",
        )


def warn_of_complete(saved: SavedStatistics, files: Iterable[Path], *, of: str = "") -> None:
    """Log that no batch is read, and which files to delete for another calibration."""
    logger.warning(
        "No batch is read%s: the statistics of %d batches are complete. If the data have changed since, delete %s.",
        of,
        saved.statistics.num_batches,
        ", ".join(map(str, files)),
    )


class StatisticsStore:
    """Statistics of some layers at a path, with digests of the weights, since they are of no other.

    In several processes each has a file of its own until its statistics are part of what is at the path.

    Args:
        path: Of the safetensors file.
        targets: The layers by full module name, adapted or not.
        needs: What the statistics have to hold.
        digests: Of the weights of all targeted layers. Default: of ``targets``.
        others: Digests of all other parameters, by name: a new head, for instance, may differ from run to run.
    """

    def __init__(
        self,
        path: Path,
        targets: Mapping[str, nn.Module],
        needs: StatisticsNeeds,
        *,
        digests: Mapping[str, str] | None = None,
        others: Mapping[str, str] | None = None,
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
        self._others = others or {}

    @classmethod
    def of_model(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        targets: Mapping[str, nn.Module],
        needs: StatisticsNeeds,
    ) -> StatisticsStore:
        """Return a store that also knows the other parameters of a model as they are now, before a warm-up."""
        return cls(Path(path), targets, needs, others=_digests_of_others(model, targets))

    def part(self, targets: Mapping[str, nn.Module], number: int, count: int) -> StatisticsStore:
        """Return the store of a group of the layers, ``number`` of ``count``, counted from 1."""
        path = part_path(self.path, number, count)
        # A change of one layer changes what others see, so each part has all digests.
        store = StatisticsStore(path, targets, self._needs, digests=self._digests, others=self._others)
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
        digests = {_WEIGHTS: json.dumps(self._digests), _OTHERS: json.dumps(self._others)}
        return {_COMPLETE: json.dumps(complete), **digests}

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
        others = json.loads(headers[0].get(_OTHERS, "{}"))
        changed = tuple(name for name, digest in self._others.items() if others.get(name, digest) != digest)
        return SavedStatistics(statistics, complete, changed)

    def _check_weights(self, digests: Mapping[str, str], source: str) -> None:
        for name, digest in self._digests.items():
            if digests.get(name, digest) != digest:
                raise ValueError(
                    f"{source} has statistics of {name} with other weights, or in another dtype. Delete it, or give "
                    "another file; to use it anyway, set `config.statistics = CalibrationStatistics.load(...)` "
                    "instead of calling `calibrate`."
                )


def _digests_of_others(model: nn.Module, targets: Iterable[str]) -> dict[str, str]:
    """Return digests of the parameters that are no weights of ``targets`` or parts of our adapters, by name."""
    return {
        name: _sample_digest(parameter)
        for name, parameter in other_parameters(model, targets)
        if _has_numbers(parameter)
    }


def _has_numbers(parameter: Tensor) -> bool:
    """Whether numbers can be taken out of a parameter: it is here, whole, and not packed by a library."""
    return not parameter.is_meta and type(parameter.data) is torch.Tensor and quantization_of_tensor(parameter) is None


@torch.no_grad()
def _sample_digest(parameter: Tensor) -> str:
    numbers = parameter.reshape(-1)[:: max(1, parameter.numel() // _SAMPLE)].cpu()
    return sha256_of(f"{numbers.dtype} {list(parameter.shape)} ", bytes_of(numbers))[:16]


def _weight_digest(module: nn.Module) -> str:
    """Return a digest of the first and the last row of a layer's weight, which any training changes."""
    with weight_loaded(module):
        weight = dense_weight(module)
        edges = torch.stack([weight[0], weight[-1]]).cpu()
    return sha256_of(f"{edges.dtype} {list(weight.shape)} ", bytes_of(edges))[:16]
