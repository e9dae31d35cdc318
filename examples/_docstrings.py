"""Real text tasks that need no download: which library, or part of one, does this docstring come from?

The rows are read from the source files of the packages that are installed beside this project, so
nothing of theirs is copied into the repository. Library names and their aliases are cut out, as are
section titles, code and markup, and test rows come from other modules than train rows.
TF-IDF with logistic regression is right about 70 % of the time for six libraries (`LIBRARIES`), and
46 % for thirty parts (`PARTS`), with 1,200 training rows: there is room to learn.
"""

import ast
import importlib.util
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

LIBRARIES = ["matplotlib", "networkx", "pandas", "scipy", "sklearn", "torch"]
PARTS = [
    *("networkx.algorithms", "networkx.generators", "numpy.lib", "pandas.core", "pandas.io"),
    *("scipy.linalg", "scipy.optimize", "scipy.signal", "scipy.sparse", "scipy.stats"),
    *("sklearn.metrics", "sklearn.utils", "transformers.models"),
    *("sympy.combinatorics", "sympy.core", "sympy.functions", "sympy.geometry", "sympy.matrices"),
    *("sympy.physics", "sympy.polys", "sympy.solvers", "sympy.stats"),
    *("torch.ao", "torch.cuda", "torch.distributed", "torch.distributions", "torch.fx", "torch.nn"),
    *("torch.onnx", "torch.utils"),
]
ALIASES = ["np", "pd", "plt", "mpl", "mplot3d", "pyplot", "sp", "nx", "scikit-learn", "scikit"]
MARKUP = re.compile(r":\w+(?::\w+)*:(?=`)|[`*~]|<[^<>]*>|https?://\S+")
SECTION = re.compile(r"(?m)^\s*(?:\.\. |>>> |\w[\w ]*:$|\w[\w ]*\n\s*[-=~]{3,}|Read more in)")
PER_MODULE = 10  # at most: a few huge modules would otherwise be half of a class
MIN_WORDS, MAX_WORDS = 12, 30


def load_docstrings(num_train: int, num_test: int, seed: int = 0, classes: Sequence[str] = LIBRARIES) -> DatasetDict:
    """Return splits `train` and `test` with columns `text` and `label`, as balanced as can be."""
    rng, seen = random.Random(seed), set()
    rows = {"train": [], "test": []}
    names = names_in(classes)
    for label, source in enumerate(classes):
        modules = docstrings_by_module(source, names, seen, rng)
        for split, total in (("test", num_test), ("train", num_train)):
            wanted = total * (label + 1) // len(classes) - total * label // len(classes)
            texts = []
            while len(texts) < wanted and (module := next(modules, None)) is not None:
                texts.extend(module)
            rows[split] += [{"text": text, "label": label} for text in texts[:wanted]]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(classes))})
    return DatasetDict({split: Dataset.from_list(rng.sample(r, len(r)), features) for split, r in rows.items()})


def names_in(classes: Sequence[str]) -> re.Pattern:
    """Return a pattern of the names of libraries, and of what people call them."""
    libraries = sorted({source.partition(".")[0] for source in classes})
    return re.compile(rf"(?i)(py)?({'|'.join(libraries)})[._-]*|(?<![a-z])({'|'.join(ALIASES)})(?![a-z])[._-]*")


def docstrings_by_module(source: str, names: re.Pattern, seen: set, rng: random.Random) -> Iterator[list[str]]:
    """Yield the clean docstrings of one module of a library, or a part of it, after the other, in random order.

    A text is left out if half of its three-word runs have been `seen` in earlier ones: wrappers and
    siblings repeat each other in all but a name.
    """
    library, *part = source.split(".")
    root = Path(importlib.util.find_spec(library).origin).parent.joinpath(*part)
    paths = sorted(path for path in root.rglob("*.py") if "test" not in str(path.relative_to(root)))
    for path in rng.sample(paths, len(paths)):
        texts, kept = [clean(docstring, names) for docstring in public_docstrings(path)], []
        for text in rng.sample(texts, len(texts)):
            words = text.lower().split()
            runs = set(zip(words, words[1:], words[2:], strict=False))
            if len(words) < MIN_WORDS or len(kept) == PER_MODULE or len(runs & seen) > len(runs) / 2:
                continue
            seen |= runs
            kept.append(text)
        yield kept


def public_docstrings(path: Path) -> Iterator[str]:
    """Yield the docstring of each public function, class and method in a source file."""
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        for node in ast.iter_child_nodes(nodes.pop()):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield ast.get_docstring(node) or ""
                if isinstance(node, ast.ClassDef):
                    nodes.append(node)


def clean(docstring: str, names: re.Pattern) -> str:
    """Return the prose before the first section, without markup and library names."""
    prose = SECTION.split(docstring, maxsplit=1)[0]
    return " ".join(names.sub("", MARKUP.sub("", prose)).split()[:MAX_WORDS])
