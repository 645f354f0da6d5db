#!/usr/bin/env bash
# run_inference_vllm.sh [options of inference_demo_vllm.py]: one vLLM engine answers at each width.
# MODEL_ID: a quantised folder, or a name on the Hugging Face hub; the demo model where it is not set.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
model=${MODEL_ID:-$("$here/scripts/demo_model.sh")}
exec "${PYTHON:-python3}" "$here/inference_demo_vllm.py" "$model" "$@"
