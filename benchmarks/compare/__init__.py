"""The comparison of training methods: `python -m benchmarks.compare`."""
