"""The README.md of a compressed checkpoint."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

    from peft_jactus.deployment.config import CompressionConfig
    from peft_jactus.tuner.rank_table import RankSummary


def write_model_card(
    folder: Path,
    config: PreTrainedConfig,
    summary: RankSummary,
    *,
    metrics: Mapping[str, float] | None,
    datasets: str | list[str] | None,
    plot: str | None,
) -> None:
    """Write ``folder/README.md``: what the model is, what was kept, how to load it.

    Args:
        folder: The checkpoint.
        config: Of the compressed model.
        summary: Its ranks.
        metrics: Figures to show.
        datasets: Hub names of the training data.
        plot: File name of the plot of the ranks, if there is one.
    """
    compression: CompressionConfig = config.quantization_config
    base_model = compression.base_model
    data = ModelCardData(
        base_model=base_model if base_model and "/" in base_model else None,  # the Hub refuses other names
        datasets=datasets,
        library_name="transformers",
        tags=["peft-jactus", "low-rank", "compressed"],
    )
    architecture = (config.architectures or ["AutoModel"])[0]
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# Compressed {base_model or architecture}",
        f"{'A model' if base_model is None else f'`{base_model}`'} whose linear layers are low-rank, made with "
        "[peft-jactus](https://pypi.org/project/peft-jactus/): it is smaller on disk and in memory, and runs "
        "without the base model.",
        "## Load it",
        f"```python\nimport peft_jactus  # pip install peft-jactus; tells transformers about the layers\n"
        f"from transformers import {architecture}\n\n"
        f'model = {architecture}.from_pretrained("path/or/name/of/this/repository")\n```',
        "## What was kept",
        _kept(summary),
        *([f"![Ranks by block]({plot})"] if plot else []),
        *(["## Results", _table(metrics)] if metrics else []),
        "## All layers",
        f"```\n{summary}\n```",
    ]
    ModelCard("\n\n".join(sections) + "\n").save(folder / "README.md")


def _kept(summary: RankSummary) -> str:
    asked = "" if summary.asked_ratio is None else f" (asked for {summary.asked_ratio:.1%})"
    whole = "" if summary.model_ratio is None else f", the whole model {summary.model_ratio:.1%}"
    return (
        f"{len(summary.rows)} linear layers keep {summary.retained_ratio:.1%} of their parameters{asked}{whole}; "
        f"{sum(row.stays_dense for row in summary.rows)} of them stay dense, because factors would not pay."
    )


def _table(metrics: Mapping[str, float]) -> str:
    lines = ["| metric | value |", "|---|---|"]
    lines += [f"| {name} | {_formatted(value)} |" for name, value in metrics.items()]
    return "\n".join(lines)


def _formatted(value: Any) -> str:
    """Return a figure to four digits, anything else that an evaluation returns as it is."""
    return f"{value:.4g}" if isinstance(value, Real) else str(value)
