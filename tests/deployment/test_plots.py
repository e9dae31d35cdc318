"""Pictures can be read on light and on dark pages."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from peft_jactus import plan_ranks, plot_plan, plot_ranks
from peft_jactus.deployment.plots import COLORS, GREY
from tests.support.compressed_models import calibrated, compressed, tiny_bert, tiny_llama

PAGES = {"light": "#ffffff", "dark": "#0d1117"}
LEAST_CONTRAST = 3.0  # of WCAG 2.2 for graphics and large text


def luminance(color):
    """Return the relative luminance of WCAG 2.2."""
    parts = np.array(to_rgb(color))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(first, second):
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the known example: just below 4.5


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("color", [GREY, *COLORS])
def test_colors_stand_out(color, page):
    assert contrast(color, PAGES[page]) > LEAST_CONTRAST


def of_ranks():
    return plot_ranks(compressed(tiny_bert()))


def of_a_plan():
    model = tiny_llama()
    return plot_plan(plan_ranks(model, calibrated(model), progress_bar=False))


@pytest.mark.parametrize("draw", [of_ranks, of_a_plan])
def test_a_picture_has_no_background_and_no_color_of_its_own(draw, tmp_path):
    before = dict(mpl.rcParams)
    figure = draw()
    assert dict(mpl.rcParams) == before
    figure.savefig(tmp_path / "picture.png")
    assert mpl.image.imread(tmp_path / "picture.png")[0, 0, 3] == 0  # the corner is clear
    drawn = set()
    for axes in figure.axes:
        assert axes.get_facecolor()[3] == 0
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        drawn |= {text.get_color() for text in texts} | {line.get_color() for line in axes.lines}
    assert drawn <= {GREY, *COLORS}
