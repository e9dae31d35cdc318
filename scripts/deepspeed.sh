#!/usr/bin/env bash
# Put DeepSpeed, without its compiled parts, into .cache/deepspeed for the tests of ZeRO; nothing if it is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ ! -d .cache/deepspeed ]] || exit 0
target=$(mktemp --directory)
trap 'rm -rf "$target"' EXIT
# It asks for torch while it is built and installed: that of .venv.
DS_ACCELERATOR=cpu .venv/bin/python -m pip install --quiet --no-build-isolation --no-deps --target "$target" deepspeed
.venv/bin/python -m pip install --quiet --target "$target" einops hjson msgpack ninja py-cpuinfo pydantic
mkdir -p .cache
mv "$target" .cache/deepspeed # whole or not at all
