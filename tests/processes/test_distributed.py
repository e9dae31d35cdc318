"""Several processes (gloo, on this machine) calibrate and factorize together."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_jactus import CalibrationStatistics
from peft_jactus._processes import share_out
from peft_jactus.calibration.statistics_files import read_metadata
from peft_jactus.tuner import model as model_module
from tests.support.deepspeed_folder import DEEPSPEED, needs_deepspeed
from tests.support.distributed_worker import compressed, factors_of, losses_of_training

ROOT = Path(__file__).parents[2]
# Sums of parts are added in another order; the gaps between kept and dropped directions enlarge that.
PROJECTOR_TOLERANCE = 1e-5


def launch(world_size, folder, name, **options):
    """Run the worker in ``world_size`` processes under torchrun; return the finished process."""
    return launch_several(world_size, name, {folder: options})


def launch_several(world_size, name, options_by_folder):
    """Do so for several runs, one after the other in the same processes, which take longer to start than to work."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    runs = {str(folder): options for folder, options in options_by_folder.items()}
    command += ["-m", "tests.support.distributed_worker", name, json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{DEEPSPEED}", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def results_of(folder, world_size):
    for rank in range(world_size):
        path = folder / f"{rank}.safetensors"
        yield json.loads(read_metadata(path)["ranks"]), load_file(path)


ADAPTING = {"adaptation_rank": 6}


@pytest.mark.parametrize(
    ("name", "world_size", "fields"), [("bert", 2, {}), ("llama", 2, {}), ("llama", 4, {}), ("llama", 2, ADAPTING)]
)
def test_several_processes_give_the_ranks_and_factors_of_one(name, world_size, fields, tmp_path):
    expected_ranks, expected = factors_of(compressed(name, slice(None), fields=fields))
    process = launch(world_size, tmp_path, name, fields=fields)
    assert process.returncode == 0, process.stderr
    first, *others = results_of(tmp_path, world_size)
    for ranks, tensors in others:  # the very same numbers, not equal ones
        assert ranks == first[0]
        assert all(torch.equal(tensor, first[1][key]) for key, tensor in tensors.items())
    assert first[0] == expected_ranks
    assert len(set(expected_ranks.values())) > 1
    assert set(first[1]) == set(expected)
    for key, tensor in expected.items():
        assert tensor.dist(first[1][key]) < PROJECTOR_TOLERANCE, key


def test_a_memory_limit_and_a_file_work_in_several_processes(tmp_path):
    expected_ranks, expected = factors_of(compressed("llama", slice(None)))
    path = tmp_path / "statistics.safetensors"
    options = {"statistics_file": str(path), "save_every": 1, "max_statistics_memory": 120_000}
    assert (process := launch(2, tmp_path, "llama", **options)).returncode == 0, process.stderr
    assert CalibrationStatistics.load(path).num_batches == 8
    assert list(tmp_path.glob("*.process-*")) == []
    ranks, tensors = next(iter(results_of(tmp_path, 2)))
    assert ranks == expected_ranks
    assert all(torch.allclose(tensor, expected[key], atol=1e-5) for key, tensor in tensors.items())


def test_a_killed_process_ends_the_run_with_an_error_and_the_next_run_goes_on(tmp_path):
    path = tmp_path / "statistics.safetensors"
    options = {"statistics_file": str(path), "save_every": 1}
    started = time.monotonic()
    process = launch(2, tmp_path, "llama", kill=1, **options)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in process.stderr
    assert time.monotonic() - started < 120  # it does not hang
    saved = {file.name: CalibrationStatistics.load(file).num_batches for file in tmp_path.glob("statistics.process-*")}
    assert saved["statistics.process-1-of-2.safetensors"] == 1

    assert (process := launch(2, tmp_path, "llama", **options)).returncode == 0, process.stderr
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".tmp"]
    expected_ranks, expected = factors_of(compressed("llama", slice(None)))
    ranks, tensors = next(iter(results_of(tmp_path, 2)))
    assert ranks == expected_ranks
    assert all(torch.allclose(tensor, expected[key], atol=1e-5) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    "wrapper",
    ["ddp", "fsdp", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_training_in_two_processes_has_the_losses_of_one(wrapper, tmp_path):
    runs = {"core": {"adaptation_rank": 0}, "adapting": ADAPTING}
    if wrapper != "zero2":  # which shards no weights
        runs["4 bits"] = {**ADAPTING, "frozen_bits": 4, "adaptation_space": "retained"}
    for name in runs:
        (tmp_path / name).mkdir()
    options = {tmp_path / name: {"wrapper": wrapper, "fields": fields} for name, fields in runs.items()}
    process = launch_several(2, "llama", options)
    assert process.returncode == 0, process.stderr
    for name, fields in runs.items():
        expected = losses_of_training(compressed("llama", slice(None), fields=fields), slice(None))
        assert expected[0] > 1.05 * expected[-1]
        losses = json.loads(read_metadata(tmp_path / name / "0.safetensors")["losses"])
        assert losses == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize(("elsewhere", "ignored"), [(1.0, True), (0.5, False)])
def test_ddp_is_told_to_leave_bases_alone_only_if_all_processes_have_the_same(elsewhere, ignored, monkeypatch):
    model = compressed("llama", slice(None))
    frozen = {name for name, _ in model.named_buffers() if "jactus" in name}
    assert frozen
    monkeypatch.setattr(model_module, "gather_objects", lambda digests: [digests, [elsewhere * x for x in digests]])
    assert frozen.issubset(model._ddp_params_and_buffers_to_ignore) == ignored
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not trained & set(model._ddp_params_and_buffers_to_ignore)


def test_layers_are_shared_out_evenly(monkeypatch):
    monkeypatch.setattr("peft_jactus._processes.num_processes", lambda: 3)
    costs = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 2.0, "f": 1.0}
    owners = share_out(costs)
    assert list(owners) == list(costs)
    assert [sum(costs[name] for name in costs if owners[name] == process) for process in range(3)] == [6, 6, 6]
