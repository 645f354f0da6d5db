#!/usr/bin/env bash
# run_bench_vllm.sh [options of `vllm bench`]: vLLM's own benchmark by width and batch, an engine each.
# MODEL_ID: a quantised folder, or a name on the Hugging Face hub; the demo model where it is not set.
# BITS="2 3 4 6 8", BATCH_SIZES="1 2 4 8 16", BENCHES="latency throughput". For all in fewer starts, and beside 16 bits
# and Marlin: bench_vllm_e2e.py
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
model=${MODEL_ID:-$("$here/scripts/demo_model.sh")}
vllm=("${PYTHON:-python3}" -m vllm.entrypoints.cli.main bench)
shape=(--input-len 32 --output-len 128)
for bits in ${BITS:-2 3 4 6 8}; do
  width=(--hf-overrides "{\"quantization_config\": {\"quant_method\": \"matgptq\", \"bits\": $bits}}")
  for batch in ${BATCH_SIZES:-1 2 4 8 16}; do
    for bench in ${BENCHES:-latency throughput}; do
      echo "== $bench, $bits bits, batch $batch"
      case $bench in
        latency) size=(--batch-size "$batch" --num-iters-warmup 2 --num-iters 5) ;;
        throughput) size=(--max-num-seqs "$batch" --num-prompts $((4 * batch)) --dataset-name random --random-input-len 32
                          --random-output-len 128) ;;
        *) echo "BENCHES must be of latency, throughput, got $bench" >&2; exit 2 ;;
      esac
      if [ "$bench" = latency ]; then lengths=("${shape[@]}"); else lengths=(); fi
      "${vllm[@]}" "$bench" --model "$model" "${width[@]}" "${lengths[@]}" "${size[@]}" "$@"
    done
  done
done
