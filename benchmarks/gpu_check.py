"""Check the CUDA kernels on this machine's GPU, then time them.

    python benchmarks/gpu_check.py --out build/gpu_check.json

The checks run at every width, dtype, rule and way of holding weights. Times are of CUDA-graph replays over rotating
weights. Exits with 1 if a check fails, and with 2 if there is no CUDA GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq.kernels.launch import Launcher
from matgptq.kernels.matmul import matmul, warmup
from matgptq.kernels.packing import pack_codes, pack_scales, unpack
from matgptq.kernels.tiles import Config, Problem, choose
from matgptq.slicing import slice_codes

SHAPES = [(2048, 2048), (4096, 4096), (8192, 8192), (16384, 16384), (6144, 4096), (28672, 4096), (4096, 14336)]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}


class Layer:
    """A random layer and its float64 weights."""

    def __init__(
        self,
        N: int,
        K: int,
        bits: int,
        dtype: str = "float16",
        group_size: int = 128,
        rule: str = "round",
        resident: bool = False,
        zeros: bool = False,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        make = torch.Generator("cuda").manual_seed(seed)
        codes = torch.randint(0, 256, (N, K), dtype=torch.uint8, device="cuda", generator=make)
        groups = 1 if group_size == -1 else K // group_size
        scales = (torch.rand((N, groups), device="cuda", generator=make) * 0.01 + 0.002).to(DTYPES[dtype])
        zero = (
            torch.rand((N, groups), device="cuda", generator=make) * 60 + 98
            if zeros
            else torch.full((N, groups), 128.0, device="cuda")
        )
        self.scales, self.zeros = pack_scales(scales), pack_scales(zero) if zeros else None
        self.bias = torch.randn(N, device="cuda", generator=make).to(DTYPES[dtype]) if bias else None
        self.slices = slice_codes(codes, bits, rule)
        self.planes = pack_codes(codes, 8) if resident else pack_codes(self.slices, bits)
        level = self.slices.double() * 2 ** (8 - bits) + ((2 ** (8 - bits) - 1) / 2 if rule == "prefix" else 0)
        per_column = K if group_size == -1 else group_size
        self.weight = (level - zero.double().repeat_interleave(per_column, 1)) * scales.double().repeat_interleave(
            per_column, 1
        )
        self.options: dict[str, Any] = {
            "bits": bits,
            "group_size": group_size,
            "in_features": K,
            "out_features": N,
            "rule": rule,
            "resident": resident,
        }

    def __call__(self, x: Tensor) -> Tensor:
        """The kernels' product."""
        return matmul(x, self.planes, self.scales, self.zeros, self.bias, **self.options)

    def reference(self, x: Tensor) -> Tensor:
        """The product in float64."""
        y = x.double() @ self.weight.T
        return y if self.bias is None else y + self.bias.double()


def problem_of(layer: dict[str, Any], M: int) -> Problem:
    """The kernels' problem for a layer's options and M tokens."""
    major, minor = torch.cuda.get_device_capability()
    return Problem(
        M, sm=10 * major + minor, **{name: value for name, value in layer.items() if name not in ("bias", "seed")}
    )


def poison() -> None:
    """Leaves NaN in the memory that the next outputs are likely to be given."""
    trash = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 10, 1 << 14, 1 << 18, 1 << 20)]
    del trash


def relative_error(y: Tensor, reference: Tensor) -> float:
    """Norm of the difference over that of the reference."""
    return float((y.double() - reference).norm() / reference.norm())


class Checks:
    """What was checked, and what failed."""

    def __init__(self) -> None:
        self.run = 0
        self.failures: list[str] = []
        self.worst: dict[str, float] = {}

    def expect(self, condition: bool, name: str) -> None:
        """Count a check; keep and print its name if it failed."""
        self.run += 1
        if not condition:
            self.failures.append(name)
            if len(self.failures) <= 40:
                print("FAILED", name, flush=True)

    def close(self, layer: Layer, x: Tensor, name: str) -> None:
        """Compare a product with float64."""
        poison()
        dtype = str(x.dtype).split(".")[-1]
        error = relative_error(layer(x), layer.reference(x))
        self.worst[dtype] = max(self.worst.get(dtype, 0), error)
        self.expect(error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}")


def tokens(M: int, K: int, dtype: str, seed: int = 1) -> Tensor:
    """Normal random activations."""
    return torch.randn((M, K), device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(DTYPES[dtype])


def check_decoding(checks: Checks) -> None:
    """One-hot activations: the outputs are the weights, bit for bit."""
    N, K = 200, 256
    cases = list(itertools.product(range(2, 9), DTYPES, ("round", "prefix"), (False, True)))
    warmup(
        [
            problem_of({"N": N, "K": K, "bits": b, "dtype": d, "group_size": 64, "rule": r, "resident": h}, K)
            for b, d, r, h in cases
        ]
    )
    for bits, dtype, rule, resident in cases:
        layer = Layer(N, K, bits, dtype, 64, rule, resident)
        y = layer(torch.eye(K, device="cuda", dtype=DTYPES[dtype]))
        wrong = float((layer.weight.to(DTYPES[dtype]) != y.T).float().mean())
        checks.expect(wrong == 0, f"one-hot {bits=} {dtype} {rule} {resident=}: {wrong:.3f} differ")
        checks.expect(
            torch.equal(unpack(layer.planes, N, K) >> (8 - bits if resident else 0), layer.slices)
            or (resident and rule == "round"),
            "unpack on GPU",
        )


def product_cases(quick: bool) -> Iterator[tuple[dict[str, Any], int]]:
    """(layer options, M) of the comparisons with float64."""
    for dtype, bits in itertools.product(DTYPES, range(2, 9)):
        for M in range(1, 71, 7 if quick else 1):
            layer = {
                "N": 320,
                "K": 512,
                "bits": bits,
                "dtype": dtype,
                "resident": M % 2 == 0,
                "rule": ("round", "prefix")[M // 2 % 2],
                "bias": M % 3 == 0,
            }
            yield layer, M
    holds = ((False, "round"), (True, "round"), (True, "prefix"))
    for dtype, bits in itertools.product(DTYPES, (2, 4, 7) if quick else range(2, 9)):
        for group_size, zeros, (resident, rule) in itertools.product((-1, 16, 48, 32, 64, 128), (False, True), holds):
            layer = {
                "N": 192,
                "K": 1152,
                "bits": bits,
                "dtype": dtype,
                "group_size": group_size,
                "zeros": zeros,
                "resident": resident,
                "rule": rule,
                "bias": True,
            }
            yield layer, 5
    shapes = [
        (1, 16),
        (17, 48),
        (192, 576),
        (576, 192),
        (576, 1536),
        (1536, 576),
        (100, 208),
        (4096, 4096),
        (1000, 14336),
        (130, 33024),
    ]
    for (N, K), bits, M in itertools.product(shapes, (2, 3, 4, 6, 8), (1, 3, 16, 33, 130)):
        yield {"N": N, "K": K, "bits": bits, "group_size": 16 if K % 64 else 64}, M


def check_products(checks: Checks, quick: bool) -> None:
    """Products against float64, with large, shifted, small and subnormal activations as well."""
    cases = list(product_cases(quick))
    sm = problem_of({"N": 1, "K": 16, "bits": 2}, 1).sm
    start = time.time()
    warmup([problem_of(layer, M) for layer, M in cases])
    print(f"warmup of {len(cases)} problems, sm_{sm}: {time.time() - start:.1f} s", flush=True)
    for options, M in cases:
        layer = Layer(**options)
        checks.close(layer, tokens(M, options["K"], options.get("dtype", "float16")), f"{options} {M=}")
    for bits, dtype in itertools.product((2, 3, 4, 8), DTYPES):
        layer = Layer(256, 2048, bits, dtype)
        checks.close(layer, tokens(8, 2048, dtype) * 300, f"large x {bits=} {dtype}")
        checks.close(layer, tokens(8, 2048, dtype) + 3, f"shifted x {bits=} {dtype}")
        if dtype == "bfloat16":
            checks.close(layer, tokens(8, 2048, dtype) * 1e-5, f"small x {bits=} {dtype}")
        x = (torch.randint(-60, 60, (4, 2048), device="cuda") * 2.0**-24).to(DTYPES[dtype])  # fp16 subnormals
        got, want = layer(x).double(), layer.reference(x)
        checks.expect(
            bool((got - want).abs().max() <= want.abs().max() * 2**-8 + 2.0**-25), f"subnormals {bits=} {dtype}"
        )


def check_older_gpus(checks: Checks) -> None:
    """The tiles of GPUs without clusters or programmatic launches, run on this one."""
    for sm, bits, M in itertools.product((80, 86), (2, 4, 7), (1, 9, 40)):
        options: dict[str, Any] = {"N": 320, "K": 2048, "bits": bits, "resident": bits == 4, "zeros": bits == 7}
        layer, x, here = Layer(**options), tokens(M, 2048, "float16"), problem_of(options, M)
        launcher = Launcher(here, choose(replace(here, sm=sm)), 0, programmatic=False)
        y = torch.full((M, 320), float("nan"), device="cuda", dtype=torch.float16)
        zeros = 0 if layer.zeros is None else layer.zeros.data_ptr()
        stream = torch.cuda.current_stream().cuda_stream
        launcher(stream, M, x.data_ptr(), layer.planes.data_ptr(), layer.scales.data_ptr(), zeros, 0, y.data_ptr())
        error = relative_error(y, layer.reference(x))
        checks.expect(error <= TOLERANCE["float16"], f"tiles of sm_{sm} {bits=} {M=}: relative error {error:.2e}")


def check_determinism(checks: Checks) -> None:
    """The same bits again, and a row's whatever the other rows hold."""
    for bits, M, (N, K) in itertools.product((2, 4, 8), (1, 5, 16, 40), ((512, 4096), (4096, 4096))):
        layer, x = Layer(N, K, bits), tokens(M, K, "float16")
        first = layer(x)
        checks.expect(all(torch.equal(layer(x), first) for _ in range(5)), f"same bits again {bits=} {M=} {N}x{K}")
        other = tokens(M, K, "float16", seed=9) * 50
        other[M // 2] = x[M // 2]
        checks.expect(torch.equal(layer(other)[M // 2], first[M // 2]), f"a row alone {bits=} {M=} {N}x{K}")


def check_graph(checks: Checks) -> None:
    """Chained layers in a CUDA graph, with programmatic launches between ours and torch's kernels between."""
    layers = [Layer(1024, 1024, bits, seed=bits) for bits in (2, 3, 4, 8)]
    x = tokens(4, 1024, "float16")

    def chain(v: Tensor) -> Tensor:
        for layer in layers:
            v = layer(layer(v)) * 0.5
            v = v / v.abs().amax()
        return v

    want = chain(x)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(want)
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        checks.expect(torch.equal(out, want), "graph replay")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        side = chain(x)
    stream.synchronize()
    checks.expect(torch.equal(side, want), "another stream")


class Bench:
    """Time per call by CUDA graph over rotating weights, so that they come from memory and not from the L2."""

    def __init__(self, pool_bytes: int = 1 << 29) -> None:
        make = torch.Generator("cuda").manual_seed(7)
        self.pool = torch.randint(
            -(2**31), 2**31 - 1, (pool_bytes // 4,), dtype=torch.int32, device="cuda", generator=make
        )
        self.scales = {
            d: (torch.rand(1 << 26, device="cuda", generator=make) * 0.01 + 0.002).to(d) for d in DTYPES.values()
        }

    def __call__(
        self, problem: Problem, config: Config | None = None, programmatic: bool = True, replays: int = 7
    ) -> dict[str, float]:
        """Microseconds of a call: median, least and most."""
        p = problem
        dtype = DTYPES[p.dtype]
        launcher = Launcher(p, config or choose(p), 0, programmatic)
        words = p.row_tiles * p.k_tiles * 128
        held = words * (8 if p.resident else p.bits)
        copies = min(
            max(-(-(240 << 20) // (words * p.planes * 4)), 2),
            self.pool.numel() // held,
            (1 << 26) // (p.row_tiles * 64 * p.groups),
        )
        copies = max(copies, 1)
        x = torch.randn((p.M, p.K), device="cuda").to(dtype)
        y = torch.empty((copies, p.M, p.N), device="cuda", dtype=dtype)
        scales = self.scales[dtype]

        def calls() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            for i in range(copies):
                planes = self.pool.data_ptr() + i * held * 4
                launcher(
                    stream,
                    p.M,
                    x.data_ptr(),
                    planes,
                    scales.data_ptr() + i * p.row_tiles * 64 * p.groups * 2,
                    0,
                    0,
                    y[i].data_ptr(),
                )

        return time_graph(calls, copies, replays)


def time_graph(calls: Callable[[], None], count: int, replays: int = 7) -> dict[str, float]:
    """Replay a graph of ``count`` calls: microseconds of one."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    times = []
    for _ in range(replays + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    times = times[1:]
    return {"us": statistics.median(times), "us_min": min(times), "us_max": max(times)}


def floor_us(p: Problem) -> float:
    """The H200's roofline: bytes at the card's copy rate, or products at cuBLAS's rate."""
    scale_bytes = 2 / (p.K if p.group_size == -1 else p.group_size)
    moved = p.N * p.K * (p.planes / 8 + scale_bytes) + 2 * p.M * (p.N + p.K)
    return max(moved / 4.27e12, 2 * p.M * p.N * p.K / 6.6e14) * 1e6


def launch_cost(calls: int = 2000) -> float:
    """CPU microseconds of an eager call."""
    layer, x = Layer(256, 256, 4), tokens(1, 256, "float16")
    layer(x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        layer(x)
    cost = (time.perf_counter() - start) / calls * 1e6
    torch.cuda.synchronize()
    return cost


def target_us(p: Problem) -> float:
    """What the project asks of a kernel."""
    return 1.05 * floor_us(p) + 1.5 if p.M <= 16 else 1.5 * floor_us(p) + 2


def bench_shapes() -> list[dict[str, Any]]:
    """Times of fp16, packed, groups of 128; ``!`` marks those over the target in brackets."""
    bench = Bench()
    results: list[dict[str, Any]] = []
    for (N, K), bits in itertools.product(SHAPES, range(2, 9)):
        row = []
        for M in (1, 2, 4, 8, 16, 32, 64):
            p = Problem(M, N, K, bits)
            timed, target = bench(p), target_us(p)
            results.append({**asdict(p), **asdict(choose(p)), **timed, "floor_us": floor_us(p), "target_us": target})
            row.append(f"{timed['us']:6.1f}{' ' if timed['us'] <= target else '!'}({target:.1f})")
        print(f"{N:6d}x{K:<6d} {bits} bits", *row, flush=True)
    return results


def bench_ratios() -> list[dict[str, Any]]:
    """Times of other kinds of problem over that of fp16, packed, groups of 128, launches that overlap."""
    bench = Bench()
    results: list[dict[str, Any]] = []
    kinds: dict[str, dict[str, Any]] = {
        "bfloat16": {"dtype": "bfloat16"},
        "resident prefix": {"resident": True, "rule": "prefix"},
        "resident round": {"resident": True},
        "groups of 64": {"group_size": 64},
        "groups of 32": {"group_size": 32},
        "one group": {"group_size": -1},
    }
    for size, M, bits in itertools.product((4096, 8192, 16384), (1, 8, 16), (2, 3, 4, 6, 8)):
        plain = bench(Problem(M, size, size, bits))["us"]
        row: dict[str, Any] = {"size": size, "M": M, "bits": bits, "us": plain}
        for name, kind in kinds.items():
            row[name] = bench(Problem(M, size, size, bits, **kind))["us"] / plain
        row["no overlap of launches"] = bench(Problem(M, size, size, bits), programmatic=False)["us"] / plain
        results.append(row)
        print(
            *(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()),
            flush=True,
        )
    return results


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="build/gpu_check.json", help="JSON of the results")
    parser.add_argument("--quick", action="store_true", help="fewer values of M")
    parser.add_argument("--no-bench", action="store_true", help="checks only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA GPU, and torch finds none", file=sys.stderr)
        sys.exit(2)
    checks = Checks()
    for check in (
        check_decoding,
        lambda c: check_products(c, options.quick),
        check_older_gpus,
        check_determinism,
        check_graph,
    ):
        start = time.time()
        check(checks)
        torch.cuda.synchronize()
        print(f"{checks.run} checks, {len(checks.failures)} failures, {time.time() - start:.1f} s", flush=True)
    print("worst relative error", checks.worst)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "failures": checks.failures,
        "worst": checks.worst,
        "results": [],
    }
    if not options.no_bench:
        print(f"CPU time of a call: {launch_cost():.1f} us")
        result["results"], result["ratios"] = bench_shapes(), bench_ratios()
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result))
    sys.exit(bool(checks.failures))


if __name__ == "__main__":
    main()
