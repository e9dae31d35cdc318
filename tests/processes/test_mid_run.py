"""`CompressionCallback` in two processes with DistributedDataParallel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file

from tests.support.compressed_models import logits_of
from tests.test_callbacks import full_size, trained

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", ["lora", "full"])
def test_two_processes_give_the_model_of_one(first, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.support.mid_run_worker", first, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert process.returncode == 0, process.stderr
    of_each = [load_file(tmp_path / f"{rank}.safetensors")["logits"] for rank in range(2)]
    assert torch.equal(*of_each)
    expected = logits_of(trained(full_size(first), tmp_path / "alone").model.eval())
    torch.testing.assert_close(of_each[0], expected, rtol=1e-4, atol=1e-4)
    saved = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-10")
    torch.testing.assert_close(logits_of(saved), of_each[0], rtol=1e-5, atol=1e-6)
