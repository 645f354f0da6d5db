"""Time two layers alone, with gate.cu after them, and gated by their own kernel.

    PYTHONPATH=. python benchmarks/gated_tiles.py --shapes 14336x4096 --bits 4 --batch-sizes 1 16 256

A shape is outputs x in_features of one of the two. Results, in bfloat16, are verified against the first way. --out
writes a row [M, N, K, bits, microseconds by way] for each. Exits with 2 if there is no CUDA GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from matgptq.bench import TOLERANCE, Case, new_report, other_planes, random_layer, time_calls, tokens, write
from matgptq.bench_linear import shape
from matgptq.kernels.launch import Launcher, compile_tiles, make_launcher
from matgptq.kernels.op import silu_and_mul
from matgptq.kernels.tiles import Problem, choose, gated_choice


def time_ways(problem: Problem, device: torch.device) -> dict[str, float]:
    """Microseconds of each way that there is for a gated problem.

    Raises:
        ArithmeticError: a result differs from the first way's by more than rounding explains.
    """
    layer = choose(problem.layer)
    ways = {"layers": (problem.layer, layer), "gate.cu after them": (problem, layer)}
    gated = gated_choice(problem, layer)
    if gated:
        ways["gated"] = problem, gated
    compile_tiles(ways.values())
    case = Case(problem.M, 2 * problem.N, problem.K, problem.bits, problem.dtype, problem.group_size)
    _, packed = random_layer(case, device)
    x = tokens(case, device) * 0.3
    planes = [packed.planes, *other_planes(packed, device)]

    def call(launcher: Launcher, planes: Tensor, y: Tensor) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        launcher(stream, problem.M, x.data_ptr(), planes.data_ptr(), packed.scales.data_ptr(), 0, 0, y.data_ptr())
        return y

    times: dict[str, float] = {}
    want = None
    for name, (asked, tile) in ways.items():
        launcher = make_launcher(asked, tile, device.index)
        y = torch.full((problem.M, asked.N), float("nan"), device=device, dtype=x.dtype)
        got = call(launcher, packed.planes, y)
        want = silu_and_mul(got).double() if want is None else want
        error = ((got.double() - want).norm() / want.norm()).item() if times else 0.0
        if not error <= TOLERANCE[x.dtype]:
            raise ArithmeticError(f"results must agree to {TOLERANCE[x.dtype]}, got {error:.2e} of {tile}")
        times[name] = time_calls([partial(call, launcher, each, y) for each in planes], device)["us"]
    return times


def main() -> None:
    """Print microseconds of each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxK", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8], help="widths, bits")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="tokens a call")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gated_tiles.py needs a CUDA GPU, and torch finds none", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    report = new_report(device)
    for (N, K), bits, M in itertools.product(options.shapes, options.bits, options.batch_sizes):
        times = time_ways(Problem(M, N, K, bits, "bfloat16", sm=10 * major + minor, gated=True), device)
        shown = ", ".join(f"{name} {us:.2f}" for name, us in times.items())
        print(f"2 x {N} x {K}, {bits} bits, M = {M}: {shown} us", flush=True)
        report["results"].append([M, N, K, bits, {name: round(us, 2) for name, us in times.items()}])
    if options.out:
        write(report, options.out)


if __name__ == "__main__":
    main()
