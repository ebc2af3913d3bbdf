#!/usr/bin/env bash
# Check and measure on a GPU, within ten minutes, and write one JSON file:  benchmarks/gpu.sh [--out FILE] [--tiny]
# Needs torch, triton, transformers and peft in the Python it finds (PYTHON=… names another); installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
export DYLORA_MOE_KERNELS=1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
exec timeout --kill-after=5 600 "${PYTHON:-python3}" benchmarks/gpu.py "$@"
