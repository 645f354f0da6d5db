#!/usr/bin/env bash
# demo_model.sh: prints the folder of the demo model, SmolLM2-135M-Instruct quantised; makes it where it is not there
# (a download of 100 MB, and four minutes on two cores). PYTHON must have matgptq with its `dev` extra.
set -euo pipefail
cd "$(dirname "$0")/.."
dense=build/SmolLM2-135M-Instruct
if [ ! -e "$dense/config.json" ]; then "${PYTHON:-python3}" examples/fetch_smollm2.py "$dense" >&2; fi
if [ ! -e "$dense-MatGPTQ/config.json" ]; then
  "${PYTHON:-python3}" -m matgptq.cli quantize "$dense" --out "$dense-MatGPTQ" --group-size 64 \
    --calibration examples/data/calibration.txt --samples 32 --sequence-length 1024 >&2
fi
echo "$PWD/$dense-MatGPTQ"
