# Each target sets up .venv first, if pyproject.toml changed since. For another interpreter delete
# .venv first: `make PYTHON=python3.12 test`.
export PYTHON ?= python3

.PHONY: quickstart check lint types docs test journeys lowest

quickstart:
	scripts/setup.sh
	.venv/bin/python examples/quickstart.py

check: lint types docs test

lint types docs test journeys lowest:
	.ci/run $@
