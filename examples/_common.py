"""What examples share: quiet imports, counting, printing side by side, the results file."""

import argparse
import importlib.metadata
import json
import logging
import platform
import subprocess
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

# PEFT imports these where they are installed, and they tell of kernels that this machine has no use for.
for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
# PEFT 0.21 asks transformers 5 by an old name.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")


def num_trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights that a model holds: parameters, and the frozen bases."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def print_side_by_side(columns: Mapping[str, Mapping[str, str]]) -> None:
    """Print one column for each method and one line for each figure."""
    labels = list(next(iter(columns.values())))
    first = max(map(len, labels))
    widths = {name: max(len(name), *map(len, figures.values())) for name, figures in columns.items()}
    print(" " * first, *(f"{name:>{width}}" for name, width in widths.items()), sep="   ")
    for label in labels:
        figures = (f"{columns[name][label]:>{width}}" for name, width in widths.items())
        print(f"{label:<{first}}", *figures, sep="   ")


def write_results(path: Path, args: argparse.Namespace, results: Mapping[str, object]) -> None:
    """Write the figures of a run with all that is needed to judge and repeat it."""
    record = {
        # Not where files lie: that is another place on each machine, and changes no figure.
        "arguments": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        "results": results,
        "environment": environment(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def environment() -> dict[str, object]:
    packages = ("peft_jactus", "torch", "transformers", "peft", "datasets", "accelerate")
    cuda = torch.cuda.is_available()
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "git_commit": git("rev-parse", "--verify", "-q", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def git(*arguments: str) -> str | None:
    """Return what git says about this repository; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
