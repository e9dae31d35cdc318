"""Batches to calibrate on, from a data set of the Hub or from parquet files."""

import importlib.util
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from peft_jactus.cli.labels import label_reader

Task = Literal["causal-lm", "sequence-classification", "image-classification"]
Row = dict[str, Any]

_SHUFFLED_ROWS = 10_000  # rows are drawn from so many, as data sets can be sorted by class


@dataclass(frozen=True)
class DataOptions:
    """Which rows, and how they become batches.

    Attributes:
        dataset: Hub name, or ``None``.
        dataset_config: Configuration of that data set.
        data_dir: Directory of parquet files, or ``None``.
        split: Split of either.
        text_columns: One, or two for pairs.
        image_column: For image classification.
        label_column: For classification.
        batch_size: Rows of a batch; blocks of tokens for causal LMs.
        max_length: Tokens of a row or a block; ``None``: 512, or what the model can take.
    """

    dataset: str | None
    dataset_config: str | None
    data_dir: Path | None
    split: str
    text_columns: tuple[str, ...]
    image_column: str
    label_column: str
    batch_size: int
    max_length: int | None

    def check(self, task: Task) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ValueError: Saying which option to change.
        """
        if (self.dataset is None) == (self.data_dir is None):
            raise ValueError("Give calibration data: either --dataset or --data-dir; or set --data-free.")
        if self.data_dir is not None and self.dataset_config is not None:
            raise ValueError("--dataset-config is only for --dataset; leave it out.")
        if self.data_dir is not None and not any(self.data_dir.rglob("*.parquet")):
            raise ValueError(f"--data-dir {self.data_dir} has no *.parquet file in it.")
        if not 1 <= len(self.text_columns) <= (2 if task == "sequence-classification" else 1):
            raise ValueError(f"--text-column must be given once (twice for pairs of texts); got {self.text_columns}.")
        if importlib.util.find_spec("datasets") is None:
            raise ValueError("Reading calibration data needs the package `datasets`: pip install datasets.")

    def columns(self, task: Task) -> tuple[str, ...]:
        """Return the columns that a task reads."""
        if task == "causal-lm":
            return self.text_columns
        inputs = (self.image_column,) if task == "image-classification" else self.text_columns
        return (*inputs, self.label_column)


def open_rows(options: DataOptions, task: Task) -> Iterable[Row]:
    """Return shuffled rows, read as they are needed.

    Raises:
        ValueError: If there are none, or a column is not there.
    """
    from datasets import load_dataset  # type: ignore[import-untyped]

    source = {"path": "parquet", "data_dir": str(options.data_dir)} if options.data_dir else {"path": options.dataset}
    rows = load_dataset(**source, name=options.dataset_config, split=options.split, streaming=True)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"The split {options.split!r} has no rows.")
    missing = set(options.columns(task)) - set(first)
    if missing:
        raise ValueError(
            f"The data has no columns {sorted(missing)}; it has {sorted(first)}. Set --text-column, --label-column or "
            "--image-column."
        )
    shuffled: Iterable[Row] = rows.shuffle(seed=0, buffer_size=_SHUFFLED_ROWS)
    return shuffled


def make_batches(
    rows: Iterable[Row], task: Task, options: DataOptions, config: PreTrainedConfig, processor: Any
) -> Iterator[dict[str, Any]]:
    """Return batches as the model takes them, with labels.

    Args:
        rows: Of the data.
        task: What the model does.
        options: As for `open_rows`.
        config: Of the model.
        processor: Its tokenizer or image processor.

    Raises:
        ValueError: If rows cannot be made into batches for this model.
    """
    if task == "causal-lm":
        return causal_batches(rows, options, config, processor)
    if task == "sequence-classification" and processor.pad_token is None and options.batch_size > 1:
        raise ValueError("The tokenizer has no padding token; use --batch-size 1.")
    label_of = label_reader(config, options.label_column, _class_names(rows, options.label_column))
    inputs = image_inputs if task == "image-classification" else text_inputs
    return (
        {**inputs(group, options, config, processor), "labels": torch.tensor([label_of(row) for row in group])}
        for group in _groups(rows, options.batch_size)
    )


def causal_batches(
    rows: Iterable[Row], options: DataOptions, config: PreTrainedConfig, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """Yield blocks of tokens, cut from the texts one after the other, so that there is no padding."""
    texts = (row[options.text_columns[0]] for row in rows)
    blocks = _blocks(texts, tokenizer, longest_input(options, config, tokenizer))
    for group in _groups(blocks, options.batch_size):
        shortest = min(map(len, group))  # one block alone can be shorter
        ids = torch.tensor([block[:shortest] for block in group])
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _blocks(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    tokens: list[int] = []
    found = False
    for text in texts:
        if not text:  # WikiText has empty lines
            continue
        tokens += tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None and tokens and tokens[-1] != tokenizer.eos_token_id:
            tokens.append(tokenizer.eos_token_id)
        while len(tokens) >= length:
            found = True
            yield tokens[:length]
            tokens = tokens[length:]
    if not found and len(tokens) > 1:
        yield tokens


def text_inputs(rows: list[Row], options: DataOptions, config: PreTrainedConfig, tokenizer: Any) -> dict[str, Any]:
    """Return padded tokens of one or two texts a row."""
    texts = ([row[name] for row in rows] for name in options.text_columns)
    length = longest_input(options, config, tokenizer)
    return dict(tokenizer(*texts, truncation=True, max_length=length, padding=len(rows) > 1, return_tensors="pt"))


def image_inputs(rows: list[Row], options: DataOptions, config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
    """Return pixels."""
    del config
    return dict(processor([row[options.image_column].convert("RGB") for row in rows], return_tensors="pt"))


def longest_input(options: DataOptions, config: PreTrainedConfig, tokenizer: Any) -> int:
    """Return how many tokens the model gets at once, at most.

    Raises:
        ValueError: If more are asked for than the model has positions.
    """
    positions: int = min(getattr(config, "max_position_embeddings", None) or 10**9, tokenizer.model_max_length)
    if options.max_length is None:
        return min(512, positions)
    if options.max_length > positions:
        raise ValueError(f"--max-length must be at most {positions} for this model; got {options.max_length}.")
    return options.max_length


def _class_names(rows: Iterable[Row], column: str) -> list[str] | None:
    """Return what a data set calls its classes, if it holds their numbers and says so."""
    feature = (getattr(rows, "features", None) or {}).get(column)
    names: list[str] | None = getattr(feature, "names", None)  # a `datasets.ClassLabel` has them
    return names


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
