"""Settings for all tests."""

import os

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.support.comparisons")

# Tensors here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

# No deadline: the first call into a LAPACK routine, or a busy machine, is no failure.
settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None, print_blob=True)
settings.load_profile("ci" if "CI" in os.environ else "dev")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="Write golden files anew instead of comparing.")
