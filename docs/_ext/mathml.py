"""Mathematics as MathML, which browsers show by themselves: no script, no font, no download."""

from docutils.nodes import SkipNode
from docutils.utils.math import latex2mathml


def visit_inline(translator, node):
    """Write a formula in a line of text."""
    translator.body.append(latex2mathml.tex2mathml(node.astext()))
    raise SkipNode  # the formula's text is written


def visit_block(translator, node):
    """Write a formula on a line of its own."""
    formula = latex2mathml.tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="math" style="overflow-x: auto">{formula}</div>')
    raise SkipNode


def setup(app):
    """Register the renderer that ``html_math_renderer`` names."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
