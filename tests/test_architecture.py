"""The order in which the package is read: what may import what, and what nobody may do."""

import ast
import re
from pathlib import Path

import pytest

import peft_jactus
from peft_jactus import parse

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_jactus"

# A module imports only modules before it. The numerics know tensors, but neither PEFT nor transformers.
NUMERICS = (
    "linalg",
    "moments",
    "statistics",
    "distributed",
    "weighting",
    "decomposition",
    "allocation",
    "interpolation",
    "factorization",
    "core_product",
    "adapter_tensors",
    "low_rank",
    "benchmarking",
)
ORDER = (
    *NUMERICS,
    "_version",
    "_peft_type",
    "config",
    "targeting",
    "layer",
    "calibration",
    "model",
    "integrity",
    "routing",
    "compression_config",
    "checkpoint_names",
    "loading",
    "summary",
    "model_card",
    "copying",
    "export",
    "remote_code",
    "parse",
    "cli",
    "_registration",
    "__init__",
    "__main__",
)
FRAMEWORKS = {"peft", "transformers"}
# Loading a file must never run code from it.
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def shipped_files():
    folders = (PACKAGE, ROOT / "examples", ROOT / "benchmarks")
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def relative_name(path):
    return str(path.relative_to(ROOT))


def stage(path):
    """Return the name in `ORDER` of a module; all of a subpackage is one stage."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Yield the full name of all that a file imports, at any depth, also for type checking only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=relative_name)
def test_imports_only_go_down(path):
    assert stage(path) in ORDER, "give the module its place in ORDER"
    before = ORDER[: ORDER.index(stage(path))]
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package != "peft_jactus":
            continue
        target = rest.partition(".")[0]
        assert target in before or (target == stage(path) and path.parent != PACKAGE), f"{stage(path)} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=relative_name)
def test_numerics_import_no_framework(path):
    if stage(path) in NUMERICS:
        assert not {name.partition(".")[0] for name in imports(path)} & FRAMEWORKS


@pytest.mark.parametrize("path", shipped_files(), ids=relative_name)
def test_imports_are_absolute(path):
    assert not [name for name in imports(path) if name.startswith(".")]


@pytest.mark.parametrize("path", shipped_files(), ids=relative_name)
def test_nothing_can_unpickle(path):
    assert not {name.partition(".")[0] for name in imports(path)} & UNSAFE_MODULES
    assert not UNSAFE_CALLS & set(imports(path))
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    assert not UNSAFE_CALLS & calls


@pytest.mark.parametrize("name", [*peft_jactus.__all__, *parse.__all__])
def test_public_names_are_in_the_readme(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"\b{name}\b", readme), f"README.md does not mention {name}"
