"""How Sphinx builds the site: ``make docs``, which stops at any warning.

Nothing is downloaded: mathematics becomes MathML, and other projects are linked by plain addresses.
"""

import logging
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
    "command_line",
    "config_reference",
    "mathml",
    "repository_files",
]
exclude_patterns = ["_ext"]
smartquotes_action = "D"  # dashes between a parameter and its text; no curly quotes, since 'pivoted' is code
default_role = "py:obj"  # `name` in a docstring is a link where the name is on the site, and code elsewhere

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

add_module_names = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"peft-jactus {release}"
html_math_renderer = "mathml"
html_copy_source = False
