"""Each type in a process of its own, with limits: some models hang, or take all memory."""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

from benchmarks.model_types.cases import measure

MEMORY = 8 << 30
# Times the CPU time: on a busy machine, and for what sleeps.
_WAITING = 5
# Not "spawn": the imports take ten times as long as most types do.
_CONTEXT = multiprocessing.get_context("fork")


def measured(model_type, *, seconds):
    """Return the record of a type, whatever it does; ``seconds`` of CPU time are the most that it may take."""
    here, there = _CONTEXT.Pipe(duplex=False)
    worker = _CONTEXT.Process(target=_work, args=(model_type, there, round(seconds)))
    worker.start()
    there.close()
    try:
        return _received(model_type, worker, here, time.monotonic() + _WAITING * seconds)
    finally:
        worker.kill()
        worker.join()
        here.close()


def _received(model_type, worker, here, deadline):
    stage = "build"
    while here.poll(max(0.0, deadline - time.monotonic())):
        try:
            said = here.recv()
        except EOFError:
            worker.join()
            return _ended(model_type, stage, f"the process ended with exit code {worker.exitcode}")
        if isinstance(said, dict):
            return said
        stage = said
    return _ended(model_type, stage, "not done in time")


def _ended(model_type, stage, reason):
    reason = reason.replace(f"ended with exit code -{signal.SIGXCPU.value}", "was not done in time")
    outcome = "unbuilt" if stage == "build" else "failed"
    return {"type": model_type, "outcome": outcome, "stage": stage, "reason": reason}


def _work(model_type, there, seconds):
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.modules["matplotlib"] = None  # the plot of the ranks would take most of the time
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.stderr = nowhere
        record = measure(model_type, there.send)
    there.send(record)
