"""What a user gets: dependencies that are declared and tested, and types that a type checker sees."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # with pytest, for such a Python
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
USER = ROOT / "tests" / "typing" / "downstream.py"

# Triton comes with PyTorch for GPUs, and another kernel runs without it; only type checkers read typing_extensions.
NOT_DECLARED = {"triton", "typing_extensions"}


def distribution_name(name):
    """Return a name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def bounds(requirements):
    """Return the lower bounds of requirements, None where there is none."""
    found = {}
    for requirement in requirements:
        name, bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?", requirement).groups()
        found[distribution_name(name)] = bound
    return found


def pins():
    lines = (ROOT / "scripts" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {distribution_name(name): version for name, version in pairs}


def imported_names(path):
    """Return the packages that a module imports, lazily or not, and not those of its strings of code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def release(version):
    """Return a version as numbers, 5.0 and 5.0.0 alike."""
    numbers = [int(number) for number in version.split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))


def test_each_dependency_has_a_lower_bound():
    assert None not in bounds(PROJECT["dependencies"]).values()


@pytest.mark.parametrize("group", ["dependencies", *sorted(EXTRAS)])
def test_each_lower_bound_is_the_version_that_is_tested(group):
    requirements = PROJECT["dependencies"] if group == "dependencies" else EXTRAS[group]
    for name, bound in bounds(requirements).items():
        assert bound is None or release(bound) == release(pins()[name]), name


def test_each_import_is_of_a_declared_dependency():
    paths = [ROOT / "peft_jactus_cli.py", *sorted((ROOT / "peft_jactus").rglob("*.py"))]
    imported = set().union(*map(imported_names, paths))
    third_party = imported - set(sys.stdlib_module_names) - NOT_DECLARED - {"peft_jactus", "peft_jactus_cli"}
    always = bounds(PROJECT["dependencies"])
    lazily = {
        "matplotlib": "plot",
        "datasets": "examples",
        "bitsandbytes": "bits",
    }  # each is asked for by an error that names it
    for name in sorted(third_party):
        declared = bounds(EXTRAS[lazily[name]]) if name in lazily else always
        assert distribution_name(name) in declared, name
    assert {distribution_name(name) for name in third_party} >= set(always), "declared, but not imported"


def mypy(folder, code):
    """Run mypy on code as a user has it: away from this repository and its settings."""
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={folder / 'cache'}", script]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_a_type_checker_sees_the_types_of_the_package(tmp_path):
    code = USER.read_text(encoding="utf-8")
    right = mypy(tmp_path, code)
    assert right.returncode == 0, right.stdout + right.stderr
    for good, bad in (
        ("retained_ratio=0.8", 'retained_ratio="x"'),
        ("max_batches=16", 'max_batches="x"'),
        ("verify=True", "verified=True"),
        ("active_ratio=0.6", 'active_ratio="x"'),
        ("plan.at(0.6)", 'plan.at("x")'),
        ("plot_ranks(summary).savefig", "plot_ranks(summary).save"),
    ):
        assert good in code
        wrong = mypy(tmp_path, code.replace(good, bad))
        assert wrong.returncode == 1, bad
        (line,) = [number for number, text in enumerate(code.splitlines(), 1) if good in text]
        reported = re.findall(r"^script\.py:(\d+): error", wrong.stdout, flags=re.MULTILINE)
        assert reported == [str(line)], wrong.stdout
