"""Check what vLLM serves against Transformers, at each width, with the width changed while the engine runs.

    python benchmarks/vllm_check.py FOLDER --bits 8 4 3 --tensor-parallel-size 2

vLLM decodes greedily; Transformers, by the plain op on the CPU in float32, then scores the same tokens: each must be
the likeliest, within what rounding to 16 bits can change (``--margin``, in units of a logit). The first width is also
served packed, by an engine of its own. The last line is a JSON object; the exit status is 1 where a token is wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
import vllm

import matgptq
import vllm_matgptq


def decode(llm: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of vLLM."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.inference_mode()
def score(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, float]:
    """How many of the tokens are the model's likeliest, and how far below the likeliest the worst one is."""
    same, total, worst = 0, 0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :].float()
        below = logits.max(-1).values - logits.gather(-1, torch.tensor(answer).unsqueeze(-1))[:, 0]
        same += int((below == 0).sum())
        total += len(answer)
        worst = max(worst, float(below.max()))
    return {"same": same, "tokens": total, "worst": round(worst, 4)}


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="quantised model folder")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3], help="widths, bits")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs")
    parser.add_argument("--tokens", type=int, default=32, help="tokens an answer")
    parser.add_argument("--margin", type=float, default=0.4, help="logit that rounding may change")
    parser.add_argument("--dtype", default="auto", help="type of activations in vLLM")
    parser.add_argument("--enforce-eager", action="store_true", help="no compilation, no CUDA graphs")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5, help="share of the GPU's memory")
    options = parser.parse_args()
    prompts = torch.randint(100, 1000, (3, 24), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = {
        "max_model_len": 24 + options.tokens + 8,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enforce_eager": options.enforce_eager,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }
    served: list[tuple[str, int, float, list[list[int]]]] = []
    llm = vllm.LLM(options.folder, **arguments, **vllm_matgptq.engine_args(options.bits[0], resident=True))
    for bits in options.bits:
        seconds = vllm_matgptq.set_bits(llm, bits)
        served.append(("resident", bits, seconds, decode(llm, prompts, options.tokens)))
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    llm = vllm.LLM(options.folder, **arguments, **vllm_matgptq.engine_args(options.bits[0]))
    served.append(("packed", options.bits[0], 0.0, decode(llm, prompts, options.tokens)))
    llm.llm_engine.engine_core.shutdown()
    model = matgptq.load(options.folder, dtype=torch.float32)
    rows = []
    for mode, bits, seconds, answers in served:
        matgptq.set_bits(model, bits)
        rows.append({"mode": mode, "bits": bits, "change_seconds": round(seconds, 2), **score(model, prompts, answers)})
        print(rows[-1], flush=True)
    correct = all(row["worst"] <= options.margin for row in rows)
    print(
        json.dumps({"vllm": vllm.__version__, "ranks": options.tensor_parallel_size, "correct": correct, "rows": rows})
    )
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
