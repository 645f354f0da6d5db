"""One vLLM engine answers the same question at each width; its weights are loaded once.

python inference_demo_vllm.py MODEL --bits 8 4 3 --prompt "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
import time

from vllm import LLM, SamplingParams

import vllm_matgptq
from matgptq.decode import prompt_ids


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="quantised model folder, or name on the Hugging Face hub")
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=range(2, 9), metavar="BITS", default=[8, 6, 4, 3, 2], help="widths, bits"
    )
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, tokens")
    parser.add_argument("--max-model-len", type=int, default=2048, help="longest prompt and answer, tokens")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs")
    parser.add_argument("--enforce-eager", action="store_true", help="no compilation, no CUDA graphs: a quick start")
    options = parser.parse_args()
    llm = LLM(
        model=options.model,
        max_model_len=options.max_model_len,
        tensor_parallel_size=options.tensor_parallel_size,
        enforce_eager=options.enforce_eager,
        **vllm_matgptq.engine_args(resident=True),
    )
    ids = prompt_ids(llm.get_tokenizer(), options.prompt)[0].tolist()
    sampling = SamplingParams(temperature=0, max_tokens=options.max_new_tokens)
    for bits in options.bits:
        ready = vllm_matgptq.set_bits(llm, bits)  # the same weights in memory, read at another width
        start = time.perf_counter()
        (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        answer = output.outputs[0]
        count = len(answer.token_ids)
        print(f"\n{bits} bits, ready after {ready:.2f} s:\n{answer.text.strip()}")
        print(f"[{count} tokens, {count / seconds:.1f} tokens/s]", flush=True)


if __name__ == "__main__":
    main()
