#!/usr/bin/env bash
# run_bench_e2e.sh [options of bench_transformers_e2e.py]: tokens per second by width, in Transformers.
# MODEL_ID: a quantised folder, or a name on the Hugging Face hub; the demo model where it is not set. For speed alone:
#   matgptq dummy --arch llama-3.1-8b --out build/llama-3.1-8b && MODEL_ID=build/llama-3.1-8b scripts/run_bench_e2e.sh
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
model=${MODEL_ID:-$("$here/scripts/demo_model.sh")}
exec "${PYTHON:-python3}" "$here/bench_transformers_e2e.py" "$model" "$@"
