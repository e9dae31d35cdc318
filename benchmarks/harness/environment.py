"""What a result depends on, written into every result."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors")
ROOT = Path(__file__).parents[2]


def environment(device="cpu"):
    """Return versions, device, threads and commit."""

    def git(*arguments):
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    changed = git("status", "--porcelain", "--", "peft_jactus", "benchmarks/*.py")
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "commit": git("rev-parse", "HEAD") + ("-dirty" if changed else ""),
    }
