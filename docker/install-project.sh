#!/usr/bin/env bash
# Installs this project into the Python of the base image, and beside the engine in the given folder if there is one.
# Run it in the root of the sources. MEGATRON_CORE is a build argument. Packages that the base image built stay as they
# are; all others get the versions that the tests run with.
set -euo pipefail
engine=$1/bin/python

python3 docker/versions.py base
constraints=$(mktemp)
# The version of the installed package: that of the imported torch lacks a part of it in NVIDIA's images.
python3 -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$constraints"
grep -vE '^(torch|triton|numpy|setuptools|megatron-core)==' constraints-cpu.txt >>"$constraints"
python3 -m pip install --no-build-isolation -c "$constraints" "megatron-core==$MEGATRON_CORE" .
rm "$constraints"

# vLLM loads this project's receiver of weights, and SGLang that of `weight_sync.transport: cuda_ipc`.
if [[ -x $engine ]]; then python3 -m pip --python "$engine" install --no-deps .; fi
