"""The comparison of methods (benchmarks/), in miniature: so that the harness can't rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from tests.compressed_models import VOCABULARY
from tests.tiny_tokenizer import tiny_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
METHODS = ["full", "dora", "jactus pivoted 0.6", "svd-llm+lora 0.6"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["even", "odd"])})
    for task in ("trec", "mr"):
        (folder / task).mkdir()
        rows = [{"text": f"w{2 + i} w{95 - i} w{2 + i % 7}", "label": i % 2} for i in range(64)]
        splits = DatasetDict(train=Dataset.from_list(rows, features), test=Dataset.from_list(rows[:16], features))
        for name, split in splits.items():
            split.to_parquet(folder / task / f"{name}.parquet")
    return folder


def run(script, *arguments, model_dir):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    environment = {**os.environ, "JACTUS_MINILM": str(model_dir)}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_methods_are_compared_on_the_same_rows_and_a_finished_case_is_skipped(model_dir, data_dir, tmp_path):
    out = tmp_path / "text"
    out.mkdir()
    rates = dict.fromkeys(["full", "lora", "dora", "pissa", "jactus", "svd+lora", "svd-llm+lora"], 1e-3)
    (out / "learning_rates.json").write_text(json.dumps({"learning_rates": rates}))
    options = ["--data-dir", data_dir, "--tasks", "trec", "--seeds", 0, "--rows", 48, "--epochs", 1, "--out", tmp_path]
    run("compare.py", "run", "text", *options, "--methods", *METHODS, model_dir=model_dir)
    files = sorted(out.glob("trec_*.json"))
    results = {result["label"]: result for result in map(json.loads, map(Path.read_text, files))}
    assert set(results) == set(METHODS)
    assert {result["num_train_rows"] for result in results.values()} == {48}
    assert results["jactus pivoted 0.6"]["retained_ratio_reached"] == pytest.approx(0.6, abs=0.02)
    assert results["full"]["trainable_parameters"] > results["jactus pivoted 0.6"]["trainable_parameters"]

    files[0].write_text(files[0].read_text().replace('"accuracy": ', '"accuracy": 0.123, "was": '))
    run("compare.py", "run", "text", *options, "--methods", *METHODS, model_dir=model_dir)
    assert json.loads(files[0].read_text())["accuracy"] == 0.123
    table = run("compare.py", "report", "text", "--out", tmp_path, model_dir=model_dir)
    assert all(f"| {method} |" in table for method in METHODS)
    assert (tmp_path / "text.md").read_text() == table
    assert (tmp_path / "text.png").read_bytes()[:4] == b"\x89PNG"


def test_the_loss_right_after_compression_is_measured_for_each_decomposition(model_dir, data_dir, tmp_path):
    out = tmp_path / "compression_loss"
    options = ["--data-dir", data_dir, "--tasks", "mr", "--seeds", 0, "--rows", 48, "--out", out]
    run("compression_loss.py", *options, model_dir=model_dir)
    rows = json.loads((out / "mr_seed0.json").read_text())["rows"]
    assert len(rows) == 1 + 6 * 3 * 2 * 2
    table = run("compression_loss.py", "--report", "--out", out, model_dir=model_dir)
    assert table.count("| jactus |") == 3
