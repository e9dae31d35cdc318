#!/usr/bin/env bash
# Set up what every command of this repository needs; costs nothing when it is already there:
#   .venv/                  the package in editable mode with all extras; again after pyproject.toml changes
#   .cache/peft-<version>/  the source distribution of the installed PEFT, for its tests (tests/peft_contract)
# VENV is another folder than .venv, CONSTRAINTS a file of versions for pip (scripts/lowest.sh sets both).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-/dev/null}
python=$venv/bin/python

if ! cat pyproject.toml "$constraints" | cmp --silent - "$venv/pyproject.toml"; then
    "${PYTHON:-python3}" -m venv "$venv"
    # First and pinned: a plain `torch` can mean gigabytes of CUDA libraries where a CPU wheel of this version lies
    # at hand (pip's `find-links`). TORCH="torch --index-url https://download.pytorch.org/whl/cpu" picks another one.
    # shellcheck disable=SC2086  # several words are meant
    "$python" -m pip install --quiet --constraint "$constraints" ${TORCH:-torch==2.13.0}
    "$python" -m pip install --quiet --constraint "$constraints" --editable ".[dev]"
    cat pyproject.toml "$constraints" >"$venv/installed"
    mv "$venv/installed" "$venv/pyproject.toml" # last, so that an interrupted set-up is repeated
fi

peft=peft-$("$python" -c 'from importlib.metadata import version; print(version("peft"))')
if [[ ! -d .cache/$peft ]]; then
    download=$(mktemp --directory)
    trap 'rm -rf "$download"' EXIT
    "$python" -m pip download --quiet --no-deps --no-binary peft --dest "$download" "${peft/-/==}"
    tar --extract --file "$download/$peft.tar.gz" --directory "$download"
    mkdir -p .cache
    mv "$download/$peft" ".cache/$peft" # whole or not at all
fi
