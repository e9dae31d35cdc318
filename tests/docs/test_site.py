"""What the build of the site does not check: that all that is public is on it, and that links to files come along."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import peft_jactus
from peft_jactus import parse

DOCS = Path(__file__).parents[2] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))
API = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")}


def documented(page):
    """Return the names that a page of the API reference describes."""
    return re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)", API[page], flags=re.MULTILINE)


def script(path):
    """Import a script of the site, which is not on the path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_api_reference_once():
    names = [name for page in API if page != "parse" for name in documented(page)]
    assert sorted(names) == sorted(peft_jactus.__all__)
    assert sorted(documented("parse")) == sorted(parse.__all__)


@pytest.mark.parametrize("name", [*peft_jactus.__all__, *parse.__all__])
def test_every_public_name_has_a_docstring(name):
    documented_object = getattr(peft_jactus, name, None) or getattr(parse, name)
    assert len(documented_object.__doc__.split()) >= 5


def test_the_site_has_the_version_of_the_package():
    assert script(DOCS / "conf.py").release == peft_jactus.__version__


def test_every_page_is_in_the_table_of_contents():
    listed = set()
    for index in (DOCS / "index.md", DOCS / "api" / "index.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", index.read_text(encoding="utf-8"), flags=re.DOTALL):
            lines = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(index.parent / f"{line}.md").resolve() for line in lines}
    pages = set(DOCS.resolve().rglob("*.md")) - {(DOCS / "index.md").resolve()}
    assert listed == pages | {(DOCS / "tutorials_built" / f"{path.stem}.md").resolve() for path in TUTORIALS}


def test_every_tutorial_but_the_llama_runs_when_the_site_is_built(monkeypatch):
    def run_by_the_build():
        pattern = script(DOCS / "conf.py").sphinx_gallery_conf["filename_pattern"]
        return {path.stem for path in TUTORIALS if re.search(pattern, str(path))}

    monkeypatch.delenv("JACTUS_SMOLLM2", raising=False)
    assert run_by_the_build() == {path.stem for path in TUTORIALS} - {"llama"}
    monkeypatch.setenv("JACTUS_SMOLLM2", "outputs/smollm2")
    assert run_by_the_build() == {path.stem for path in TUTORIALS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see [this](../README.md)", "see [this](<path:../README.md>)"),
        ("see [this](../README.md#results)", "see [this](<path:../README.md>)"),
        ("[a page](bits.md#bfloat16)", "[a page](bits.md#bfloat16)"),
        ("![a picture](../README.md)", "![a picture](../README.md)"),  # Sphinx copies those
        ("[nothing](../README.txt)", "[nothing](../README.txt)"),  # left to MyST, which warns
        ("[elsewhere](https://arxiv.org)", "[elsewhere](https://arxiv.org)"),
    ],
)
def test_links_to_files_of_the_repository_bring_them_along(text, expected):
    source = [text]
    script(DOCS / "_ext" / "repository_files.py").link_files(SimpleNamespace(srcdir=str(DOCS)), "scale", source)
    assert source == [expected]


def test_the_drawings_are_what_their_script_draws():
    draw = script(DOCS / "drawings" / "draw.py")
    files = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "drawings").glob("*.svg")}
    assert files == {drawing.__name__: draw.svg(drawing) for drawing in draw.DRAWINGS}


def test_every_drawing_is_on_a_page_and_said_in_words():
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "concepts").glob("*.md"))
    shown = dict(reversed(found) for found in re.findall(r"!\[([^\]]+)\]\(\.\./drawings/(\w+)\.svg\)", pages))
    assert set(shown) == {path.stem for path in (DOCS / "drawings").glob("*.svg")}
    assert all(len(words.split()) > 10 for words in shown.values())


PATH = re.compile(r"`((?:benchmarks|docs|examples|peft_jactus|scripts|tests|\.ci)/[\w./-]+)`")


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_files_that_a_page_names_are_there(page):
    paths = PATH.findall(page.read_text(encoding="utf-8"))
    assert not [path for path in paths if not (DOCS.parent / path).exists() and "-KIND" not in path]
