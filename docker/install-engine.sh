#!/usr/bin/env bash
# Makes the environment of the engine in the given folder. ENGINE, the engines' versions and NCCL are build arguments.
set -euo pipefail
folder=$1

case "$ENGINE" in
  sglang) packages=("sglang==$SGLANG" "sglang-router==$SGLANG_ROUTER") ;;
  vllm) packages=("vllm==$VLLM") ;;
  none) exit 0 ;;
  *) echo "ENGINE=$ENGINE: expected sglang, vllm or none" >&2; exit 1 ;;
esac

python3 -m venv "$folder"
python3 -m pip --python "$folder/bin/python" install "${packages[@]}"
# Every torch asks for one version of NCCL. The common one is newer or the same, so it comes without being resolved.
python3 -m pip --python "$folder/bin/python" install --no-deps "nvidia-nccl-cu13==$NCCL"
