"""Import PEFT's test classes and re-target them at another method."""

import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

PACKAGE = "peft_upstream_tests"
ROOT = Path(__file__).parents[2]

# Helpers by which upstream skips or changes tests according to the method. The first knows the methods that support
# Conv1D, ours not. The others are meant for BEFT but hit every method: their isinstance check is never true.
FOREIGN_SKIPS = (
    "_skip_if_conv1d_not_supported",
    "beft_tests",
    "check_beft_config",
    "deberta_beft_tests",
)

Axis = tuple[str, ...]  # the argument names of a `parametrize` mark


@dataclass(frozen=True)
class ExpectedFailure:
    """Why a test must fail by design, and with what error."""

    reason: str
    raises: type[Exception]


@dataclass(frozen=True)
class Row:
    """A line of a test matrix: values for an axis, and the tests that must fail with them."""

    name: str
    values: tuple[Any, ...]
    expected_failures: Mapping[str, ExpectedFailure] = field(default_factory=dict)  # by name of the test

    def as_parameter_of(self, test_name: str) -> Any:
        marks = ()
        if expected := self.expected_failures.get(test_name):
            marks = pytest.mark.xfail(reason=expected.reason, raises=expected.raises, strict=True)
        return pytest.param(*self.values, id=self.name, marks=marks)


def tests_dir() -> Path | None:
    """Return the directory of PEFT's tests, or None if it is not there."""
    cached = ROOT / ".cache" / f"peft-{version('peft')}" / "tests"
    directory = Path(os.environ.get("PEFT_TESTS_DIR", cached))
    return directory if (directory / "testing_common.py").is_file() else None


def load(name: str) -> ModuleType:
    """Import a module of PEFT's tests.

    Without them the caller's module is skipped; in continuous integration that is an error.
    """
    directory = tests_dir()
    if directory is None:
        reason = (
            f"PEFT {version('peft')}'s tests are not here: run scripts/setup.sh, or set PEFT_TESTS_DIR "
            "to the folder `tests` of PEFT's source distribution"
        )
        if os.environ.get("CI") == "true":
            raise FileNotFoundError(reason)
        pytest.skip(reason, allow_module_level=True)
    if PACKAGE not in sys.modules:
        pytest.register_assert_rewrite(PACKAGE)
        package = ModuleType(PACKAGE)  # by hand: the source distribution has no tests/__init__.py
        package.__path__ = [str(directory)]
        sys.modules[PACKAGE] = package
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("default")  # an import of PEFT's is judged by PEFT's rules, not by ours
        if importlib.util.find_spec("diffusers") is None:
            patch.setitem(sys.modules, "diffusers", _diffusers_stub())
        module = importlib.import_module(f"{PACKAGE}.{name}")
    for owner in (module, sys.modules.get(f"{PACKAGE}.testing_common")):
        for helper in FOREIGN_SKIPS:
            if hasattr(owner, helper):
                setattr(owner, helper, lambda *args: None)
    return module


def adopt(
    upstream_class: type,
    matrix: Mapping[Axis, Sequence[Row]],
    *,
    drop: Mapping[str, str] | None = None,
) -> type:
    """Return a subclass of a test class in which the tests of `matrix`' axes run on its rows, and no others run.

    Args:
        upstream_class: A test class of PEFT's.
        matrix: Axis -> the rows that replace upstream's. A test without one of these axes does not depend on the
            method, or is written for one method; it is left out.
        drop: Tests to leave out although they have such an axis: name -> reason.

    Raises:
        ValueError: If `drop` names a test that does not exist, or no test has one of the axes.
    """
    drop = drop or {}
    tests = {
        name: function
        for name, function in inspect.getmembers(upstream_class, inspect.isfunction)
        if name.startswith("test_")
    }
    if unknown := drop.keys() - tests.keys():
        raise ValueError(f"{upstream_class.__name__} has no tests {sorted(unknown)}; renamed upstream?")
    adopted = {name: _retarget(test, matrix) for name, test in tests.items() if name not in drop}
    if not any(adopted.values()):
        raise ValueError(f"{upstream_class.__name__} has no test with an axis of {list(matrix)}.")
    hidden = dict.fromkeys(tests)  # None hides an inherited test from pytest
    return type(upstream_class.__name__, (upstream_class,), hidden | adopted)


def _retarget(test: FunctionType, matrix: Mapping[Axis, Sequence[Row]]) -> FunctionType | None:
    """Return a copy of a test with new values on the axes of `matrix`, None if it has none of them."""
    marks = getattr(test, "pytestmark", [])
    if not any(_axis(mark) in matrix for mark in marks):
        return None
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__kwdefaults__ = test.__kwdefaults__
    copy.__dict__.update(test.__dict__)
    copy.pytestmark = [
        pytest.mark.parametrize(_axis(mark), [row.as_parameter_of(test.__name__) for row in matrix[_axis(mark)]]).mark
        if _axis(mark) in matrix
        else mark
        for mark in marks
    ]
    return copy


def _axis(mark: pytest.Mark) -> Axis | None:
    """Return the argument names of a `parametrize` mark, None for other marks."""
    if mark.name != "parametrize":
        return None
    names = mark.args[0] if mark.args else mark.kwargs["argnames"]
    names = names.split(",") if isinstance(names, str) else names
    return tuple(name.strip() for name in names)


def _diffusers_stub() -> ModuleType:
    """Return a module for `from diffusers import StableDiffusionPipeline`, which only isinstance checks use."""
    stub = ModuleType("diffusers")
    stub.__spec__ = ModuleSpec("diffusers", None)
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    return stub
