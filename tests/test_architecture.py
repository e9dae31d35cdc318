"""The rooms of the package: what each is for, what it may import, and what nobody may do."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_jactus"

# Room, what it is for, the rooms it imports, the libraries it imports beside Python's own. A room imports rooms above
# it only, so nothing goes round in circles. The lists are exact: an import that is new, or gone, changes a line here.
ROOMS = [
    ("_version", "the version", "", ""),
    ("errors", "errors and warnings with a name of their own", "", ""),
    ("_dtypes", "the dtype that a layer computes in", "", "torch"),
    ("_placeholders", "what stands for a weight that is not there", "", "torch"),
    ("_processes", "several processes share the work", "", "torch"),
    ("_progress", "progress bars", "_processes", "transformers"),
    ("_files", "files of tensors", "", "safetensors torch"),
    ("numerics", "tensors in, tensors out", "errors _dtypes", "bitsandbytes torch"),
    (
        "tuner",
        "what PEFT sees",
        "_version errors _dtypes _placeholders _processes _progress numerics",
        "accelerate numpy peft torch transformers typing_extensions",
    ),
    (
        "calibration",
        "data in, statistics out",
        "_placeholders _processes _progress _files numerics tuner",
        "accelerate numpy peft torch transformers",
    ),
    (
        "deployment",
        "what is shipped",
        "_version errors _placeholders _progress _files numerics tuner",
        "accelerate huggingface_hub matplotlib peft torch transformers typing_extensions",
    ),
    (
        "callbacks",
        "compresses in mid-run",
        "calibration deployment tuner",
        "peft torch transformers",
    ),
    (
        "parse",
        "ranks by prompt",
        "errors _progress numerics tuner calibration deployment",
        "torch transformers triton",
    ),
    (
        "cli",
        "what the commands do",
        "_version _files numerics tuner calibration deployment",
        "datasets huggingface_hub peft torch transformers",
    ),
    ("_registration", "tells PEFT and transformers", "tuner deployment parse", "peft safetensors transformers"),
    ("__init__", "the public names", "_version errors tuner calibration deployment callbacks _registration", ""),
    ("__main__", "python -m peft_jactus", "", "peft_jactus_cli"),
]
ROOM_NAMES = [name for name, *_ in ROOMS]
# Loading a file must never run code from it.
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def shipped_files():
    folders = (PACKAGE, ROOT / "examples", ROOT / "benchmarks")
    return [ROOT / "peft_jactus_cli.py", *(path for folder in folders for path in sorted(folder.rglob("*.py")))]


def relative_name(path):
    return str(path.relative_to(ROOT))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Yield the full name of all that a file imports, at any depth, also for type checking only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def modules_of(room):
    return [path for path in modules() if room_of(path) == room]


def imported_by(room):
    """Return the rooms and the libraries that the modules of a room import, anywhere in their code."""
    rooms, libraries = set(), set()
    for name in (name for path in modules_of(room) for name in imports(path)):
        library, _, rest = name.partition(".")
        if library == "peft_jactus":
            rooms.add(rest.partition(".")[0])
        elif library not in sys.stdlib_module_names:
            libraries.add(library)
    return rooms - {room}, libraries


def test_every_module_has_a_room():
    assert {room_of(path) for path in modules()} == set(ROOM_NAMES)


@pytest.mark.parametrize(("room", "_purpose", "rooms", "libraries"), ROOMS, ids=ROOM_NAMES)
def test_a_room_imports_what_the_table_says(room, _purpose, rooms, libraries):  # no fixture
    assert imported_by(room) == (set(rooms.split()), set(libraries.split()))


@pytest.mark.parametrize(("room", "_purpose", "rooms", "_libraries"), ROOMS, ids=ROOM_NAMES)
def test_rooms_import_rooms_above_them_only(room, _purpose, rooms, _libraries):  # no fixture
    assert set(rooms.split()) <= set(ROOM_NAMES[: ROOM_NAMES.index(room)])


@pytest.mark.parametrize("room", ROOM_NAMES)
def test_modules_of_a_room_do_not_import_each_other_in_circles(room):
    names = {f"peft_jactus.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}": path for path in modules()}
    inside = {name: path for name, path in names.items() if room_of(path) == room and path.name != "__init__.py"}
    above = {
        name: {other for other in inside for found in runtime_imports(path) if f"{found}.".startswith(f"{other}.")}
        for name, path in inside.items()
    }
    while free := {name for name, needed in above.items() if not needed}:
        above = {name: needed - free for name, needed in above.items() if name not in free}
    assert not above, "these import each other"


def runtime_imports(path):
    """Return the full names of what a file imports when it is imported, which types do not need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        f"{node.module}.{alias.name}" for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_what_a_checkpoint_carries_needs_nothing_of_the_package():
    assert {name.partition(".")[0] for name in imports(PACKAGE / "deployment" / "remote_modeling.py")} == {
        "__future__",
        "functools",
        "torch",
        "typing",
    }


@pytest.mark.parametrize("path", shipped_files(), ids=relative_name)
def test_modules_and_functions_are_short_enough_to_be_read_at_once(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    functions = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.FunctionDef)]
    long = {node.name: count for node in functions if (count := code_lines(node, lines)) > 40}
    assert not long


def code_lines(function, lines):
    """Count lines of code of a function's body, without its docstring, comments and blank lines."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return 0
    of_body = (line.strip() for line in lines[body[0].lineno - 1 : function.end_lineno])
    return sum(bool(line) and not line.startswith("#") for line in of_body)


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
