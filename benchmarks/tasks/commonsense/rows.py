"""Rows of seven commonsense sets, for lm-evaluation-harness and for training alike.

The prompts, and what is scored, are those of the harness's own tasks. BoolQ has no passage here. Of piqa, winogrande
and hellaswag only the validation split is to be had: four fifths of it, by a fixed seed, are for training. This file
imports nothing of `benchmarks`, since the harness loads it by its path.
"""

import os
from pathlib import Path

from datasets import DatasetDict, Features, List, Value, load_dataset

# Splits to train on and to score on; one split is cut.
SPLITS = {
    "arc_easy": ("train", "test"),
    "arc_challenge": ("train", "test"),
    "openbookqa": ("train", "test"),
    "boolq": ("train", "validation"),
    "piqa": ("validation",),
    "winogrande": ("validation",),
    "hellaswag": ("validation",),
}
FEATURES = Features(contexts=List(Value("string")), endings=List(Value("string")), label=Value("int64"))


def load(name, data_dir=None, **_):
    """Return rows to train on and to score on, shuffled by a fixed seed.

    A row has ``contexts`` and ``endings``, one of each for each choice, and the ``label`` of the right one. A choice
    is scored by the log-likelihood of its ending after its context and a space.
    """
    folder = Path(data_dir or os.environ.get("JACTUS_DATA", "../shared/data")) / name
    found = load_dataset("parquet", data_dir=str(folder))
    splits = [found[split].shuffle(seed=0) for split in SPLITS[name]]
    if len(splits) == 1:
        num_train = len(splits[0]) * 4 // 5
        splits = [splits[0].take(num_train), splits[0].skip(num_train)]
    convert = _WAYS.get(name, _question)
    train, test = (
        rows.map(convert, remove_columns=rows.column_names, features=FEATURES, load_from_cache_file=False)
        for rows in splits
    )
    return DatasetDict(train=train, test=test)


def _row(contexts, endings, label):
    return {"contexts": contexts, "endings": endings, "label": int(label)}


def _question(row):
    return _continued(row, f"Question: {row['question']}\nAnswer:")


def _yes_or_no(row):
    text = row["question"].rstrip("?")
    return _continued({**row, "choices": ["no", "yes"]}, f"Question: {text}?\nAnswer:")


def _continued(row, context=None):
    """Return the row with its choices after one context, by default the question as it stands."""
    choices = [choice.strip() for choice in row["choices"]]
    return _row([context or row["question"].strip()] * len(choices), choices, row["label"])


def _blank(row):
    """Return the row with the choices in the blank: what comes after it is scored (Trinh and Le, arXiv:1806.02847)."""
    before, after = row["question"].split("_", maxsplit=1)
    return _row([before + choice for choice in row["choices"]], [after.strip()] * 2, row["label"])


_WAYS = {"boolq": _yes_or_no, "openbookqa": _continued, "hellaswag": _continued, "winogrande": _blank}
