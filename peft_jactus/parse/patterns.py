"""A choice of experts with the factors it needs (*expert memory aggregation*), and batches of several of them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from peft_jactus.parse.kernels import low_rank_product
from peft_jactus.parse.layer import ActiveExperts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from peft_jactus.parse.experts import ExpertTable
    from peft_jactus.parse.layer import PartsState, RoutedLinear

# With fewer vectors for each pattern, a product with its factors takes about as long as reading them.
_VECTORS_A_PATTERN = 64


class ExpertPattern:
    """One choice of experts for all layers, with the chosen factors of each layer in one piece of memory.

    Factors that are in one piece already are not copied.

    A layer whose parts are not plain, are offloaded, or train, runs all its terms, those that were not chosen times
    zero: the same result, no gain in speed.

    Args:
        selected: ``(experts,)``, bool, on the CPU.
        table: The experts.
        layers: The routed layers, in the order of the table.

    Attributes:
        selected: As given.
        digest: Equal for equal choices.
        num_terms: By layer, how many terms run.
        num_bytes: Memory of the copies.
    """

    def __init__(self, selected: Tensor, table: ExpertTable, layers: Sequence[RoutedLinear]) -> None:
        self.selected = selected
        self.digest = selected.numpy().tobytes()
        self.num_terms: list[int] = []
        self._terms: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._factors: list[tuple[PartsState, Tensor, Tensor] | None] = [None] * len(layers)
        for layer in layers:
            terms = table.term_index(layer.position, selected)
            gates = table.term_gates(layer.position, selected.unsqueeze(0))
            self.num_terms.append(len(terms))
            self._terms.append(terms)
            self._gates.append(gates if layer.weight.is_meta else gates.to(layer.weight.device))
            if len(terms) < layer.rank:
                self._factors_of(layer)
        factors = [factor for kept in self._factors if kept is not None for factor in kept[1:]]
        self.num_bytes = sum(factor.nbytes for factor in factors if factor.untyped_storage().nbytes() == factor.nbytes)

    def _factors_of(self, layer: RoutedLinear) -> tuple[Tensor, Tensor] | None:
        """Return the chosen factors of a layer as it is now, and keep them; ``None`` if its parts are not plain."""
        state = layer.parts_state
        if state is None:
            return None
        kept = self._factors[layer.position]
        if kept is None or kept[0] != state:
            # A copy that was made in inference mode could be used in no other.
            with torch.inference_mode(False), torch.no_grad():
                kept = (state, *layer.gather(self._terms[layer.position]))
            self._factors[layer.position] = kept
        return kept[1:]

    def gates(self, layer: RoutedLinear) -> Tensor:
        """Return ``(1, rank)``, bool: which terms of a layer run."""
        return self._gates[layer.position]

    def apply(self, layer: RoutedLinear, x: Tensor) -> Tensor:
        """Return the output of ``layer`` for ``(..., in)``, with the chosen terms."""
        if self.num_terms[layer.position] == layer.rank:
            return layer.run_all(x)
        factors = None if layer.needs_gradients else self._factors_of(layer)
        if factors is not None:
            return low_rank_product(x, *factors, layer.up.bias)
        return layer.gated(x, self.gates(layer))


class PatternBatch(ActiveExperts):
    """The patterns of a batch; rows with the same one run together.

    Args:
        patterns: One for each row.
    """

    def __init__(self, patterns: Sequence[ExpertPattern]) -> None:
        self.patterns = tuple(patterns)
        rows: dict[bytes, list[int]] = defaultdict(list)
        for row, pattern in enumerate(self.patterns):
            rows[pattern.digest].append(row)
        self._groups = [(self.patterns[members[0]], torch.tensor(members)) for members in rows.values()]
        self._places = torch.cat([members for _, members in self._groups]).argsort()

    def apply(self, layer: RoutedLinear, x: Tensor) -> Tensor:
        """Return the output of ``layer`` for ``(batch, ..., in)``, each row as it would be alone."""
        if len(self._groups) == 1:
            return self._groups[0][0].apply(layer, x)
        rows = by_row(x, len(self.patterns))
        if self._reads_less_as_gates(layer, rows):
            gates = torch.cat([pattern.gates(layer) for pattern in self.patterns])
            output = layer.gated(rows, gates)
        else:
            outputs = [pattern.apply(layer, rows[members.to(x.device)]) for pattern, members in self._groups]
            output = torch.cat(outputs)[self._places.to(x.device)]
        return output.reshape(*x.shape[:-1], layer.out_features)

    def _reads_less_as_gates(self, layer: RoutedLinear, rows: Tensor) -> bool:
        """Whether the patterns' factors have more terms than the layer, for too few vectors to be worth it."""
        num_vectors = rows.numel() // rows.shape[-1]
        num_terms = sum(pattern.num_terms[layer.position] for pattern, _ in self._groups)
        return num_terms > layer.rank and num_vectors < _VECTORS_A_PATTERN * len(self._groups)

    def selected(self, rows: Sequence[int]) -> PatternBatch:
        """Return the patterns of these rows, in their order."""
        return PatternBatch([self.patterns[row] for row in rows])


class GateBatch(ActiveExperts):
    """Gates of any value for the rows of a batch: what a router is trained with.

    Args:
        gates: ``(batch, experts)``.
        table: The experts.
    """

    def __init__(self, gates: Tensor, table: ExpertTable) -> None:
        self._gates = gates
        self._table = table

    def apply(self, layer: RoutedLinear, x: Tensor) -> Tensor:
        """Return the output of ``layer`` with each term times its gate; runs all terms."""
        gates = self._table.term_gates(layer.position, self._gates)
        output = layer.gated(by_row(x, len(gates)), gates)
        return output.reshape(*x.shape[:-1], layer.out_features)


def by_row(x: Tensor, num_rows: int) -> Tensor:
    """Return ``x`` with the rows of the batch as its first dimension: some layers get all positions in one.

    Raises:
        ValueError: If they cannot be told apart.
    """
    if len(x) == num_rows:
        return x
    if x.dim() != 2 or len(x) % num_rows:
        raise ValueError(
            f"a routed layer got an input {tuple(x.shape)}, which is not split into the {num_rows} rows of the batch. "
            "Compress the model with this layer in `exclude_modules`."
        )
    return x.reshape(num_rows, -1, x.shape[-1])
