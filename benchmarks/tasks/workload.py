"""What is trained on what, and how rows are split and scored."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from sklearn.metrics import matthews_corrcoef
from torch import nn
from torch.utils.data import DataLoader


@dataclass(frozen=True, eq=False)
class Workload:
    """What is trained on what; equal to itself only.

    Attributes:
        train: Rows to train on.
        test: Rows to score on.
        collator: Makes a batch of rows.
        make_model: Returns the pretrained model, with a fresh head if it needs one.
        score: Figures of an evaluation, from the Trainer's prediction.
        task_type: PEFT's name of the task, or ``None``.
        head: Name of the fresh head, which trains whole; or ``None``.
        constant_loss: Of predicting how frequent each label is, whatever the row; ``None`` if there are no labels.
        score_model: Further figures, from the trained model.
        batch_size: Rows in a training batch.
        eval_batch_size: Rows in a batch that is scored.
        training_arguments: Further ones of the Trainer.
        num_calibration_batches: Of the training batch's size.
        statistics_files: Start of the names of files of statistics, which all compressed rows of a seed share, of
            any decomposition; ``None``: each row has its own calibration.
    """

    train: Dataset
    test: Dataset
    collator: Callable
    make_model: Callable[[], nn.Module]
    score: Callable | None
    task_type: str | None
    head: str | None
    constant_loss: float | None = None
    score_model: Callable[[nn.Module], dict] | None = None
    batch_size: int = 16
    eval_batch_size: int = 128
    training_arguments: dict = field(default_factory=dict)
    num_calibration_batches: int = 16
    statistics_files: str | None = None

    @property
    def modules_to_save(self):
        """What PEFT has to be told to train whole; of a classifier of texts it knows."""
        return [self.head] if self.head is not None and self.task_type is None else None

    def calibration_batches(self):
        """Return the rows of the first batches of a shuffled pass over the training rows.

        Without a head, which is warmed up on them, they are of like lengths where those of the training are. That is
        less padding for the same statistics.
        """
        loader = DataLoader(self.train, self.batch_size, shuffle=True, collate_fn=list)
        batches = [rows for rows, _ in zip(loader, range(self.num_calibration_batches), strict=False)]
        by_length = self.training_arguments.get("train_sampling_strategy") == "group_by_length"
        if by_length and self.head is None:
            rows = sorted(itertools.chain.from_iterable(batches), key=lambda row: len(row["input_ids"]))
            batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return [self.collator(rows) for rows in batches]


def split_rows(data, *, num_rows, scored_on, max_test_rows=1000):
    """Return rows to train on, and rows to score on: of the test split, or training rows that are not trained on."""
    train, test = data["train"].shuffle(seed=0), data["test"]
    num_rows = min(num_rows, len(train) if scored_on == "test" else len(train) * 4 // 5)
    if scored_on == "held-out":
        test = train.select(range(num_rows, len(train)))
    test = test.shuffle(seed=0)
    return train.select(range(num_rows)), test.select(range(min(max_test_rows, len(test))))


def label_entropy(labels):
    """Return the loss of predicting how frequent each label is."""
    shares = np.unique(np.asarray(labels), return_counts=True)[1] / len(labels)
    return float(-(shares * np.log(shares)).sum())


def classification_metrics(prediction):
    """Return accuracy and Matthews correlation (of several classes, too), the metrics of GLUE."""
    predicted, labels = prediction.predictions.argmax(-1), prediction.label_ids
    return {
        "accuracy": float(np.mean(predicted == labels)),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }
