"""How Sphinx builds the site: ``make docs``, which stops at any warning.

Nothing is downloaded: mathematics becomes MathML, and other projects are linked by plain addresses.
"""

import logging
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # which tell of kernels that nobody needs here
    logging.getLogger(library).setLevel(logging.ERROR)

project = "peft-jactus"
author = "the authors of peft-jactus"
version_file = (ROOT / "peft_jactus" / "_version.py").read_text(encoding="utf-8")
release = version = re.search(r'^__version__ = "([^"]+)"$', version_file, re.MULTILINE).group(1)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings in Google's style
    "sphinx_gallery.gen_gallery",
    "command_line",
    "config_reference",
    "mathml",
    "repository_files",
    "tutorials",
]
exclude_patterns = ["_ext", "tutorials", "tutorials_built/index.rst"]
smartquotes_action = "D"  # dashes between a parameter and its text; no curly quotes, since 'pivoted' is code
default_role = "py:obj"  # `name` in a docstring is a link where the name is on the site, and code elsewhere

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

add_module_names = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

sphinx_gallery_conf = {  # runs docs/tutorials/*.py; one that raises stops the build
    "examples_dirs": "tutorials",
    "gallery_dirs": "tutorials_built",
    # A Llama takes minutes: it runs where somebody says where the model is.
    "filename_pattern": r"\.py$" if "JACTUS_SMOLLM2" in os.environ else r"(?<!llama)\.py$",
    "run_stale_examples": True,  # the package may have changed, if the tutorial has not
    "image_scrapers": "tutorials.last_figure",
    "capture_repr": (),
    "download_all_examples": False,
    "notebook_extensions": set(),
    "min_reported_time": float("inf"),
    "write_computation_times": False,
    "show_signature": False,
}

html_theme = "furo"
html_title = f"peft-jactus {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["tutorials.css"]
