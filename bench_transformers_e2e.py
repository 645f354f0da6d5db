"""Decoding speed of a quantised model in Transformers by width, beside a dense model of the same geometry.

    python bench_transformers_e2e.py MODEL --bits 2 3 4 6 8 --batch-sizes 1 4 16

The dense model has random weights: its speed does not depend on them. Loops:

    decoder    `matgptq.decode.Decoder`, a CUDA graph a step; `compiled` with torch.compile
    generate   Transformers' own `model.generate`; `static` with its static cache, which compiles on a GPU

Before it is timed, each answer is verified: a forward pass over the whole sequence must find every token of it the
likeliest, within what rounding can change.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import matgptq
from matgptq.bench import measured_commit
from matgptq.decode import Decoder
from matgptq.packed import check_device

LOOPS = ("decoder", "compiled", "generate", "static")
GIB = 2**30
MARGIN = 0.4  # random tokens are 4 off; bf16 in 32 layers of random weights, in two orders of summation, was 0.17


def answer(
    model: PreTrainedModel, loop: str, ids: Tensor, new_tokens: int, decoders: dict[tuple[str, int], Decoder]
) -> tuple[Callable[[], Tensor], float]:
    """What decodes ``new_tokens`` tokens after ``ids`` in a loop, and the seconds that it took to get ready.

    ``decoders`` keeps the model's, by loop and batch size: one serves all widths, and is compiled at the first.
    """
    start = time.perf_counter()
    if loop in ("decoder", "compiled"):
        size = ids.shape[1] + new_tokens
        if (loop, len(ids)) not in decoders:
            decoders[loop, len(ids)] = Decoder(model, batch_size=len(ids), max_length=size, compile=loop == "compiled")
        decoder = decoders[loop, len(ids)]

        def run() -> Tensor:
            return decoder.generate(ids, new_tokens)
    else:
        cache = {"cache_implementation": "static"} if loop == "static" else {}

        def run() -> Tensor:
            output = model.generate(
                ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **cache
            )
            return output[:, ids.shape[1] :].cpu()

    run()
    return run, time.perf_counter() - start


@torch.inference_mode()
def verify(model: PreTrainedModel, ids: Tensor, new: Tensor) -> float:
    """How far tokens are from the likeliest of a forward pass, at most, in standard deviations of the logits.

    Raises:
        ArithmeticError: further than rounding explains.
    """
    sequence = torch.cat([ids, new.to(ids.device)], dim=1)
    logits = model(sequence[:, :-1]).logits[:, ids.shape[1] - 1 :].float()
    chosen = logits.gather(-1, sequence[:, ids.shape[1] :, None])[..., 0]
    short = (logits.amax(-1) - chosen) / logits.std(-1)
    worst = short.max().item()
    if not worst <= MARGIN:
        further = f"{(~(short <= MARGIN)).sum().item()} of {short.numel()}"
        raise ArithmeticError(
            f"tokens must be the likeliest within {MARGIN} standard deviations, got {worst:.3f} ({further} are further)"
        )
    return worst


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights in memory."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def seconds_of(run: Callable[[], Tensor], repeats: int) -> float:
    """Median of ``repeats`` runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def dense_model(config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A dense model of the same geometry with random weights."""
    config.quantization_config = None
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.init_weights()
    model.tie_weights()
    return model.eval()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="quantised model folder, or name on the Hugging Face hub")
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=range(2, 9), metavar="BITS", default=[2, 3, 4, 6, 8], help="widths"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="sequences at a time")
    parser.add_argument("--loops", choices=LOOPS, nargs="+", default=["decoder", "compiled", "generate"])
    parser.add_argument("--generate-bits", type=int, nargs="+", default=[4], help="widths that `generate` is timed at")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="runs, whose median counts")
    parser.add_argument("--packed", action="store_true", help="hold the width of the folder alone, not all")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense model out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    try:
        check_device(options.device, "--device")
    except ValueError as error:
        parser.error(str(error))
    if min(*options.batch_sizes, options.prompt_tokens, options.new_tokens, options.repeats) < 1:
        parser.error("--batch-sizes, --prompt-tokens, --new-tokens and --repeats must be positive")
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device.index or 0)  # whose memory is told
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": measured_commit(),
        "date": date.today().isoformat(),
        "model": Path(options.model).name,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "results": [],
        "width_changes": [],
    }

    decoders: dict[tuple[str, int], Decoder] = {}

    def measure(model: PreTrainedModel, bits: int, loop: str, more: dict[str, Any]) -> None:
        row: dict[str, Any] = {"linear": "dense" if bits == 16 else "matgptq", "bits": bits, "loop": loop, **more}
        row |= {"seconds": {}, "tokens_per_second": {}, "ready_seconds": {}}
        for batch in options.batch_sizes:
            ids = torch.randint(
                3,
                model.config.vocab_size,
                (batch, options.prompt_tokens),
                generator=torch.Generator().manual_seed(batch),
            ).to(device)
            run, ready = answer(model, loop, ids, options.new_tokens, decoders)
            row["worst_margin"] = max(row.get("worst_margin", 0), verify(model, ids, run()))
            seconds = seconds_of(run, 1 if loop == "generate" else options.repeats)
            row["seconds"][str(batch)] = round(seconds, 5)
            row["tokens_per_second"][str(batch)] = round(batch * options.new_tokens / seconds, 1)
            row["ready_seconds"][str(batch)] = round(ready, 2)
        print(
            f"{bits:>2} bits {loop:>9}: "
            + ", ".join(f"{r} tokens/s at {b}" for b, r in row["tokens_per_second"].items())
        )
        report["results"].append(row)
        save()

    def save() -> None:
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def reset_peak() -> None:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    reset_peak()
    start = time.perf_counter()
    model = matgptq.load(
        options.model, device=device, resident=not options.packed, dtype="auto" if on_gpu else torch.float32
    )
    if on_gpu:
        torch.cuda.synchronize()
    sizes = {"mode": "packed" if options.packed else "resident", "load_seconds": round(time.perf_counter() - start, 2)}
    sizes["weights_gib"] = round(held_bytes(model) / GIB, 2)
    sizes["load_peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2) if on_gpu else None
    print(f"loaded {sizes}")
    config = AutoConfig.from_pretrained(options.model)
    for loop in options.loops:
        for bits in options.generate_bits if loop in ("generate", "static") else options.bits:
            matgptq.set_bits(model, bits)
            measure(model, bits, loop, sizes)
    report["width_changes"] = width_changes(model, options, device)
    save()
    dtype = model.dtype
    decoders.clear()
    del model
    reset_peak()
    if not options.no_dense:
        model = dense_model(config, device, dtype)
        for loop in options.loops:
            measure(model, 16, loop, {"mode": "dense", "weights_gib": round(held_bytes(model) / GIB, 2)})


def width_changes(model: PreTrainedModel, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """What a change of width costs a decoder that has run: seconds to be ready, memory, and whether tokens are the same
    when the width comes back."""
    ids = torch.randint(3, model.config.vocab_size, (1, options.prompt_tokens), device=device)
    decoder = Decoder(model, max_length=options.prompt_tokens + options.new_tokens)
    first: dict[int, Tensor] = {}
    changes = []
    for bits in (*options.bits, *options.bits):
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        start = time.perf_counter()
        matgptq.set_bits(model, bits)
        decoder.prepare()
        seconds = time.perf_counter() - start
        memory = (torch.cuda.memory_allocated() - before if device.type == "cuda" else 0) / 2**20
        tokens = decoder.generate(ids, options.new_tokens)
        same = torch.equal(first.setdefault(bits, tokens), tokens)
        changes.append(
            {"bits": bits, "seconds": round(seconds, 4), "memory_mib": round(memory, 2), "same_tokens": same}
        )
        print(f"to {bits} bits: {seconds * 1e3:.1f} ms, {memory:.1f} MiB, tokens {'as before' if same else 'DIFFER'}")
        if not same:
            raise ArithmeticError(f"tokens must be the same when a width comes back, got others at {bits} bits")
    return changes


if __name__ == "__main__":
    main()
