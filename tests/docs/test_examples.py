"""Examples evaluate on the rows that their README names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tests.support.compressed_models import VOCABULARY, tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
PROMPT = "### Instruction:\n{}\n\n### Response:\n"
OPTIONS = {
    "causal_lm": ["--max-train-samples", "8", "--batch-size", "4"],
    "ranks_by_prompt": ["--length", "16", "--sequences", "16", "--expert-size", "2"],
}


def text(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def loss_of_the_only_row(model, name):
    """Return the loss of a token of the validation rows, which are all the same."""
    tokenizer = tiny_tokenizer()
    asked = tokenizer(PROMPT.format(text(*range(2, 9))))["input_ids"] if name == "causal_lm" else []
    answer = tokenizer(text(*range(20, 36)))["input_ids"] + ([1] if name == "causal_lm" else [])
    ids = torch.tensor([asked + answer])
    labels = torch.tensor([[-100] * len(asked) + answer])
    with torch.no_grad():
        return float(model.eval()(ids, labels=labels).loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_validation_file_is_evaluated_on_where_there_is_no_test_file(name, tmp_path):
    model = tiny_llama()
    for saved in (model, tiny_tokenizer()):
        saved.save_pretrained(tmp_path / "model")
    numbers = torch.randint(2, VOCABULARY, (160, 16), generator=torch.Generator().manual_seed(0)).tolist()
    rows = {
        "train": [{"text": text(*row), "question": text(*row[:5]), "answer": text(*row[5:])} for row in numbers],
        "validation": 6
        * [{"text": text(*range(20, 36)), "question": text(*range(2, 9)), "answer": text(*range(20, 36))}],
    }
    (tmp_path / "data").mkdir()
    for split, of_split in rows.items():
        Dataset.from_list(of_split).to_parquet(tmp_path / "data" / f"{split}.parquet")
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "--model", tmp_path / "model", *OPTIONS[name]]
    command += ["--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    losses = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["losses"]
    assert losses["dense"] == pytest.approx(loss_of_the_only_row(model, name), rel=1e-5)
