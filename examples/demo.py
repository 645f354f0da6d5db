"""One nested checkpoint from a real model: quantise it, then ask and measure it at 8, 6, 4, 3 and 2 bits.

    python examples/demo.py build/SmolLM2-135M-Instruct

The last line of the output is one JSON object: {"model", "date", "device", "dense_perplexity", "dense_bytes",
"quantize_seconds", "widths": {"8": {"perplexity", "bytes", "answer"}, ...}}. Perplexity is of the first 8,192 tokens of
a text that calibrated nothing; bytes are those of a folder that `matgptq slice` cuts to the width.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import matgptq
from matgptq.evaluate import model_bytes, perplexity, read_tokens
from matgptq.info import info_of

DATA = Path(__file__).parent / "data"
QUESTION = "What is the capital of France?"
WIDTHS = (8, 6, 4, 3, 2)


def ask(model: Any, tokenizer: Any, question: str, max_new_tokens: int = 16) -> str:
    """The model's greedy answer, on one line."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a dense model")
    parser.add_argument("--out", type=Path, help="also write the result into this JSON file")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of held-out text to measure on")
    options = parser.parse_args()
    nested = options.model.with_name(f"{options.model.name}-MatGPTQ")
    torch.manual_seed(0)

    seconds = None
    if nested.exists():
        print(f"using {nested}, which is there already")
    else:
        start = time.perf_counter()
        method = matgptq.Method(group_size=64)
        matgptq.quantize(
            options.model, nested, method, calibration=DATA / "calibration.txt", samples=32, sequence_length=1024
        )
        seconds = time.perf_counter() - start
        print(f"quantised into {nested} in {seconds:.0f} s")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = read_tokens(DATA / "evaluation.txt", tokenizer, options.tokens, 1024)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    dense_bytes = model_bytes(dense)
    dense = dense.float()
    dense_perplexity = perplexity(dense, tokens, progress="dense")
    print(f"\n{QUESTION}\n{'width':>7} {'perplexity':>11} {'weights':>9}  answer")
    print(f"{'dense':>7} {dense_perplexity:11.2f} {dense_bytes / 1e6:6.1f} MB  {ask(dense, tokenizer, QUESTION)}")
    del dense

    model = matgptq.load(nested, dtype=torch.float32)
    sizes = info_of(nested)["bytes_by_width"]
    widths: dict[str, dict[str, Any]] = {}
    for bits in WIDTHS:
        matgptq.set_bits(model, bits)  # the same weights in memory, read at another width
        row = {
            "perplexity": round(perplexity(model, tokens, progress=f"{bits} bits"), 3),
            "bytes": sizes[str(bits)],
            "answer": ask(model, tokenizer, QUESTION),
        }
        widths[str(bits)] = row
        print(f"{bits:>2} bits {row['perplexity']:11.2f} {row['bytes'] / 1e6:6.1f} MB  {row['answer']}")
    result = {
        "model": options.model.name,
        "date": date.today().isoformat(),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "matgptq": matgptq.__version__,
        "dense_perplexity": round(dense_perplexity, 3),
        "dense_bytes": dense_bytes,
        "quantize_seconds": seconds and round(seconds, 1),
        "widths": widths,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
