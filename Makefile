# Each target sets up .venv first, if pyproject.toml changed since. `make PYTHON=python3.12 test` picks the interpreter.
export PYTHON ?= python3

.PHONY: quickstart check lint types test

quickstart:
	scripts/setup.sh
	.venv/bin/python examples/quickstart.py

check: lint types test

lint types test:
	.ci/run $@
