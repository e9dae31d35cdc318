"""Calibration statistics of linear layers: mergeable sums and their file format.

For each layer, over the calibration positions (tokens, patches) that the attention mask keeps:

    input covariance     C_x = 1/N sum_t x_t x_t^T   (in, in)
    gradient covariance  C_g = 1/N sum_t g_t g_t^T   (out, out),  g_t = d loss / d (W x_t + b)

both uncentred second moments, as in K-FAC (Martens & Grosse, arXiv:1503.05671). What is stored are sums
and counts, so that statistics of parts of the data add up to those of the whole.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_jactus.linalg import to_decomposition_dtype

FORMAT_VERSION = 2  # 1 had no sums of absolute values, and no Fisher information of rows
_SUMS = ("outer_sum", "vector_sum", "quartic_sum", "absolute_sum")
_ROW_FISHER = "row_fisher."  # and the layer's name: key of a statistics file


@dataclass
class SecondMoment:
    """Running sums of one vector variable of dimension ``dim``.

    Attributes:
        outer_sum: ``(dim, dim)``, sum of ``x x^T``.
        vector_sum: ``(dim,)``, sum of ``x``.
        quartic_sum: ``()``, float64, sum of ``|x|^4``; what the Ledoit-Wolf estimator needs beyond ``outer_sum``.
        absolute_sum: ``(dim,)``, sum of the absolute values of ``x``, entry by entry; what ASVD scales with.
        num_tokens: How many vectors were added.
    """

    outer_sum: Tensor
    vector_sum: Tensor
    quartic_sum: Tensor
    absolute_sum: Tensor
    num_tokens: int = 0

    @classmethod
    def zeros(
        cls,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> SecondMoment:
        """Return the statistics of no vector at all; sums are kept in ``dtype`` on ``device``."""
        quartic_dtype = dtype if torch.device(device or "cpu").type == "mps" else torch.float64
        return cls(
            outer_sum=torch.zeros(dim, dim, dtype=dtype, device=device),
            vector_sum=torch.zeros(dim, dtype=dtype, device=device),
            quartic_sum=torch.zeros((), dtype=quartic_dtype, device=device),
            absolute_sum=torch.zeros(dim, dtype=dtype, device=device),
        )

    @property
    def dim(self) -> int:
        """The dimension of the vectors."""
        return self.vector_sum.shape[0]

    @property
    def covariance(self) -> Tensor:
        """The uncentred covariance ``(dim, dim)``, float64."""
        return to_decomposition_dtype(self.outer_sum) / self.num_tokens

    @property
    def mean(self) -> Tensor:
        """The mean ``(dim,)``, float64."""
        return to_decomposition_dtype(self.vector_sum) / self.num_tokens

    @property
    def mean_absolute(self) -> Tensor:
        """The mean of the absolute values ``(dim,)``, float64."""
        return to_decomposition_dtype(self.absolute_sum) / self.num_tokens

    def update_(self, vectors: Tensor) -> None:
        """Add ``vectors`` ``(num_vectors, dim)``, in the precision of the sums."""
        vectors = vectors.detach().to(self.outer_sum.dtype)
        self.outer_sum.addmm_(vectors.mT, vectors)
        self.vector_sum.add_(vectors.sum(0))
        self.quartic_sum.add_(vectors.square().sum(1).to(self.quartic_sum.dtype).square().sum())
        self.absolute_sum.add_(vectors.abs().sum(0))
        self.num_tokens += vectors.shape[0]

    def merge_(self, other: SecondMoment) -> None:
        """Add the sums of ``other``, taken over other vectors of the same variable."""
        if other.dim != self.dim:
            raise ValueError(f"`other` must have dimension {self.dim}; got {other.dim}.")
        for name in _SUMS:
            mine = getattr(self, name)
            mine.add_(getattr(other, name).to(mine))
        self.num_tokens += other.num_tokens

    def to(self, device: torch.device) -> SecondMoment:
        """Return the sums on ``device``; these very ones if they are there already."""
        if self.outer_sum.device == device:
            return self
        sums = {name: getattr(self, name).to(device) for name in _SUMS}
        return SecondMoment(**sums, num_tokens=self.num_tokens)

    def clone(self) -> SecondMoment:
        """Return an independent copy."""
        sums = {name: getattr(self, name).clone() for name in _SUMS}
        return SecondMoment(**sums, num_tokens=self.num_tokens)

    def is_finite(self) -> bool:
        """Whether no sum has overflowed or met a NaN."""
        return all(bool(torch.isfinite(getattr(self, name)).all()) for name in _SUMS)

    def ledoit_wolf_shrinkage(self) -> float:
        """Return the shrinkage intensity towards a scaled identity, in [0, 1].

        For the uncentred covariance ``C`` of ``N`` vectors and ``mu = tr(C) / dim``:
        ``min(1, (sum_t |x_t|^4 / N - |C|_F^2) / (N |C - mu I|_F^2))``.

        References:
            Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
            J. Multivariate Analysis 88, 2004, with the mean taken as known (zero).
        """
        covariance = self.covariance
        mu = covariance.diagonal().mean()
        squared_norm = covariance.square().sum()
        spread = squared_norm - self.dim * mu.square()  # = |C - mu I|_F^2
        if not spread > 0:  # a multiple of the identity is its own target
            return 1.0
        noise = float(self.quartic_sum) / self.num_tokens - float(squared_norm)
        return min(1.0, max(0.0, noise / (self.num_tokens * float(spread))))


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one linear layer.

    Attributes:
        input: Sums of the layer's input vectors. Layers fed by the same tensor share this object.
        gradient: Sums of the gradient of the summed loss with respect to the layer's output vectors.
        row_fisher: ``(out,)``, sum over examples and over a row's entries of the squared gradient of the weight; only
            FWSVD asks for it, ``None`` otherwise.
    """

    input: SecondMoment
    gradient: SecondMoment
    row_fisher: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """How many positions (not calls, not batches) were counted."""
        return self.gradient.num_tokens

    def to(self, device: torch.device) -> LayerStatistics:
        """Return the statistics on ``device``."""
        row_fisher = None if self.row_fisher is None else self.row_fisher.to(device)
        return LayerStatistics(self.input.to(device), self.gradient.to(device), row_fisher)


class CalibrationStatistics(Mapping[str, LayerStatistics]):
    """Statistics by full module name, as `calibrate` returns them.

    Statistics of disjoint parts of the data add up (`merge`), and one safetensors file holds them
    (`save`, `load`), so that several runs, or several machines, can share the work.

    Args:
        layers: Statistics by full module name, without PEFT's ``base_model.model.`` prefix.
        num_batches: How many batches were seen.
    """

    def __init__(self, layers: Mapping[str, LayerStatistics], *, num_batches: int = 0) -> None:
        self._layers = dict(layers)
        self.num_batches = num_batches

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
        moments: dict[tuple[int, int], SecondMoment] = {}

        def merged(mine: SecondMoment, theirs: SecondMoment) -> SecondMoment:
            key = (id(mine), id(theirs))
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
            path: The file to write; its folder is made if need be.
            metadata: Further strings to store in the file's header.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        moments: dict[int, int] = {}
        tensors: dict[str, Tensor] = {}
        index: dict[str, list[int]] = {}
        counts: list[int] = []
        for name, layer in self.items():
            for moment in (layer.input, layer.gradient):
                if id(moment) not in moments:
                    number = moments[id(moment)] = len(counts)
                    counts.append(moment.num_tokens)
                    tensors |= {f"{number}.{key}": getattr(moment, key).cpu().contiguous() for key in _SUMS}
            index[name] = [moments[id(layer.input)], moments[id(layer.gradient)]]
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

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationStatistics:
        """Read what `save` wrote.

        Args:
            path: The safetensors file.

        Returns:
            Equal statistics, on the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or not a statistics file of this format version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No statistics file at {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format_version") != str(FORMAT_VERSION):
                    raise ValueError(
                        f"{path} is not a statistics file of format version {FORMAT_VERSION}; its header says "
                        f"{header.get('format_version')!r}. Calibrate again with this version of peft_jactus."
                    )
                num_batches = json.loads(header["num_batches"])
                counts = json.loads(header["num_tokens"])
                moments = [
                    SecondMoment(**{key: file.get_tensor(f"{number}.{key}") for key in _SUMS}, num_tokens=count)
                    for number, count in enumerate(counts)
                ]
                row_fisher = {key: file.get_tensor(key) for key in file.keys() if key.startswith(_ROW_FISHER)}  # noqa: SIM118  # not a mapping
                layers = {
                    name: LayerStatistics(moments[inputs], moments[gradients], row_fisher.get(_ROW_FISHER + name))
                    for name, (inputs, gradients) in json.loads(header["layers"]).items()
                }
        except (SafetensorError, KeyError, json.JSONDecodeError, IndexError) as error:
            raise ValueError(f"{path} is damaged ({error}). Delete it and calibrate again.") from error
        return cls(layers, num_batches=num_batches)


def _added(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    return None if mine is None or theirs is None else mine + theirs.to(mine)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the header strings of a statistics file without reading its tensors."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _replace_atomically(tensors: dict[str, Tensor], header: dict[str, str], path: Path) -> None:
    """Write beside ``path`` and rename: a reader sees the old file or the new one, never a torn one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
