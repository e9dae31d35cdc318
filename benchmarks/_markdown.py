"""Tables of Markdown, and figures in them."""

import statistics


def mean_and_spread(values, form=".1f"):
    """Return mean and standard deviation, if there are several; each in the format ``form``, the latter unsigned."""
    values = list(values)
    spread = f" ± {statistics.stdev(values):{form.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def markdown_table(head, rows):
    """Return the lines of a table; the cells are strings."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
