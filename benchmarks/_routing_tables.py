"""From the results of routing.py to Markdown tables and plots."""

import json
import statistics


def write_report(folder):
    raise NotImplementedError
