"""Measurements in a process of their own."""

import json
import subprocess
import sys


def run_fresh(module, *arguments, **options):
    """Run a module in a new process and return the JSON that its last line of output is.

    Args:
        module: Its full name.
        *arguments: Of its command line.
        **options: Of `subprocess.run`.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout
    return json.loads(output.splitlines()[-1])
