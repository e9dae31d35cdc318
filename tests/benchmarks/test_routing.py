"""The benchmark of routed models (benchmarks/), in miniature: so that the harness can't rot."""

import json
import random

import pytest
from datasets import Dataset

from benchmarks.parse import routing
from benchmarks.pretrain import language as pretraining

COLUMNS = {"novels": "text", "ptb": "sentence", "wikitext2": "text", "ag_news": "text", "gsm8k": "question"}


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    words = random.Random(0)
    for corpus, column in COLUMNS.items():
        (folder / corpus).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = [
                {column: " ".join(words.choices(["one", "two", "three", "four", corpus], k=400))} for _ in range(40)
            ]
            Dataset.from_list(rows).to_parquet(folder / corpus / f"{split}.parquet")
    return folder


def test_a_router_is_trained_on_a_pretrained_model_and_reported(run_study, data_dir, tmp_path):
    model, out = tmp_path / "model", tmp_path / "routing"
    sizes = {"hidden-size": 64, "intermediate-size": 96, "layers": 1, "vocab-size": 300, "sequences": 16}
    options = ["--data-dir", data_dir, "--threads", 1]
    run_study(pretraining, "--out", model, *options, *(f"--{name}={value}" for name, value in sizes.items()))
    assert json.loads((model / "pretraining.json").read_text())["num_tokens"] == 16 * 256
    assert "holds a model already" in run_study(pretraining, "--out", model, *options)

    options += ["--model", model, "--out", out, "--decompositions", "jactus", "--seeds", 0]
    options += ["--test-blocks", 1, "--blocks", 32, "--oracle-steps", 1]
    run_study(routing, "run", *options)
    patterns, result, static = map(json.loads, (out / "routing.jsonl").read_text().splitlines())
    assert [record["kind"] for record in (patterns, result, static)] == ["patterns", "router", "static"]
    assert (result["decomposition"], result["blocks"], result["pool"], result["seed"]) == ("jactus", 32, 0.99, 0)
    divergences = [figures["divergence"] for by_text in result["routed"].values() for figures in by_text.values()]
    assert len(divergences) == 3 * 3
    assert all(0 < divergence < 1 for divergence in divergences), divergences
    table = run_study(routing, "report", "--out", out, "--blocks", 32)
    assert table.count("| jactus | static") == 2 * 2  # a table of divergence, and one of perplexity
    assert table.count("| jactus | routed |") == 2
    assert (out / "routing.md").read_text() == table
    assert (out / "routing.png").read_bytes()[:4] == b"\x89PNG"
