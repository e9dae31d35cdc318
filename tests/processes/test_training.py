"""examples/distributed.py in two processes: calibrate, train with the Trainer, die, go on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.compressed_models import VOCABULARY, tiny_llama
from tests.support.deepspeed_folder import DEEPSPEED, needs_deepspeed
from tests.support.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
CONFIG_FILE = ROOT / "examples" / "accelerate" / "ddp.yaml"
EXAMPLE = ROOT / "examples" / "distributed.py"
SUPPORT = ROOT / "tests" / "support"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A tiny Llama, and random texts that its tokenizer knows."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    words = np.random.default_rng(0).integers(2, VOCABULARY, (64, 64))
    texts = [" ".join(f"w{word}" for word in row) for row in words]
    (folder / "data").mkdir()
    Dataset.from_dict({"text": texts}).to_parquet(folder / "data" / "train.parquet")
    return folder


def launch(sources, out, *script, path=(), config_file=CONFIG_FILE):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    command += ["--main_process_port", "0", *map(str, script), "--model", str(sources / "model")]
    command += ["--data-dir", str(sources / "data"), "--output-dir", str(out), "--batch-size", "4", "--length", "32"]
    command += ["--max-steps", "6", "--save-steps", "2", "--calibration-batches", "4"]
    places = os.pathsep.join(map(str, [ROOT, *path]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_process_that_is_killed_in_training_ends_the_run_and_the_next_one_goes_on(sources, tmp_path):
    process = launch(sources, tmp_path / "whole", EXAMPLE)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("14 targeted layers") == 1  # the main process alone prints

    killed = tmp_path / "killed"
    started = time.monotonic()
    process = launch(sources, killed, SUPPORT / "killed_in_training.py", EXAMPLE)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in process.stderr
    assert time.monotonic() - started < 120  # it does not hang
    assert [path.name for path in (killed / "trainer").iterdir()] == ["checkpoint-2"]

    process = launch(sources, killed, EXAMPLE)
    assert process.returncode == 0, process.stderr
    losses, expected = (json.loads((out / "losses.json").read_text()) for out in (killed, tmp_path / "whole"))
    assert [entry["step"] for entry in expected] == [1, 2, 3, 4, 5, 6]
    assert losses == expected
    adapter, expected = (
        load_file(out / "adapter" / "adapter_model.safetensors") for out in (killed, tmp_path / "whole")
    )
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter.items())


@pytest.mark.parametrize("path", [(), pytest.param((DEEPSPEED,), marks=needs_deepspeed)], ids=["", "deepspeed"])
def test_no_thread_of_gloo_is_left_that_could_abort_the_process_at_its_end(path, sources, tmp_path):
    process = launch(sources, tmp_path, SUPPORT / "gloo_threads.py", EXAMPLE, path=path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Threads of Gloo at the end: 0") == 2, process.stdout


@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_process_whose_group_deepspeed_keeps_ends_before_a_thread_could_abort_it(stage, sources, tmp_path):
    config_file = CONFIG_FILE.with_name(f"{stage}.yaml")
    script = (SUPPORT / "gloo_threads.py", EXAMPLE)
    process = launch(sources, tmp_path, *script, path=(DEEPSPEED,), config_file=config_file)
    assert process.returncode == 0, process.stderr
    assert f"Written to {tmp_path}" in process.stdout
    assert "Threads of Gloo at the end" not in process.stdout  # which is printed where Python shuts down
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@needs_deepspeed
def test_an_adapter_that_zero3_holds_in_shards_is_saved_whole(sources, tmp_path):
    """The Trainer gathers only what trains."""
    process = launch(sources, tmp_path, EXAMPLE, path=(DEEPSPEED,), config_file=CONFIG_FILE.with_name("zero3.yaml"))
    assert process.returncode == 0, process.stderr
    folders = (tmp_path / "trainer" / "checkpoint-4", tmp_path / "adapter")
    earlier, last = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert earlier.keys() == last.keys()
    changed = {name for name in last if not torch.equal(earlier[name], last[name])}
    assert changed == {name for name in last if "jactus_adapt" in name}
    rows = torch.randint(2, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(sources / "model")
    model = PeftModel.from_pretrained(base, folders[1])  # which takes no adapter that lacks something
    assert torch.isfinite(model(input_ids=rows, labels=rows).loss)
