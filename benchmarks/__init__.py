"""Measurements of the package; run them by `python -m benchmarks.ROOM...` from the repository's root."""
