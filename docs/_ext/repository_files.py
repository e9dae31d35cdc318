"""Links from pages to files of the repository: a copy of each comes with the site, so that none is dead.

A page has them as they work in the repository, ``[scale.md](../benchmarks/results/cost/scale.md)``. MyST takes a
Markdown file for a page of the site, unless its address begins with ``path:``, which is put there. A file that is not
there, or a folder, is left to MyST, which warns.
"""

import re
from pathlib import Path

_LINK = re.compile(r"(?<!!)(\[[^\]]*\])\((\.\.?/[^)#\s]+)(?:#[^)\s]*)?\)")


def link_files(app, docname, source):
    """Mark the links of a page that leave the site."""
    pages = Path(app.srcdir)
    folder = (pages / docname).parent

    def marked(found):
        text, target = found.groups()
        path = (folder / target).resolve()
        is_outside = path.is_file() and not path.is_relative_to(pages)
        return f"{text}(<path:{target}>)" if is_outside else found.group()

    source[0] = _LINK.sub(marked, source[0])


def setup(app):
    """Look through each page before it is parsed."""
    app.connect("source-read", link_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
