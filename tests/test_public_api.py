"""Every public name and its signature, so that none changes unnoticed.

``pytest tests/test_public_api.py --update-golden`` writes them anew.
"""

import importlib
import inspect
import json
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path

from typer.main import get_command

from peft_jactus_cli import app

GOLDEN = Path(__file__).parent / "golden" / "public_api.json"
MODULES = (
    "peft_jactus",
    "peft_jactus.calibration",
    "peft_jactus.deployment",
    "peft_jactus.parse",
    "peft_jactus.tuner",
)


def described(name, value):
    """Return the signatures that a public name stands for."""
    if not inspect.isclass(value):
        return {name: str(inspect.signature(value))}
    if issubclass(value, Exception):
        return {name: f"({value.__bases__[0].__name__})"}
    return {name: signature_of_class(value)} | {
        f"{name}.{key}": "property" if isinstance(member, property | cached_property) else signature_of(member)
        for key, member in own_members(value)
    }


def signature_of_class(cls):
    """Return how a class is made, without what it inherits from PEFT: that changes with PEFT's version."""
    signature = inspect.signature(cls)
    if is_dataclass(cls):
        ours = {key for base in cls.__mro__ if is_ours(base) for key in vars(base).get("__annotations__", {})}
        return str(signature.replace(parameters=[p for key, p in signature.parameters.items() if key in ours]))
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return str(signature) if is_ours(owner) else f"as {owner.__name__}"


def is_ours(cls):
    return cls.__module__.startswith("peft_jactus")


def own_members(cls):
    """Yield what users call on a class: of its own and of ours that it inherits from, not of PyTorch or PEFT."""
    seen = set()
    for base in cls.__mro__:
        if not is_ours(base):
            continue
        for key, member in vars(base).items():
            is_shown = inspect.isfunction(member) or isinstance(
                member, property | cached_property | classmethod | staticmethod
            )
            if not key.startswith("_") and key not in seen and is_shown:
                seen.add(key)
                yield key, member


def signature_of(member):
    return str(inspect.signature(getattr(member, "__func__", member)))


def public_api():
    found = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            value = getattr(module, name)
            is_first = module_name == "peft_jactus" or name not in importlib.import_module("peft_jactus").__all__
            found |= {f"{module_name}.{key}": text for key, text in described(name, value).items() if is_first}
    for name, command in get_command(app).commands.items():
        options = (option for parameter in command.params for option in (parameter.opts or [parameter.name]))
        found[f"peft-jactus {name}"] = " ".join(options)
    return dict(sorted(found.items()))


def test_public_names_and_signatures_are_those_of_the_golden_file(request):
    found = public_api()
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))
    changed = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not changed, "if that is meant: pytest tests/test_public_api.py --update-golden"


def test_everything_public_has_a_docstring():
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            assert inspect.getdoc(getattr(module, name)), f"{module_name}.{name}"
