"""Times of every tile that fits a problem: what the rules of `matgptq.kernels.stream` and `hopper` are read off.

    PYTHONPATH=. python benchmarks/sweep_tiles.py --shapes 4096x14336 --bits 2 4 --batch-sizes 1 16 --out tiles.json

Each result is compared with that of the tile that `choose` takes, which `gpu_check.py` compares with float64. Tiles are
timed twice, the second time in the opposite order, as a GPU's clock falls while it works; the geometric mean counts.
The last columns of a row are the kernel, its tile (the fields of `stream.Config`, `hopper.HopperConfig` or
`many.ManyConfig` in order) and microseconds. With --sm the tiles are those of another kind of GPU, run on this one.
Exits with 1 if results differ, and with 2 if there is no CUDA GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from matgptq.bench import TOLERANCE, Case, new_report, other_planes, random_layer, time_calls, tokens
from matgptq.bench_linear import shape
from matgptq.kernels import hopper
from matgptq.kernels.launch import Launcher, compile_tiles, make_launcher
from matgptq.kernels.many import ManyConfig
from matgptq.kernels.stream import Config, fits, linear_choice, with_chunk
from matgptq.kernels.tiles import AnyConfig, Problem, choose, defines, supports

WARPS = [(n, k) for n in (1, 2, 4) for k in (2, 4, 8, 16) if 4 <= n * k <= 16]


def every_tile(problem: Problem) -> Iterator[AnyConfig]:
    """The tile that is chosen, then all others that fit and keep at least a third of the SMs of an H200 at work."""
    chosen = choose(problem)
    yield chosen
    others: list[AnyConfig] = [*linear_tiles(problem), *hopper_tiles(problem)]
    if problem.sm != 90 and problem.M >= 32:
        others = [linear_choice(problem), *many_tiles(problem)]
    for config in dict.fromkeys(others):
        blocks = -(-problem.N // config.rows) * -(-problem.M // config.tokens) * config.cluster
        if config != chosen and (blocks >= 44 or (isinstance(config, hopper.HopperConfig) and config.stream_k)):
            yield config


def many_tiles(problem: Problem) -> Iterator[ManyConfig]:
    """Tiles of many.cu."""
    most = 96 if problem.rounds else 128
    for t, stages, blocks in itertools.product((64, 96, 128), (2, 3, 4), (1, 2)):
        config = ManyConfig(t, stages, blocks)
        if t <= most and supports(config, problem):
            yield config


def linear_tiles(problem: Problem) -> Iterator[Config]:
    """Tiles of linear.cu and few.cu."""
    token_tiles = min(-(-problem.M // 8), 4)
    splits = (1, 2, 3, 4) if problem.sm >= 90 else (1,)
    for few, row_tiles, turn_tiles, (warps_n, warps_k), stages, blocks, split in itertools.product(
        (False, True), (1, 2), (1, 2), WARPS, (1, 2, 3, 4), (1, 2, 3), splits
    ):
        if few and (problem.M > 2 or row_tiles > 1 or (problem.group_size > 0 and problem.group_size % 64)):
            continue
        tiles = 1 if few else token_tiles
        config = Config(tiles, row_tiles, turn_tiles, warps_n, warps_k, stages, blocks, split, 0, few)
        config = with_chunk(problem, config)
        if not few and not fits(config, problem):  # less of x at a time
            config = replace(config, chunk_tiles=max(stages, 2) * warps_k * turn_tiles)
        if config.threads * blocks <= 1024 and fits(config, problem):
            yield config


def hopper_tiles(problem: Problem) -> Iterator[hopper.HopperConfig]:
    """Tiles of hopper.cu."""
    ways = ((False, False), (True, False), (False, True))
    for row_tiles, words, t, k_groups, blocks, splits, (pair, stream_k), long in itertools.product(
        (1, 2, 4), (1, 2), hopper.TOKENS, (1, 2, 4), (1, 2), range(1, 7), ways, (False, True)
    ):
        if t < min(problem.M, 48) or t >= 2 * max(problem.M, 8):
            continue
        config = hopper.HopperConfig(row_tiles, words, t, k_groups, blocks, splits, pair, stream_k, long_turns=long)
        if hopper.supports(config, problem):
            yield config


def sweep(case: Case, problem: Problem, configs: list[AnyConfig], device: torch.device) -> list[float]:
    """Microseconds of each tile.

    Raises:
        ArithmeticError: a result differs from the first tile's by more than rounding explains.
    """
    _, packed = random_layer(case, device)
    x = tokens(case, device)
    turns = [packed.planes, *other_planes(packed, device)]
    launchers = [make_launcher(problem, config, device.index) for config in configs]

    def call(launcher: Launcher, planes: Tensor, y: Tensor) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        launcher(stream, case.M, x.data_ptr(), planes.data_ptr(), packed.scales.data_ptr(), 0, 0, y.data_ptr())
        return y

    first = None
    times: list[list[float]] = [[] for _ in configs]
    for order in (range(len(configs)), range(len(configs) - 1, -1, -1)):
        for i in order:
            y = torch.full((case.M, case.N), float("nan"), device=device, dtype=x.dtype)
            got = call(launchers[i], packed.planes, y).double()
            first = got if first is None else first
            error = ((got - first).norm() / first.norm()).item()
            if not error <= TOLERANCE[x.dtype]:
                agree = f"results of tiles must agree to {TOLERANCE[x.dtype]}"
                raise ArithmeticError(f"{agree}, got {error:.2e} of {configs[i]}")
            times[i].append(time_calls([partial(call, launchers[i], planes, y) for planes in turns], device)["us"])
    return [math.sqrt(once * again) for once, again in times]


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxK", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 6, 8], help="widths, bits")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="tokens a call")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="type of activations")
    parser.add_argument("--group-size", type=int, default=128, help="weights that share a scale; -1: a whole row")
    parser.add_argument("--sm", type=int, help="architecture whose tiles are timed, 80 for sm_80 (default: this GPU's)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("sweep_tiles.py needs a CUDA GPU, and torch finds none", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    here = 10 * major + minor
    configs = {}
    for (N, K), bits, M in itertools.product(options.shapes, options.bits, options.batch_sizes):
        case = Case(M, N, K, bits, options.dtype, options.group_size)
        problem = Problem(M, N, K, bits, options.dtype, options.group_size, sm=options.sm or here)
        configs[case] = (replace(problem, sm=here), list(every_tile(problem)))
    every = [(problem, config) for problem, found in configs.values() for config in found]
    print(f"{len(every)} tiles of {len(configs)} problems, {compile_tiles(every)} kernels", flush=True)
    report = new_report(device)
    report["columns"] = ["M", "N", "K", "bits", "kernel", "tile", "us"]
    for case, (problem, found) in configs.items():
        times = sweep(case, problem, found, device)
        best = min(range(len(found)), key=times.__getitem__)
        print(f"{case}: {times[0]:.2f} us, best {times[best]:.2f} of {found[best]}", flush=True)
        for config, us in zip(found, times, strict=True):
            kernel, tile = defines(problem, config)["KERNEL"], [int(field) for field in astuple(config)]
            report["results"].append([case.M, case.N, case.K, case.bits, kernel, tile, round(us, 3)])
        if options.out:
            options.out.write_text(json.dumps(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
