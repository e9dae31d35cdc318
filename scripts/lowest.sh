#!/usr/bin/env bash
# Run the tests with the lowest versions that pyproject.toml claims, those of scripts/lowest.txt. Beside .venv, in:
#   .venv-lowest/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export VENV=.venv-lowest CONSTRAINTS=scripts/lowest.txt
export TORCH=${TORCH:-torch} # the file says which

trap 'echo "Lowest versions: FAILED" >&2' ERR
.ci/run test
echo "Lowest versions: passed"
