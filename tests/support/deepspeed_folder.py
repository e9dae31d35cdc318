"""Where the tests find DeepSpeed."""

from pathlib import Path

import pytest

# Beside the environment, not in it: transformers, accelerate and PEFT change what they do where they find it.
DEEPSPEED = Path(__file__).parents[2] / ".cache" / "deepspeed"
# `.ci/run` puts it there; only who calls pytest by hand, without it, goes without these tests.
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED.exists(), reason="DeepSpeed is not there: run scripts/deepspeed.sh")
