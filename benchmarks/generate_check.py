"""Greedy answers of a quantised model on the GPU at every width; at some also by the CPU op, which must agree.

    python benchmarks/generate_check.py build/SmolLM2-135M-Instruct-MatGPTQ

On the CPU activations are float32, which is what it is fast in. The last line of the output is one JSON object:
{"device", "torch", "commit", "model", "dtype", "widths": {"8": {"answer", "tokens", "same_as_cpu"}, ...}};
same_as_cpu is null where the CPU op was not asked. Exits with 1 where tokens differ, and with 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import matgptq
from matgptq.bench import measured_commit
from matgptq.packed import PackedLinear

QUESTION = "What is the capital of France?"


def answers(model: Any, inputs: dict[str, torch.Tensor], widths: list[int], new_tokens: int) -> dict[int, list[int]]:
    """The tokens that the model answers with at each width."""
    found = {}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    for bits in widths:
        matgptq.set_bits(model, bits)
        start = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        found[bits] = output[0, inputs["input_ids"].shape[1] :].tolist()
        print(f"{model.device} {bits} bits: {len(found[bits])} tokens, {time.perf_counter() - start:.1f} s", flush=True)
    return found


def main() -> int:
    """Compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="quantised model folder")
    parser.add_argument("--bits", type=int, nargs="+", default=list(range(8, 1, -1)), help="widths on the GPU, bits")
    parser.add_argument("--same", type=int, nargs="+", default=[8, 4], help="widths to compare with the CPU op, bits")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16"), default="float16", help="type of activations on the GPU"
    )
    parser.add_argument("--new-tokens", type=int, default=24, help="longest answer, tokens")
    parser.add_argument("--device", default="cuda", help="the GPU")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("generate_check.py needs a CUDA GPU, and torch finds none", file=sys.stderr)
        return 2
    # a small model's ops are short: with a thread for each of 32 busy cores an answer took 186 s, with four 0.6 s
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompt = QUESTION
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = dict(tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template))
    dtype = getattr(torch, options.dtype)
    model = matgptq.load(options.model, dtype=dtype, device=options.device)
    layers = matgptq.quantized_layers(model).values()
    packed = all(isinstance(layer, PackedLinear) for layer in layers)
    here = answers(model, inputs, options.bits, options.new_tokens)
    there = answers(matgptq.load(options.model, dtype=torch.float32), inputs, options.same, options.new_tokens)
    widths = {}
    for bits, tokens in here.items():
        same = there[bits] == tokens if bits in there else None
        if same is False:
            print(f"{bits} bits: {tokens} here, {there[bits]} by the CPU op")
        answer = " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())
        widths[str(bits)] = {"answer": answer, "tokens": len(tokens), "same_as_cpu": same}
        print(
            f"{bits} bits: {answer!r}" + ("" if same is None else ", as the CPU op" if same else ", NOT as the CPU op")
        )
    gpu = options.device.startswith("cuda")
    device = torch.cuda.get_device_name(options.device) if gpu else "CPU"
    facts = {"device": device, "torch": torch.__version__, "commit": measured_commit(), "model": options.model.name}
    print(json.dumps({**facts, "dtype": options.dtype, "widths": widths}))
    return 1 if any(row["same_as_cpu"] is False for row in widths.values()) or (gpu and not packed) else 0


if __name__ == "__main__":
    sys.exit(main())
