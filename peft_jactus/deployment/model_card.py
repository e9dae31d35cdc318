"""The README.md of a compressed checkpoint, and what that of an adapter says about loading."""

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

_TAG = "peft-jactus"
_IMPORT = "import peft_jactus  # pip install peft-jactus"
_PLACE = "path/or/name/of/this/repository"
_WITHOUT_IMPORT = (
    "Without the import, transformers warns of an `Unknown quantization type` and stops at the sizes of the weights; "
    "with `ignore_mismatched_sizes=True`, it gives these layers random weights. For tools that cannot import a "
    f"package (`lm_eval`, `vllm serve`), `peft-jactus export {_PLACE} dense --dense` writes plain layers, at the size "
    "of the base model."
)
_FEW_BITS = (
    "Their weights take {bits} bits per number, plus one scale for each group of 64 consecutive numbers; a group may "
    "continue in the next row. These weights cannot be trained; LoRA on top of them can."
)
_ADAPTER_LOADING = f"""
## Load it

```python
{_IMPORT}; tells PEFT about the method
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{_PLACE}")
```

Without the import PEFT stops with `KeyError: 'JACTUS'`. `peft-jactus export {_PLACE} compressed` writes the smaller
model, which runs without the base model; with `--dense`, plain layers for tools that cannot import a package
(`lm_eval`, `vllm serve`).
"""


def write_model_card(
    folder: Path,
    config: PreTrainedConfig,
    summary: RankSummary,
    *,
    metrics: Mapping[str, float] | None,
    datasets: str | list[str] | None,
    plot: str | None,
    pipeline_class: type | None,
) -> None:
    """Write ``folder/README.md``: what the model is, what was kept, how to load it.

    Args:
        folder: The checkpoint.
        config: Of the compressed model.
        summary: Its ranks.
        metrics: Figures to show.
        datasets: Hub names of the training data.
        plot: File name of the plot of the ranks, if there is one.
        pipeline_class: The class of sentence-transformers that the checkpoint is of, if it is.
    """
    compression: CompressionConfig = config.quantization_config
    base_model = compression.base_model
    data = ModelCardData(
        base_model=base_model if base_model and "/" in base_model else None,  # the Hub refuses other names
        datasets=datasets,
        library_name="transformers" if pipeline_class is None else "sentence-transformers",
        tags=[_TAG, "low-rank", "compressed"],
    )
    architecture = (config.architectures or ["AutoModel"])[0]
    library, loading = "transformers", f"{architecture}.from_pretrained"
    bits = next((form.bits for form in compression.layers.values()), None)
    if pipeline_class is not None:
        library, loading = "sentence_transformers", pipeline_class.__name__
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# Compressed {base_model or architecture}",
        f"{'A model' if base_model is None else f'`{base_model}`'} whose linear layers are low-rank, made with "
        "[peft-jactus](https://pypi.org/project/peft-jactus/): it is smaller on disk and in memory, and runs "
        "without the base model.",
        "## Load it",
        f"```python\n{_import(bits)}; tells transformers about the layers\n"
        f"from {library} import {loading.partition('.')[0]}\n\n"
        f'model = {loading}("{_PLACE}")\n```',
        _WITHOUT_IMPORT,
        "## What was kept",
        _kept(summary),
        *([_FEW_BITS.format(bits=bits)] if bits is not None else []),
        *([f"![Ranks by block]({plot})"] if plot else []),
        *(["## Results", _table(metrics)] if metrics else []),
        "## All layers",
        f"```\n{summary}\n```",
    ]
    ModelCard("\n\n".join(sections) + "\n").save(folder / "README.md")


def _import(bits: int | None) -> str:
    return f"{_IMPORT} bitsandbytes" if bits == 4 else _IMPORT


def add_adapter_loading(path: Path) -> None:
    """Say in the model card of an adapter how to load it, unless it does.

    Args:
        path: The card that PEFT wrote.
    """
    card = ModelCard.load(path)
    if "import peft_jactus" not in card.text:
        lines = card.text.splitlines()
        heading = next((number for number, line in enumerate(lines) if line.startswith("# ")), -1)
        lines[heading + 1 : heading + 1] = _ADAPTER_LOADING.splitlines()
        card.text = "\n".join(lines)
    card.data.tags = sorted({*(card.data.tags or []), _TAG})
    card.save(path)


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
