#!/usr/bin/env bash
# Put DeepSpeed, without its compiled parts, into .cache/deepspeed for the tests of ZeRO; nothing if it is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ ! -d .cache/deepspeed ]] || exit 0
python=${VENV:-.venv}/bin/python
target=$(mktemp --directory)
trap 'rm -rf "$target"' EXIT
# It asks for torch while it is built and installed: that of the environment.
DS_ACCELERATOR=cpu "$python" -m pip install --quiet --no-build-isolation --no-deps --target "$target" deepspeed
"$python" -m pip install --quiet --target "$target" einops hjson msgpack ninja py-cpuinfo pydantic
# One part it would compile when it is first used, for over a minute: an all-reduce of tensor parallelism.
sed --in-place 's/builder = get_accelerator().create_op_builder("ShareMemCommBuilder")/builder = None/' \
    "$target/deepspeed/comm/torch.py"
mkdir -p .cache
mv "$target" .cache/deepspeed # whole or not at all
