"""The kinds of tasks by name."""

from benchmarks.tasks import language, text, vision
from benchmarks.tasks.commonsense import training as commonsense

KINDS = {"text": text, "vision": vision, "language": language, "commonsense": commonsense}


def load_workload(kind, data_dir, task, *, num_rows, scored_on):
    """Return what is trained and scored in a task of a kind."""
    return KINDS[kind].load_workload(data_dir, task, num_rows=num_rows, scored_on=scored_on)
