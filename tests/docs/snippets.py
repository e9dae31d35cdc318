"""Runs the Python of a Markdown page, block after block in one namespace, as a reader would."""

import re
from dataclasses import dataclass
from textwrap import dedent

# A comment directly before a block says why it is not run: <!-- not run: needs a GPU -->
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """Code of a page.

    Attributes:
        page: The file.
        line: Of its first line of code, from 1.
        code: What stands there.
        reason: Why it is not run, or None.
    """

    page: str
    line: int
    code: str
    reason: str | None

    def __str__(self):
        return f"{self.page}:{self.line}"

    def run(self, namespace):
        """Run it; an error's traceback has the lines of the page."""
        source = "\n" * (self.line - 1) + self.code
        exec(compile(source, self.page, "exec"), namespace)


def blocks_of(text, page="page.md"):
    """Return the blocks of a page, in order."""
    return [
        Block(str(page), text[: match.start("code")].count("\n") + 1, dedent(match["code"]), match["reason"])
        for match in BLOCK.finditer(text)
    ]


def run_page(blocks, namespace):
    """Run the blocks of a page, but for those with a reason.

    Args:
        blocks: Of the page.
        namespace: Names that the page takes for granted; what blocks define is added.

    Returns:
        How many were run.
    """
    run = [block for block in blocks if block.reason is None]
    for block in run:
        block.run(namespace)
    return len(run)
