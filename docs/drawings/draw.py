"""Draws the concepts: ``python docs/drawings/draw.py`` writes an SVG for each, beside this file.

They are sketches: sizes are chosen to be seen, and are no results. All colours can be read on a light page and on a
dark one.
"""

from pathlib import Path

WIDTH = 720
FROZEN, TRAINS, DROPPED, LINE = "#3a72b0", "#c4601d", "#9a9a9a", "#7d7d7d"


def text(x, y, words, *, color=LINE, size=15, anchor="middle", weight="normal"):
    """Return a line of text whose baseline is at ``y``."""
    style = f'font-family="sans-serif" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" fill="{color}" {style}>{words}</text>'


def box(x, y, width, height, words="", *, color=FROZEN, hollow=False):
    """Return a rectangle with a text in its middle."""
    fill, dash = ("none", ' stroke-dasharray="5 4"') if hollow else (color, "")
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    shape = f'<rect {place} fill="{fill}" stroke="{color}" stroke-width="1.5"{dash}/>'
    inside = color if hollow else "#ffffff"
    return shape + (text(x + width / 2, y + height / 2 + 5, words, color=inside, weight="bold") if words else "")


def arrow(x, y, end_x, end_y, *, color=LINE):
    """Return a line with a head at its end."""
    head = f'marker-end="url(#head-{color[1:]})"'
    return f'<line x1="{x}" y1="{y}" x2="{end_x}" y2="{end_y}" stroke="{color}" stroke-width="2" {head}/>'


def brace(x, end_x, y, words):
    """Return a line under a range, with a text under it."""
    path = f'<path d="M{x} {y - 6} V{y} H{end_x} V{y - 6}" fill="none" stroke="{LINE}" stroke-width="1.5"/>'
    return path + text((x + end_x) / 2, y + 20, words)


def statistics():
    """What calibration looks at."""
    return 300, [
        box(300, 50, 120, 90, "W"),
        text(360, 34, "a layer"),
        arrow(110, 75, 292, 75),
        text(200, 64, "inputs x"),
        arrow(428, 75, 610, 75),
        text(520, 64, "outputs"),
        arrow(610, 118, 428, 118, color=TRAINS),
        text(520, 140, "gradients g come back", color=TRAINS),
        box(150, 190, 80, 80, "in x in"),
        text(190, 178, "second moment of the inputs"),
        text(245, 225, "directions that", anchor="start"),
        text(245, 245, "inputs use", anchor="start"),
        box(480, 190, 80, 80, "out x out", color=TRAINS),
        text(520, 178, "second moment of the gradients"),
        text(575, 225, "directions that", anchor="start"),
        text(575, 245, "the loss feels", anchor="start"),
    ]


def ranks():
    """Ranks of all layers, by what each is worth."""
    layers = [
        (70, 58, 47, 39, 32, 26, 21),
        (58, 40, 28, 20, 14, 10, 7),
        (74, 66, 59, 52, 46, 41, 36),
        (50, 22, 18, 11, 7),
    ]
    least = 30
    parts = [
        text(
            20,
            24,
            "What each further rank is worth, layer by layer. The budget keeps the best of all.",
            anchor="start",
        )
    ]
    for number, gains in enumerate(layers):
        left = 40 + 170 * number
        for rank, gain in enumerate(gains):
            kept = gain >= least or rank < 2  # a layer keeps some, whatever they are worth
            parts.append(
                box(left + 20 * rank, 150 - gain, 15, gain, color=FROZEN if kept else DROPPED, hollow=not kept)
            )
        parts.append(text(left + 68, 174, f"layer {number + 1}"))
    parts += [
        f'<path d="M25 {150 - least} H700" stroke="{TRAINS}" stroke-width="2" stroke-dasharray="7 5"/>',
        box(40, 196, 15, 15),
        text(62, 209, "kept", anchor="start"),
        box(140, 196, 15, 15, color=DROPPED, hollow=True),
        text(162, 209, "left out", anchor="start"),
        text(250, 209, "dashed line: where the budget ends; above a layer's floor", anchor="start", color=TRAINS),
    ]
    return 225, parts


def budget():
    """What the three budgets count."""
    return 190, [
        text(20, 24, "A model's parameters", anchor="start"),
        box(20, 40, 200, 60, "kept whole", color=LINE),
        box(220, 40, 290, 60, "kept of the targeted layers"),
        box(510, 40, 190, 60, "removed", color=DROPPED, hollow=True),
        text(120, 118, "embeddings, norms, heads", size=14),
        brace(222, 508, 126, "retained_ratio: of the targeted layers"),
        brace(22, 508, 162, "model_ratio and max_model_size: of the whole model"),
    ]


def adaptation():
    """A layer's ranks, shared out."""
    return 240, [
        box(30, 50, 130, 130, "W"),
        text(95, 38, "pretrained, dense"),
        arrow(172, 115, 222, 115),
        box(240, 50, 42, 130),
        box(290, 50, 130, 42),
        text(335, 38, "frozen: the best approximation"),
        text(440, 122, "+", size=30),
        box(470, 50, 20, 130, color=TRAINS),
        text(480, 200, "B", color=TRAINS),
        box(498, 50, 130, 20, color=TRAINS),
        text(640, 66, "A", color=TRAINS),
        text(550, 38, "trains: for the task", color=TRAINS),
        brace(240, 628, 214, "one budget pays for both"),
    ]


def storage():
    """One weight of low rank in two forms."""
    return 240, [
        box(30, 50, 130, 130, "out x in", color=DROPPED, hollow=True),
        text(95, 38, "dense"),
        box(240, 50, 45, 130, "up"),
        box(293, 50, 130, 45, "down"),
        text(330, 38, "factored"),
        text(330, 206, "r (out + in) numbers"),
        box(490, 50, 130, 45, "r rows"),
        box(490, 103, 45, 77),
        text(560, 38, "pivoted"),
        text(560, 206, "r (out + in - r) numbers"),
        text(545, 135, "r coefficients for", anchor="start", size=13),
        text(545, 152, "each other row", anchor="start", size=13),
    ]


DRAWINGS = (statistics, ranks, budget, adaptation, storage)


def svg(drawing):
    """Return the file of a drawing."""
    height, parts = drawing()
    size = 'viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto"'
    heads = "".join(
        f'<marker id="head-{color[1:]}" {size}><path d="M0 0 L10 5 L0 10 z" fill="{color}"/></marker>'
        for color in (LINE, TRAINS)
    )
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    title = f"<title>{drawing.__doc__}</title>"
    return "\n".join((opening, title, f"<defs>{heads}</defs>", *parts, "</svg>", ""))


if __name__ == "__main__":
    for drawing in DRAWINGS:
        Path(__file__).with_name(f"{drawing.__name__}.svg").write_text(svg(drawing), encoding="utf-8")
