"""Decoding speed in vLLM by width and batch, beside bf16 and 4-bit GPTQ of the same geometry.

    python bench_vllm_e2e.py --arch llama-3.1-8b --bits 2 3 4 6 8 --batch-sizes 1 2 4 8 16

Each engine runs in a process of its own, with random weights (``--load-format dummy``), which need no files: speed does
not depend on them. Before it is timed, it must give finite logits, and the same greedy tokens twice. Each time is the
best but one of ``--runs`` runs after two more. Results are written as they come; an engine that fails is reported, the
others go on, and the exit status is 1.

    bf16       dense
    marlin     4-bit GPTQ, groups of 128, vLLM's Marlin kernel
    gptq       the same by the kernel that vLLM prefers on this GPU
    BITS       packed at that width
    resident   all bits in memory: one engine, its width changed to each of --bits in turn
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
GIB = 2**30
NAMES = {"bf16": "bf16", "marlin": "GPTQ 4 bit g128, Marlin", "gptq": "GPTQ 4 bit g128, vLLM's default"}
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GPTQ = {
    **{"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False},
    "modules_in_block_to_quantize": [LAYERS],  # else vLLM looks for them in the weights' file, which is not there
}
COMPUTED_BY = {"bf16": "UnquantizedLinearMethod", "marlin": "MarlinLinearKernel", "gptq": "LinearKernel"}
OTHER_KERNELS = "MacheteLinearKernel,CutlassW4A8LinearKernel,AllSparkLinearKernel,ConchLinearKernel,ExllamaLinearKernel"


def write_config(dense: dict[str, Any], engine: str, options: argparse.Namespace, folder: Path) -> None:
    """Write the config.json of an engine: all that a model with dummy weights needs."""
    values = {**dense, "dtype": options.dtype}
    if engine in ("marlin", "gptq"):
        values["quantization_config"] = GPTQ
    elif engine != "bf16":
        bits = max(options.bits) if engine == "resident" else int(engine)
        ours = {"quant_method": "matgptq", "bits": bits, "group_size": options.group_size, "slicing": options.slicing}
        values["quantization_config"] = ours
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def memory(worker: Any) -> dict[str, Any]:
    """Run on the worker: what the weights weigh, the most that was allocated by then, and what multiplies by them."""
    from vllm.model_executor.layers.linear import LinearBase

    from vllm_matgptq.linear import FusedLinear

    model = worker.model_runner.get_model()
    # not the state dict: packed layers unpack for that
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    peaks = [module.peak_bytes for module in model.modules() if isinstance(module, FusedLinear)]
    methods = [module.quant_method for module in model.modules() if isinstance(module, LinearBase)]
    return {
        "weights_gib": round(sum(sizes.values()) / GIB, 3),
        "load_peak_gib": round(max(peaks) / GIB, 3) if peaks else None,
        "computed_by": sorted({type(getattr(method, "kernel", method)).__name__ for method in methods}),
    }


def generate(llm: Any, batch: int, prompt: int, new: int, seed: int = 0, **sampling: Any) -> tuple[float, list[Any]]:
    """Seconds of one ``LLM.generate`` of ``batch`` random prompts, and its outputs."""
    import torch
    from vllm import SamplingParams

    ids = torch.randint(100, 1000, (batch, prompt), generator=torch.Generator().manual_seed(seed)).tolist()
    parameters = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **sampling)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": row} for row in ids], parameters, use_tqdm=False)
    return time.perf_counter() - start, outputs


def start_profile(worker: Any) -> None:
    """Run on the worker: record the GPU's kernels from now on."""
    import torch

    worker.matgptq_profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    worker.matgptq_profile.start()


def stop_profile(worker: Any) -> tuple[list[tuple[str, int, float]], float]:
    """Run on the worker: kernels since `start_profile`, how many and microseconds of all, the longest first; and the
    microseconds in which any of them ran."""
    import torch

    torch.cuda.synchronize()
    record = worker.__dict__.pop("matgptq_profile")
    record.stop()
    times: dict[str, list[float]] = {}
    busy, end = 0.0, float("-inf")
    events = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(events, key=lambda event: event.time_range.start):
        times.setdefault(event.name[:120], []).append(event.device_time)
        busy += max(0.0, event.time_range.end - max(end, event.time_range.start))
        end = max(end, event.time_range.end)
    return sorted(((name, len(each), sum(each)) for name, each in times.items()), key=lambda item: -item[2]), busy


def profile(llm: Any, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Where the GPU's time goes in a step: calls and microseconds by kernel, which may overlap. Recording slows it."""
    llm.collective_rpc(start_profile)
    seconds, _ = generate(llm, batch, options.input_len, options.output_len)
    kernels, busy = llm.collective_rpc(stop_profile)[0]
    steps = options.output_len
    us = {name: [round(count / steps, 2), round(total / steps, 1)] for name, count, total in kernels[:20]}
    others = round(sum(total for *_, total in kernels[20:]) / steps, 1)
    step = {"step_us": round(seconds / steps * 1e6, 1), "busy_us": round(busy / steps, 1)}
    return {"batch": batch, **step, "calls_and_us_a_step": us, "us_of_others": others}


def verify(llm: Any, new: int) -> None:
    """Raise an ArithmeticError unless logits are finite, and greedy tokens are the same twice.

    One prompt at a time: of two, the engine may compute the first alone before it has the second.
    """
    runs = [[generate(llm, 1, 32, new, seed, logprobs=1)[1][0] for seed in range(2)] for _ in range(2)]
    tokens = [[list(output.outputs[0].token_ids) for output in run] for run in runs]
    if tokens[0] != tokens[1]:
        raise ArithmeticError(f"greedy tokens must be the same twice, got {tokens[0]} and {tokens[1]}")
    for output in runs[0]:
        for step in output.outputs[0].logprobs:
            for found in step.values():
                if not -1e4 < found.logprob <= 0:
                    raise ArithmeticError(f"logits must be finite, got a logarithm {found.logprob} of a probability")


def measure(llm: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by batch size, and what the options ask for besides."""
    verify(llm, min(16, options.output_len))
    row: dict[str, Any] = {"seconds": {}}
    for batch in options.batch_sizes:
        times = [generate(llm, batch, options.input_len, options.output_len)[0] for _ in range(2 + options.runs)][2:]
        row["seconds"][str(batch)] = round(sorted(times)[min(1, len(times) - 1)], 4)
        print(f"   batch {batch}: {row['seconds'][str(batch)]} s", flush=True)
    if options.ttft:
        times = [generate(llm, 1, options.ttft, 1, seed=i)[0] for i in range(2 + options.runs)][2:]
        row["ttft"] = {"tokens": options.ttft, "seconds": round(sorted(times)[min(1, len(times) - 1)], 4)}
    if options.concurrent:
        times = [generate(llm, options.concurrent, 128, 128, seed=i)[0] for i in range(3)][1:]
        rate = options.concurrent * 128 / min(times)
        row["throughput"] = {"requests": options.concurrent, "output_tokens_per_second": round(rate, 1)}
    if options.profile:
        row["profile"] = profile(llm, options.profile, options)
    return row


def run_engine(engine: str, folder: Path, options: argparse.Namespace, results: Connection) -> None:
    """Start an engine, measure it and send a row a width. Runs in a process of its own."""
    os.setsid()  # so that what vLLM starts can be ended with it
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # `memory` goes to the worker as a function
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if engine == "marlin":
        os.environ["VLLM_DISABLED_KERNELS"] = OTHER_KERNELS
    try:
        import torch
        import vllm

        import vllm_matgptq

        sizes = sorted({*options.batch_sizes, *filter(None, (options.concurrent, options.profile))})
        arguments: dict[str, Any] = {
            "max_model_len": max(options.input_len + options.output_len, (options.ttft or 0) + 16, 272),
            "max_num_seqs": max(2, *sizes),
            "compilation_config": {"cudagraph_capture_sizes": sizes},
            "tensor_parallel_size": options.tensor_parallel_size,
            "enforce_eager": options.enforce_eager,
        }
        if options.kv_cache_gib:
            arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gib * GIB)
        if engine == "resident":
            arguments |= vllm_matgptq.engine_args(resident=True)
        start = time.perf_counter()
        llm = vllm.LLM(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=options.dtype,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **arguments,
        )
        head = {"start_seconds": round(time.perf_counter() - start, 1), **llm.collective_rpc(memory)[0]}
        asked = COMPUTED_BY.get(engine, "MatGPTQLinearMethod")
        if not all(name.endswith(asked) for name in head["computed_by"]):
            raise RuntimeError(f"{engine}'s linear layers must be computed by {asked}, got {head['computed_by']}")
        device = llm.collective_rpc(device_name)[0]
        results.send({"device": device, "vllm": vllm.__version__, "torch": torch.__version__})
        for bits in options.bits if engine == "resident" else [None]:
            row: dict[str, Any] = {"linear": NAMES.get(engine, f"matgptq {engine} bit"), **head}
            if bits is not None:
                row |= {"linear": f"matgptq {bits} bit, resident", "bits": bits, "mode": "resident"}
                row["change_seconds"] = round(vllm_matgptq.set_bits(llm, bits), 2)
                print(f"   {bits} bits, changed in {row['change_seconds']} s", flush=True)
            elif engine not in NAMES:
                row |= {"bits": int(engine), "mode": "packed"}
            else:
                row |= {"bits": 16 if engine == "bf16" else 4}
            results.send({"row": {**row, **measure(llm, options)}})
    except BaseException as error:
        traceback.print_exc()
        results.send({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"})
    finally:
        results.send(None)
        sys.stdout.flush()
        sys.stderr.flush()


def device_name(worker: Any) -> str:
    """Run on the worker: the GPU's name, or CPU."""
    import torch

    return torch.cuda.get_device_name() if worker.model_runner.device.type == "cuda" else "CPU"


def collect(engine: str, folder: Path, options: argparse.Namespace, report: dict[str, Any], out: Path | None) -> str:
    """Run an engine; add its rows to the report, which is written each time. Returns what went wrong, or nothing."""
    from matgptq.bench import write

    ours, theirs = multiprocessing.Pipe(duplex=False)
    # forked, so that vLLM is imported once: no GPU is touched in this process
    process = multiprocessing.get_context("fork").Process(target=run_engine, args=(engine, folder, options, theirs))
    process.start()
    theirs.close()
    deadline, error = time.monotonic() + options.timeout, "the engine's process ended"
    while True:
        try:
            message = ours.recv() if ours.poll(max(0, deadline - time.monotonic())) else {"error": "timed out"}
        except EOFError:
            break
        if message is None:
            error = ""
            break
        if "error" in message:
            error = message["error"]
            break
        row = message.pop("row", None)
        report.update(message)
        if row:
            report["results"] = [r for r in report["results"] if r["linear"] != row["linear"]] + [row]
            if out is None:
                gpu = report["device"].removeprefix("NVIDIA ").split()[0].lower()
                out = ROOT / "benchmarks" / "results" / gpu / "vllm.json"
            write(report, out)
            print(f"   {json.dumps(row)}", flush=True)
    process.join(30)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what is left of it would keep the GPU's memory
    process.join()
    return error


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", default="llama-3.1-8b", help="geometry: a name that `matgptq dummy` knows, or a folder"
    )
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 6, 8], help="widths, bits")
    parser.add_argument(
        "--engines", nargs="+", help="of bf16, marlin, gptq, resident, and widths (default: bf16 marlin and --bits)"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="requests at a time")
    parser.add_argument("--input-len", type=int, default=32, help="tokens a prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens an answer")
    parser.add_argument("--runs", type=int, default=4, help="timed runs; the best but one counts")
    parser.add_argument("--ttft", type=int, metavar="TOKENS", help="also time the first token after a prompt so long")
    parser.add_argument(
        "--concurrent", type=int, metavar="REQUESTS", help="also the throughput of so many, 128 + 128 tokens"
    )
    parser.add_argument("--profile", type=int, metavar="BATCH", help="also a step's kernels, by torch.profiler")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--group-size", type=int, default=128, help="weights that share a scale")
    parser.add_argument("--slicing", default="round", choices=["round", "prefix"])
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs")
    parser.add_argument("--enforce-eager", action="store_true", help="no compilation, no CUDA graphs")
    parser.add_argument("--kv-cache-gib", type=float, help="memory for keys and values, GiB (default: vLLM's)")
    parser.add_argument("--timeout", type=float, default=300, help="longest that an engine may take, seconds")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/<gpu>/vllm.json)")
    parser.add_argument("--append", action="store_true", help="keep the other rows of the results file --out")
    options = parser.parse_args()
    engines = options.engines or ["bf16", "marlin", *map(str, options.bits)]
    for engine in engines:
        if engine not in (*NAMES, "resident") and engine not in map(str, range(2, 9)):
            parser.error(f"--engines must be of bf16, marlin, gptq, resident, 2 to 8, got {engine}")

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read when vLLM is imported
    import transformers
    import vllm.entrypoints.llm  # noqa: F401 - imported here once for all engines, which are forked

    from matgptq.bench import measured_commit
    from matgptq.dummy import model_config

    dense = {**model_config(options.arch).to_dict()}
    dense.pop("quantization_config", None)
    if not dense.get("architectures"):
        from transformers import AutoModelForCausalLM

        config = model_config(options.arch)
        dense["architectures"] = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    report: dict[str, Any] = {
        "device": "",
        "vllm": "",
        "torch": "",
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
        "commit": measured_commit(),
        "model": f"{options.arch} geometry, dummy weights, {options.dtype}, groups of {options.group_size}",
        "method": f"LLM.generate, {options.input_len} tokens in, {options.output_len} out, greedy, no stop; "
        f"best but one of {options.runs} runs after 2; seconds by batch size",
        "results": [],
    }
    if options.append and options.out and options.out.exists():
        report["results"] = json.loads(options.out.read_text(encoding="utf-8"))["results"]
    failed = {}
    with tempfile.TemporaryDirectory() as temporary:
        for engine in engines:
            print(f"== {engine}", flush=True)
            folder = Path(temporary) / engine
            write_config(dense, engine, options, folder)
            start = time.perf_counter()
            error = collect(engine, folder, options, report, options.out)
            print(f"   {time.perf_counter() - start:.0f} s in all", flush=True)
            if error:
                failed[engine] = error
                print(f"   failed: {error}", flush=True)
    for engine, error in failed.items():
        print(f"{engine} failed: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
