"""Verify, then time one linear layer against torch.matmul: table, plots (SVG and PNG) and JSON.

    python bench_matgptq_matmul.py --n_out_features 8192 --n_in_features 8192

On a machine without a GPU the CPU op is timed, and the output says so.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch

from matgptq.bench import Case, measure, plot, table, write


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_out_features", type=int, required=True, help="rows of the weight")
    parser.add_argument("--n_in_features", type=int, required=True, help="columns of the weight")
    parser.add_argument("--group-size", type=int, default=128, help="weights that share a scale; -1: a whole row")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="type of activations")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 6, 8], help="widths, bits")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="tokens a call")
    parser.add_argument("--resident", action="store_true", help="hold all bits, choose the width per call")
    parser.add_argument("--no_cudagraph", action="store_true", help="launch every call from Python")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the plots and the JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no GPU here: these are the times of the CPU op, not of the kernels")
    mode = "resident" if options.resident else "packed"
    cases = [
        Case(m, options.n_out_features, options.n_in_features, bits, options.dtype, options.group_size, mode)
        for bits, m in product(options.bits, options.batch_sizes)
    ]
    if min(options.batch_sizes) < 1:
        parser.error(f"--batch-sizes must be positive, got {min(options.batch_sizes)}")
    try:
        report = measure(cases, device, cuda_graph=not options.no_cudagraph)
    except ValueError as error:
        parser.error(str(error))
    print(table(report))
    name = f"{options.n_out_features}x{options.n_in_features}_{options.dtype}_{mode}"
    title = f"{report['device']}, {options.n_out_features} x {options.n_in_features}, {options.dtype}, {mode}"
    plot(report, [options.out / f"{name}.svg", options.out / f"{name}.png"], title)
    write(report, options.out / f"{name}.json")
    print(f"wrote {options.out / name}.svg, .png and .json")


if __name__ == "__main__":
    main()
