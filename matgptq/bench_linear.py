"""``matgptq bench linear``: which layers are timed, and the options that choose them."""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .bench import Case, call_cost, measure, table, write
from .kernels.tiles import Problem, can_implement
from .peers import humming_times

Shape = tuple[int, int]  # out_features, in_features

SHAPES: tuple[Shape, ...] = (
    (2048, 2048),
    (4096, 4096),
    (8192, 8192),
    (16384, 16384),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
)
SQUARES: tuple[Shape, ...] = ((4096, 4096), (8192, 8192), (16384, 16384))
# q/k/v in one layer, output, gate and up in one, down: as engines run them
MODELS: dict[str, tuple[Shape, ...]] = {
    "llama-3.1-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "qwen3-4b": ((6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)),
    "qwen3-8b": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
    "qwen3-14b": ((7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408)),
    "qwen3-32b": ((10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LARGE_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``matgptq bench linear``."""
    add = parser.add_argument
    add("what", choices=("linear",), help="linear: one quantised linear layer against torch.matmul")
    add("--shapes", type=shape, nargs="+", metavar="NxK", help="out_features x in_features (seven from 2048x2048)")
    add("--models", nargs="+", choices=tuple(MODELS), metavar="MODEL", help=f"shapes of {', '.join(MODELS)}")
    add("--bits", type=int, nargs="+", default=list(range(2, 9)), help="widths, bits")
    add("--batch-sizes", type=int, nargs="+", default=list(BATCHES), help="tokens a call")
    add("--large", action="store_true", help=f"batch sizes {LARGE_BATCHES[0]} to {LARGE_BATCHES[-1]} instead")
    add("--dtypes", nargs="+", choices=("float16", "bfloat16"), default=["float16"], help="types of activations")
    add("--group-sizes", type=int, nargs="+", default=[128], help="weights that share a scale; -1: a whole row")
    add(
        "--modes",
        nargs="+",
        choices=("packed", "resident"),
        help="how weights are held (packed; resident too at the squares from 4096 and up to 16 tokens)",
    )
    add("--humming-shapes", type=shape, nargs="+", metavar="NxK", default=list(SQUARES), help="where to time Humming")
    add("--humming-bits", type=int, nargs="+", default=[2, 4, 8], help="widths to time Humming at, bits")
    add("--humming-batch-sizes", type=int, nargs="+", default=[1, 8, 16, 64], help="tokens to time Humming at")
    add("--humming-seconds", type=float, default=60, help="time for compiling and timing Humming; 0: not at all")
    add("--no-cudagraph", action="store_true", help="launch every call from Python")
    add("--device", help="where to compute (a GPU if there is one)")
    add("--out", type=Path, help="JSON file of the results (benchmarks/results/<gpu>/linear.json)")
    add("--quiet", action="store_true", help="no progress bar and no table")


def shape(text: str) -> Shape:
    """``"NxK"`` as two numbers."""
    rows, x, columns = text.partition("x")
    if not (x and rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"a shape must be out_features x in_features, such as 8192x8192, got {text!r}")
    return int(rows), int(columns)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time what the options ask for; the results file is written after every layer."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = cases(options)
    for case in wanted:
        problem = Problem(max(case.M, 1), case.N, case.K, case.bits, case.dtype, case.group_size)
        able, reason = can_implement(problem)
        if not able or case.M < 1:
            raise ValueError(reason or f"batch sizes must be positive, got {case.M}")
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ").replace(" ", "_").lower() if gpu else "cpu"
    out = options.out or Path("benchmarks") / "results" / name / "linear.json"
    if not gpu and not options.quiet:
        print("no GPU here: these are the times of the CPU op, not of the kernels", file=sys.stderr)
    beside = [
        case
        for case in wanted
        if (case.N, case.K) in options.humming_shapes
        and case.bits in options.humming_bits
        and case.M in options.humming_batch_sizes
        and case.mode == "packed"
    ]
    cuda_graph = not options.no_cudagraph
    report = measure(
        wanted,
        device,
        cuda_graph=cuda_graph,
        progress=not options.quiet,
        peers_us=humming_times(beside, device, seconds=options.humming_seconds, cuda_graph=cuda_graph),
        done=lambda report: write(report, out),
    )
    if gpu:
        report["call_us"] = call_cost(device)
        write(report, out)
    if not options.quiet:
        print(table(report))
        print(f"wrote {out}")
    return {"out": str(out), "device": report["device"], "cases": len(report["results"])}


def cases(options: argparse.Namespace) -> list[Case]:
    """What the options ask for, layer by layer."""
    shapes = [*(options.shapes or ()), *(s for model in options.models or () for s in MODELS[model])] or SHAPES
    batches = LARGE_BATCHES if options.large else options.batch_sizes
    choices = product(dict.fromkeys(shapes), options.dtypes, options.group_sizes, options.bits, batches)
    found = []
    for (N, K), dtype, group_size, bits, M in choices:
        modes = options.modes or (["packed", "resident"] if (N, K) in SQUARES and M <= 16 else ["packed"])
        found += [Case(M, N, K, bits, dtype, group_size, mode) for mode in modes]
    return found
