"""Where the time of a decoding step goes: GPU microseconds by kernel, of one replay of the step's CUDA graph.

    python benchmarks/profile_decode.py --arch llama-3.1-8b --layers 4 --bits 4 --compile

A few layers of a geometry with random weights are enough: the rest are like them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

import matgptq
from matgptq.decode import Decoder
from matgptq.dummy import model_config, write_dummy
from matgptq.inductor import step_options
from matgptq.overlap import OPTION


def main() -> None:
    """Run the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="llama-3.1-8b", help="as of `matgptq dummy`")
    parser.add_argument("--layers", type=int, default=4, help="layers of it")
    parser.add_argument("--bits", type=int, nargs="+", default=[4], help="widths, bits; 16: dense")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--no-join", action="store_true", help="a call for each layer, even where they share an input")
    parser.add_argument("--no-overlap", action="store_true", help="generated kernels start when all before has ended")
    options = parser.parse_args()
    config = model_config(options.arch)
    config.num_hidden_layers = options.layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: options.layers]
    for bits in options.bits:
        with tempfile.TemporaryDirectory() as place:
            config.save_pretrained(Path(place) / "config")
            dense = bits == 16
            write_dummy(
                Path(place) / "config",
                Path(place) / "model",
                quantization=None if dense else matgptq.QuantConfig(bits=bits),
                stored_bits=None if dense else bits,
                device="cuda",
            )
            profile(Path(place) / "model", bits, options)


@torch.inference_mode()
def profile(folder: Path, bits: int, options: argparse.Namespace) -> None:
    """Print a step's kernels, the longest first."""
    if bits == 16:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to("cuda").eval()
    else:
        model = matgptq.load(folder, device="cuda")
        for layer in matgptq.quantized_layers(model).values() if options.no_join else ():
            layer.register_buffer("planes", layer.get_buffer("planes").clone())  # no longer beside its neighbours'
    decoder = Decoder(model, batch_size=options.batch_size, max_length=options.max_length, compile=options.compile)
    if options.compile and options.no_overlap:
        inductor = {name: value for name, value in step_options(model.device).items() if name != OPTION}
        decoder._compute = torch.compile(decoder._next, fullgraph=True, dynamic=False, options=inductor)
    ids = torch.randint(3, model.config.vocab_size, (options.batch_size, 32))
    decoder.generate(ids, 8)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    decoder._cache.reset()
    start.record()
    for _ in range(32):
        decoder._step()
    end.record()
    end.synchronize()
    steps = start.elapsed_time(end) / 32
    decoder._cache.reset()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        decoder._step()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in record.events():
        if str(event.device_type).endswith("CUDA"):
            times[event.name].append(event.device_time)
    total = sum(map(sum, times.values()))
    print(f"{bits} bits: {steps * 1e3:.0f} us a step, {total:.0f} us in {sum(map(len, times.values()))} kernels:")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"{sum(each):8.1f} us {len(each):4} x {name[:110]}")


if __name__ == "__main__":
    main()
