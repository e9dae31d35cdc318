"""Ranks of all targeted layers, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from peft_jactus.numerics.allocation import DENSE, factor_parameters

if TYPE_CHECKING:
    from peft_jactus.numerics.allocation import Storage


@dataclass(frozen=True)
class LayerRank:
    """One row of a `RankSummary`.

    Attributes:
        name: Full module name.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        rank: Rank of the layer; full where it stays dense.
        storage: How it is stored when deployed: ``"factored"``, ``"pivoted"`` or ``"dense"``.
        energy_kept: Share of the weighted energy that is kept, in [0, 1]; ``None`` if it is not known.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    storage: str
    energy_kept: float | None

    @property
    def num_dense(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features

    @property
    def num_stored(self) -> int:
        """Parameters that the deployed layer stores; with a router, factors can have more than the weight."""
        if self.stays_dense:
            return self.num_dense
        return factor_parameters(self.rank, self.out_features, self.in_features, cast("Storage", self.storage))

    @property
    def stays_dense(self) -> bool:
        """Whether factors would not be smaller, so that the layer is deployed as one weight."""
        return self.storage == DENSE


@dataclass(frozen=True)
class RankSummary:
    """Ranks of all targeted layers; prints as a table.

    Attributes:
        rows: One for each targeted layer, in the model's order.
        asked_ratio: ``retained_ratio`` of the config; ``None`` if it is not known.
        other_parameters: Parameters of the rest of the model, which stays as it is (embeddings, norms, heads,
            experts); ``None`` if it is not known.
        shared_parameters: How many of these the compressed model has twice, and the dense one once: those of a head
            that is its embedding, if the head is compressed or trained whole.
        router_parameters: Numbers of the router, which the dense model does not have; 0 without one.
    """

    rows: list[LayerRank]
    asked_ratio: float | None
    other_parameters: int | None = None
    shared_parameters: int = 0
    router_parameters: int = 0

    @property
    def storage(self) -> str:
        """Form of most factorised layers."""
        forms = [row.storage for row in self.rows if not row.stays_dense]
        return max(set(forms), key=forms.count) if forms else DENSE

    @property
    def retained_ratio(self) -> float:
        """Share of the targeted layers' parameters that is kept."""
        return sum(row.num_stored for row in self.rows) / sum(row.num_dense for row in self.rows)

    @property
    def model_ratio(self) -> float | None:
        """Parameters of the whole model over those of the dense one; ``None`` if they are not known."""
        if self.other_parameters is None:
            return None
        stored = sum(row.num_stored for row in self.rows)
        dense = sum(row.num_dense for row in self.rows) - self.shared_parameters
        return (self.other_parameters + stored + self.router_parameters) / (self.other_parameters + dense)

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.name) for row in self.rows))
        lines = [f"{'layer':<{width}}  {'shape':>13}  {'rank':>5}  {'kept':>6}  {'energy':>7}"]
        for row in self.rows:
            energy = "" if row.energy_kept is None else f"{row.energy_kept:.4f}"
            lines.append(
                f"{row.name:<{width}}  {f'{row.out_features} x {row.in_features}':>13}  "
                f"{'dense' if row.stays_dense else row.rank:>5}  {row.num_stored / row.num_dense:>6.1%}  {energy:>7}"
            )
        stored, dense = (
            sum(row.num_stored for row in self.rows),
            sum(row.num_dense for row in self.rows),
        )
        lines.append(
            f"{len(self.rows)} targeted layers keep {stored:,} of {dense:,} parameters: {self.retained_ratio:.1%} "
            f"({self.storage})" + ("" if self.asked_ratio is None else f", asked for {self.asked_ratio:.1%}")
        )
        if self.router_parameters:
            lines.append(f"The router has {self.router_parameters:,} parameters, which the dense model does not have.")
        if self.other_parameters is not None:
            lines.append(
                f"The whole model keeps {self.other_parameters + stored + self.router_parameters:,} of "
                f"{self.other_parameters + dense - self.shared_parameters:,}: {self.model_ratio:.1%}"
            )
        return "\n".join(lines)
