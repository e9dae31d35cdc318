"""Runs a script as it is, and says at its end how many of Gloo's threads are left: each may abort the process."""

import atexit
import contextlib
import runpy
import sys
import time
from pathlib import Path


def gloo_threads():
    """Return how many threads work for process groups of Gloo. They are Gloo's own: `threading` doesn't know them."""
    deadline = time.monotonic() + 5  # one that has ended is listed a moment longer
    while (count := listed()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return count


def listed():
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            names.append(path.read_text().strip())
    return names.count("pt_gloo_runloop")


if __name__ == "__main__":
    # One string, or that of the other process may come in between.
    atexit.register(lambda: sys.stdout.write(f"Threads of Gloo at the end: {gloo_threads()}\n"))
    sys.argv = sys.argv[1:]
    kept = runpy.run_path(sys.argv[0], run_name="__main__")  # as a script's own names are, until Python shuts down
