"""lm-evaluation-harness on a compressed model, by its own command: a tool in which nobody imports this package.

Tried with lm_eval 0.4.13, transformers 5.24.0 and PEFT 0.21.2.
"""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils
from typer.testing import CliRunner

from peft_jactus import export_compressed, export_remote_code
from peft_jactus_cli import app
from tests.support.compressed_models import tiny_llama, trained
from tests.support.tiny_tokenizer import tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
METRICS = ("acc", "brier_score")
TASK = """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: brier_score}}]
"""


@pytest.fixture(scope="module")
def rows():
    choose = random.Random(0)

    def words(count):
        return " ".join(f"w{choose.randrange(2, 96)}" for _ in range(count))

    return [{"question": words(6), "choices": [words(2) for _ in range(3)], "answer": i % 3} for i in range(24)]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "compressed"
    export_compressed(trained(tiny_llama()), folder, processor=tiny_tokenizer(), progress_bar=False)
    return folder


@pytest.fixture(scope="module")
def task(rows, tmp_path_factory):
    """Return a folder with a task of the user's own, on local data."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.yaml").write_text(TASK.format(data=folder / "words.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def own_cache_of_remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def evaluated(pretrained, task, *, has_code=False):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    results = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(pretrained), "trust_remote_code": has_code}, tasks=["local_words"],
        task_manager=manager, device="cpu", batch_size=4,
    )  # fmt: skip
    return figures_in(results)


def figures_in(results):
    return {metric: results["results"]["local_words"][f"{metric},none"] for metric in METRICS}


def run_command(pretrained, task, output):
    """Run the tool in a process that does not import this package."""
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={pretrained}",
        "--tasks", "local_words", "--include_path", task, "--output_path", output, "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=task, capture_output=True, text=True, timeout=400)


@torch.no_grad()
def computed(folder, rows):
    """Return the figures, by hand: with the compressed model itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), tiny_tokenizer()
    hits, brier_scores = [], []
    for row in rows:
        question = len(tokenizer(row["question"]).input_ids)
        likelihoods = []
        for choice in row["choices"]:
            ids = torch.tensor(tokenizer(f"{row['question']} {choice}").input_ids)
            scores = model(ids[None]).logits[0, question - 1 : -1].log_softmax(-1)
            likelihoods.append(scores.gather(1, ids[question:, None]).sum())
        probabilities = torch.stack(likelihoods).softmax(0)
        hits.append(int(probabilities.argmax()) == row["answer"])
        truth = torch.nn.functional.one_hot(torch.tensor(row["answer"]), 3)
        brier_scores.append(float((probabilities - truth).square().sum()))
    return {"acc": sum(hits) / len(rows), "brier_score": sum(brier_scores) / len(rows)}


@pytest.fixture(scope="module")
def plain(compressed):
    """Return what the command writes for other tools."""
    folder = compressed.with_name("dense")
    finished = CliRunner().invoke(app, ["export", str(compressed), str(folder), "--dense"])
    assert finished.exit_code == 0, finished.output
    return folder


def test_plain_layers_give_the_figures_of_the_compressed_model(compressed, plain, rows, task):
    assert "jactus" not in (plain / "config.json").read_text()
    assert evaluated(plain, task) == pytest.approx(computed(compressed, rows), rel=1e-5)


def test_a_checkpoint_with_its_own_code_gives_them_too(compressed, rows, task):
    folder = export_remote_code(compressed, compressed.with_name("remote"))
    assert evaluated(folder, task, has_code=True) == pytest.approx(computed(compressed, rows), rel=1e-5)


@pytest.mark.slow
def test_the_command_takes_plain_layers(compressed, plain, rows, task, tmp_path):
    finished = run_command(plain, task, tmp_path)
    assert finished.returncode == 0, finished.stderr
    (results,) = tmp_path.rglob("results_*.json")
    assert figures_in(json.loads(results.read_text())) == pytest.approx(computed(compressed, rows), rel=1e-5)


@pytest.mark.slow
def test_the_command_stops_at_a_compressed_checkpoint_with_words_that_its_card_has(compressed, task, tmp_path):
    finished = run_command(compressed, task, tmp_path)
    assert finished.returncode != 0
    assert "Unknown quantization type, got jactus" in finished.stderr
    card = (compressed / "README.md").read_text()
    assert "`Unknown quantization type`" in card
    assert "--dense" in card
