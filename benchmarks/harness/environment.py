"""What a result depends on, written into every result file."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors")


def environment(device="cpu"):
    """Return versions, device, threads and commit."""
    root = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "../peft_jactus", "*.py"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else ""),
    }


def write_result(path, result):
    """Write a result file, whole or not at all; several processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
