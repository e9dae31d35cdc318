"""The commonsense task: a real Llama on one joint training set of seven sets, as LLM-Adapters has it.

A row is a context and its right ending, and the loss is that of the ending: what the scores compare. LLM-Adapters'
prompt lists the choices, and asks for a number; models as small as this one choose numbers by chance.
"""

from pathlib import Path

import torch
from datasets import concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from benchmarks.tasks.commonsense.rows import SPLITS, load
from benchmarks.tasks.commonsense.scoring import evaluate
from benchmarks.tasks.language import SMOLLM2
from benchmarks.tasks.workload import Workload, split_rows

MAX_LENGTH = 256
NUM_QUESTIONS = 300  # of each set
MAX_TEST_ROWS = 400
# Calibration has half of the training rows, and no more than this. At 0.6, after 256 rows instead of 800 (9,000 tokens
# instead of 28,000) the loss before training is 0.17 higher.
MAX_CALIBRATION_ROWS = 1600


def load_workload(data_dir, task, *, num_rows, scored_on):
    """Return rows of all sets, mixed as they come; ``task`` is the only one. Held-out rows have no accuracy."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sets = [load(name, data_dir) for name in SPLITS]
    joint = {split: concatenate_datasets([rows[split] for rows in sets]) for split in ("train", "test")}
    train, test = split_rows(joint, num_rows=num_rows, scored_on=scored_on, max_test_rows=MAX_TEST_ROWS)

    def encode(row):
        context = tokenizer(row["contexts"][row["label"]])["input_ids"]
        ending = tokenizer(" " + row["endings"][row["label"]])["input_ids"]
        ids = (context + ending)[:MAX_LENGTH]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": ([-100] * len(context) + ending)[:MAX_LENGTH],
        }

    train, test = (
        rows.map(encode, remove_columns=rows.column_names, load_from_cache_file=False) for rows in (train, test)
    )
    calibration_rows = min(len(train) // 2, MAX_CALIBRATION_ROWS)
    return Workload(
        train,
        test,
        DataCollatorForSeq2Seq(tokenizer),
        lambda: AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32),
        None,
        task_type="CAUSAL_LM",
        head=None,
        score_model=None if scored_on == "held-out" else lambda model: scores(model, tokenizer, data_dir),
        eval_batch_size=32,
        training_arguments={"train_sampling_strategy": "group_by_length"},
        num_calibration_batches=calibration_rows // Workload.batch_size,
        statistics_files=f"{SMOLLM2}/commonsense-{scored_on}-{num_rows}-{calibration_rows}",
    )


def scores(model, tokenizer, data_dir):
    """Return the mean accuracy of the sets, from 0 to 1, and those of each."""
    found = evaluate(model.eval(), tokenizer, Path(data_dir), num_questions=NUM_QUESTIONS)
    return {"accuracy": found["accuracy"] / 100, "sets": found["sets"]}
