"""What runs the tutorials: pictures as in a notebook, and a quiet console."""

import warnings

import datasets
from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst
from transformers.utils import logging


def last_figure(block, block_vars, gallery_conf):
    """Save the figure that is the last expression of a cell, and return the reST that shows it."""
    del block
    figure = block_vars["fake_main"].__dict__.get("___")  # stays from cell to cell
    if not isinstance(figure, Figure) or figure is block_vars.get("shown"):
        return ""
    block_vars["shown"] = figure
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=150)
    title = figure.get_suptitle() or figure.axes[0].get_title()
    return figure_rst([path], gallery_conf["src_dir"], title)


def setup(app):
    """Show no bars, and nothing that a reader of the pages cannot act on."""
    del app
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()  # no report on each new head
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks transformers by an old name
    return {"parallel_read_safe": True, "parallel_write_safe": True}
