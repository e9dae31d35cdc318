"""The settings are described once: docstring, site and command line show the fields' own help."""

import dataclasses
import re
from pathlib import Path

import pytest
from peft import PeftConfig
from typer.testing import CliRunner

from peft_jactus import JactusConfig
from peft_jactus.tuner.config_reference import GROUPS, described_fields
from peft_jactus_cli import app

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
INHERITED = {field.name for field in dataclasses.fields(PeftConfig)}
OWN = [field for field in dataclasses.fields(JactusConfig) if field.name not in INHERITED]
OPTIONS = {
    "retained_ratio": "--retained-ratio",
    "model_ratio": "--model-ratio",
    "max_model_size": "--max-size",
    "target_modules": "--target-modules",
    "storage": "--storage",
    "allocation": "--allocation",
}


def words(text):
    """Return a text without its line breaks and the frame that the command line draws."""
    return " ".join(text.replace("│", " ").split())


def test_every_field_is_in_one_group():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(field.name for field in OWN)


def test_every_group_is_on_the_page():
    shown = re.findall(r"^```\{config-fields\} (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert shown == list(GROUPS)


def test_every_field_says_what_it_does_and_what_it_is_by_default():
    for name, field in described_fields(JactusConfig).items():
        assert field.help.endswith("."), name
        assert field.default is not None or "Default: " in field.help, name


@pytest.mark.parametrize("field", OWN, ids=lambda field: field.name)
def test_the_docstring_has_the_help_of_every_field(field):
    documented = words(JactusConfig.__doc__)
    assert re.search(rf"\b{field.name} \([^:]*\): {re.escape(words(field.metadata['help']))}", documented)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_command_line_has_the_help_of_the_field(name):
    result = CliRunner().invoke(app, ["compress", "--help"], env={"COLUMNS": "1000", "TERMINAL_WIDTH": "1000"})
    help_text = JactusConfig.__dataclass_fields__[name].metadata["help"].partition(" Default: ")[0]
    shown = next(line for line in result.output.splitlines() if OPTIONS[name] in line.split())
    assert words(help_text).replace("`retained_ratio`", "--retained-ratio") in words(shown)
