"""What all reports share: tables of Markdown, and mean and spread."""

import statistics


def spread(values):
    """Return the sample standard deviation; zero of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_and_spread(values, form=".1f"):
    """Return mean and standard deviation, if there are several; each in the format ``form``, the latter unsigned."""
    values = list(values)
    deviation = f" ± {spread(values):{form.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def markdown_table(head, rows):
    """Return the lines of a table; the cells are strings."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def write_markdown(path, text):
    """Write a report, and print it."""
    path.write_text(text + "\n")
    print(text)
