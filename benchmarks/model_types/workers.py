"""Each type in a process of its own, with limits: some models hang, or take all memory."""

import contextlib
import multiprocessing
import os
import resource
import sys
import time
import warnings

import torch
import transformers

from benchmarks.model_types.cases import measure

MEMORY = 8 << 30
# Not "spawn": the imports take ten times as long as most types do.
_CONTEXT = multiprocessing.get_context("fork")


def measured(model_type, *, seconds):
    """Return the record of a type, whatever it does; ``seconds`` is the most that it may take."""
    here, there = _CONTEXT.Pipe(duplex=False)
    worker = _CONTEXT.Process(target=_work, args=(model_type, there))
    worker.start()
    there.close()
    try:
        return _received(model_type, worker, here, seconds)
    finally:
        worker.kill()
        worker.join()
        here.close()


def _received(model_type, worker, here, seconds):
    stage, waiting = "build", True
    deadline = _now() + seconds
    while waiting:
        waiting = here.poll(max(0.0, deadline - _now()))
        if not waiting:
            return _ended(model_type, stage, f"not done after {seconds:g} seconds")
        try:
            said = here.recv()
        except EOFError:
            worker.join()
            return _ended(model_type, stage, f"the process ended with exit code {worker.exitcode}")
        if isinstance(said, dict):
            return said
        stage = said
    raise AssertionError


def _now():
    return time.monotonic()


def _ended(model_type, stage, reason):
    outcome = {"build": "unbuilt"}.get(stage, "unloadable" if stage.startswith("load") else "failed")
    return {"type": model_type, "outcome": outcome, "stage": stage, "reason": reason}


def _work(model_type, there):
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.modules["matplotlib"] = None  # the plot of the ranks would take most of the time
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.stderr = nowhere
        record = measure(model_type, there.send)
    there.send(record)
