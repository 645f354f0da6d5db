"""One model in memory answers the same question at each width, by Transformers' own model code.

python inference_demo_transformers.py MODEL --bits 8 4 3 --prompt "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoTokenizer, TextStreamer

import matgptq
from matgptq.decode import Decoder, prompt_ids


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="quantised model folder, or name on the Hugging Face hub")
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=range(2, 9), metavar="BITS", default=[8, 6, 4, 3, 2], help="widths, bits"
    )
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="fuse the rest of the model: slow to start, then faster")
    options = parser.parse_args()
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be positive, got {options.max_new_tokens}")
    dtype = torch.float32 if options.device == "cpu" else "auto"  # 16 bits are slower than 32 on a CPU
    try:
        model = matgptq.load(options.model, device=options.device, dtype=dtype)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = prompt_ids(tokenizer, options.prompt)
    decoder = Decoder(model, max_length=ids.shape[1] + options.max_new_tokens, compile=options.compile)
    for bits in options.bits:
        start = time.perf_counter()
        matgptq.set_bits(model, bits)  # the same weights in memory, read at another width
        decoder.prepare()
        ready = time.perf_counter()
        print(f"\n{bits} bits, ready after {ready - start:.2f} s:")
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        count = 0
        for token in decoder.stream(ids, eos_token_id=model.generation_config.eos_token_id):
            streamer.put(token)
            count += 1
        streamer.end()
        seconds = time.perf_counter() - ready
        print(f"[{count} tokens, {count / seconds:.1f} tokens/s on {options.device}]")


if __name__ == "__main__":
    main()
