#!/usr/bin/env bash
# Set up what every command of this repository needs; costs nothing when it is already there:
#   .venv/                  the package in editable mode with all extras; again after pyproject.toml changes
#   .cache/peft-<version>/  the source distribution of the installed PEFT, for its tests (tests/peft_contract)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python

if ! cmp --silent pyproject.toml .venv/pyproject.toml; then
    "${PYTHON:-python3}" -m venv .venv
    # First and pinned: a plain `torch` can mean gigabytes of CUDA libraries where a CPU wheel of this version lies
    # at hand (pip's `find-links`). TORCH="torch --index-url https://download.pytorch.org/whl/cpu" picks another one.
    # shellcheck disable=SC2086  # several words are meant
    $python -m pip install --quiet ${TORCH:-torch==2.13.0}
    $python -m pip install --quiet --editable ".[dev]"
    cp pyproject.toml .venv/pyproject.toml # last, so that an interrupted set-up is repeated
fi

peft=peft-$($python -c 'from importlib.metadata import version; print(version("peft"))')
if [[ ! -d .cache/$peft ]]; then
    download=$(mktemp --directory)
    trap 'rm -rf "$download"' EXIT
    $python -m pip download --quiet --no-deps --no-binary peft --dest "$download" "${peft/-/==}"
    tar --extract --file "$download/$peft.tar.gz" --directory "$download"
    mkdir -p .cache
    mv "$download/$peft" ".cache/$peft" # whole or not at all
fi
