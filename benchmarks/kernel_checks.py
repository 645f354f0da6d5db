"""The kernels' own checks: every width, type, rule and way of holding weights, against float64 and bit for bit.

Run by ``benchmarks/gpu_check.py --only checks``; a few of them by ``benchmarks/sanitize.py``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from kernel_layers import DTYPES, GatedLayer, Layer, Normed, tokens
from torch import Tensor

from matgptq.kernels.launch import make_launcher
from matgptq.kernels.matmul import warmup
from matgptq.kernels.packing import unpack
from matgptq.kernels.tiles import Problem, choose

TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}


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

    def close(self, layer: Layer | Normed, x: Tensor, name: str) -> None:
        """Compare a product with float64."""
        poison()
        dtype = str(x.dtype).split(".")[-1]
        error = relative_error(layer(x), layer.reference(x))
        self.worst[dtype] = max(self.worst.get(dtype, 0), error)
        self.expect(error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}")


def check_decoding(checks: Checks) -> None:
    """One-hot activations: the outputs are the weights, bit for bit."""
    N, K = 200, 256
    cases = list(itertools.product(range(2, 9), DTYPES, ("round", "prefix"), (False, True)))
    warmup(
        [
            problem_of({"N": N, "K": K, "bits": b, "dtype": d, "group_size": 64, "rule": r, "resident": h}, M)
            for (b, d, r, h), M in itertools.product(cases, (2, 16, 32, K))
        ]
    )
    for bits, dtype, rule, resident in cases:
        layer = Layer(N, K, bits, dtype, 64, rule, resident)
        for M in (2, 16, 32, K):  # few.cu; hopper.cu, which scales sums or weights
            one_hot = torch.eye(K, device="cuda", dtype=DTYPES[dtype]).split(M)
            y = torch.cat([layer(x) for x in one_hot])
            wrong = float((layer.weight.to(DTYPES[dtype]) != y.T).float().mean())
            checks.expect(wrong == 0, f"one-hot {bits=} {dtype} {rule} {resident=} {M=}: {wrong:.3f} differ")
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
    many = 0
    for dtype, bits in itertools.product(DTYPES, (2, 4, 7) if quick else range(2, 9)):
        group_sizes = (-1, 16, 48, 32, 64, 96, 128)
        for group_size, zeros, (resident, rule) in itertools.product(group_sizes, (False, True), holds):
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
            yield layer, 1 + many % 2  # few.cu, from groups of 64 on
            many += 1
            yield layer, (40, 120, 300)[many // 3 % 3]  # hopper.cu, where there is one
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
    for (N, K), bits, M in itertools.product(shapes, (2, 3, 4, 6, 8), (1, 2, 3, 16, 33, 130, 257, 1000)):
        yield {"N": N, "K": K, "bits": bits, "group_size": 16 if K % 64 else 64}, M
    # Every family of tiles that `choose` takes; those of linear.cu and hopper.cu with all ways of holding weights.
    shapes = [(2048, 2048), (4096, 4096), (6144, 1024), (8192, 1024), (10240, 1024), (12288, 1024), (28672, 1024)]
    shapes += [(4096, 14336)]
    for (N, K), M in itertools.product(
        shapes, (4, 8, 9, 16, 24, 32, 48, 64, 96, 128, 160, 200, 256, 350, 512, 700, 1100)
    ):
        for zeros, (resident, rule), (bits, dtype) in zip(
            (False, True, False, True, True), (*holds, *holds[1:]), itertools.product((4, 7, 2), DTYPES), strict=False
        ):
            options = {"bits": bits, "dtype": dtype, "zeros": zeros, "resident": resident, "rule": rule}
            yield {"N": N, "K": K, "group_size": 64 if M == 24 else 128, **options}, M
    # Stream-K: blocks that share tiles, from several blocks a tile to several tiles a block, not all of them shared.
    shapes = [(5120, 8192), (10300, 4096), (34000, 2048)]
    ways = itertools.cycle(itertools.product((4, 7, 2), DTYPES, (False, True), holds))
    for (N, K), M in itertools.product(shapes, (12, 20, 32, 48, 64, 96, 128, 192, 256, 320, 640, 1000)):
        for bits, dtype, zeros, (resident, rule) in itertools.islice(ways, 5):
            options = {"bits": bits, "dtype": dtype, "zeros": zeros, "resident": resident, "rule": rule}
            yield {"N": N, "K": K, "group_size": 64 if M == 20 else 128, **options}, M
    shapes = [(4096, 8192), (6144, 1024), (6144, 8192), (12288, 1024), (16384, 1024), (16384, 8192)]
    for (N, K), bits, M in itertools.product(shapes, range(2, 9), (1, 2, 3, 6, 12, 160)):
        yield {"N": N, "K": K, "bits": bits, "dtype": ("float16", "bfloat16")[M % 2]}, M
    for M, bits in itertools.product((24, 48, 96, 192, 500, 2048, 4000, 8192, 9000), (2, 4, 8)):
        yield {"N": 1300, "K": 640, "bits": bits, "dtype": ("float16", "bfloat16")[bits // 4 % 2]}, M


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
    check_unusual_activations(checks)


def check_unusual_activations(checks: Checks) -> None:
    """Products with large, shifted, small, subnormal and uneven activations; NaN and Inf spoil their row alone."""
    cases = list(itertools.product((2, 3, 4, 8), DTYPES, (2, 8, 24, 64)))  # few.cu, linear.cu, hopper.cu's two ways
    warmup([problem_of({"N": 256, "K": 2048, "bits": bits, "dtype": dtype}, M) for bits, dtype, M in cases])
    for bits, dtype, M in cases:
        layer, x = Layer(256, 2048, bits, dtype), tokens(M, 2048, dtype)
        uneven = torch.where(torch.arange(2048, device="cuda") % 700 == 5, x * 1000, x)
        kinds = {"large": x * 300, "shifted": x + 3, "uneven": uneven}
        if dtype == "bfloat16":
            kinds |= {"small": x * 1e-5, "tiny": x * 1e-25, "huge": x * 1e25}
        for name, changed in kinds.items():
            checks.close(layer, changed, f"{name} x {bits=} {dtype} {M=}")
        subnormal = (torch.randint(-60, 60, (M, 2048), device="cuda") * 2.0**-24).to(DTYPES[dtype])
        got, want = layer(subnormal).double(), layer.reference(subnormal)
        checks.expect(
            bool((got - want).abs().max() <= want.abs().max() * 2**-8 + 2.0**-25), f"subnormals {bits=} {dtype} {M=}"
        )
        y = layer(x)
        for value, row in itertools.product((float("nan"), float("inf"), -float("inf")), (0, 1)):
            bad = x.clone()
            bad[row, 777] = value
            got = layer(bad)
            others = [m for m in range(M) if m != row]
            apart = not got[row].isfinite().any() and torch.equal(got[others], y[others])
            checks.expect(bool(apart), f"{value} in row {row} {bits=} {dtype} {M=}")


def gated_cases() -> Iterator[tuple[dict[str, Any], int]]:
    """(layer options, M) of gated layers: all ways of holding weights, and every kind of tile that models get."""
    shapes = [(64, 128), (1536, 576), (4096, 1024), (14336, 512), (2048, 8192), (28672, 256)]
    ways = itertools.cycle(itertools.product((False, True), ((False, "round"), (True, "round"), (True, "prefix"))))
    for (N, K), M, bits, dtype in itertools.product(shapes, (1, 2, 3, 8, 9, 20, 60, 300), range(2, 9), DTYPES):
        zeros, (resident, rule) = next(ways)
        layer = {"N": N, "K": K, "bits": bits, "dtype": dtype, "group_size": 64, "zeros": zeros, "resident": resident}
        yield {**layer, "rule": rule, "bias": bits % 2 == 0}, M
    shapes = [(9728, 2560), (14336, 1024), (17408, 5120)]
    for (N, K), M, bits in itertools.product(
        shapes, (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 2048, 4500), (2, 4, 8)
    ):
        yield {"N": N, "K": K, "bits": bits, "dtype": "bfloat16", "bias": bits == 4}, M


def check_gated(checks: Checks) -> None:
    """Layers whose kernel gates its outputs, or has another do so after it."""
    cases = list(gated_cases())
    warmup([replace(problem_of(layer, M), gated=True) for layer, M in cases])
    for options, M in cases:
        gated, x = GatedLayer(**options), tokens(M, options["K"], options["dtype"]) * 0.3
        checks.close(gated, x, f"gated {options} {M=}")
        checks.expect(torch.equal(gated(x), gated(x)), f"gated, same bits again {options} {M=}")


def norm_cases() -> Iterator[tuple[dict[str, Any], int]]:
    """(layer options, M) of layers before or after a norm: every width, and every kind of tile that models get."""
    shapes = [(112, 128), (1536, 576), (6144, 4096), (4096, 1024), (4096, 8192), (7168, 5120)]
    ways = itertools.cycle(itertools.product((False, True), ((False, "round"), (True, "round"), (True, "prefix"))))
    for (N, K), M, bits in itertools.product(shapes, (1, 2, 3, 16, 70), range(2, 9)):
        zeros, (resident, rule) = next(ways)
        layer = {"N": N, "K": K, "bits": bits, "group_size": 64, "zeros": zeros, "resident": resident, "rule": rule}
        yield {**layer, "dtype": "float16" if bits == 4 and M < 16 else "bfloat16", "bias": bits % 2 == 0}, M
    shapes = [(7168, 5120), (10240, 5120), (5120, 8192), (5120, 5120), (6144, 2560), (2560, 9728), (4096, 12288)]
    shapes += [(5120, 17408), (9728, 2560), (14336, 4096), (17408, 5120), (28672, 8192)]
    for (N, K), M, bits in itertools.product(shapes, (1, 2, 6), (2, 3, 4, 6, 8)):
        yield {"N": N, "K": K, "bits": bits, "dtype": "bfloat16"}, M


def norm_pairs() -> Iterator[tuple[bool, dict[str, Any], dict[str, Any], int]]:
    """Whether the second layer is gated, options of both, and M: `norm_cases` as the first and as the second layer."""
    for options, M in norm_cases():
        small = {**options, "bits": 4, "zeros": False, "resident": False, "bias": False, "rule": "round"}
        if options["N"] % 64 == 0:  # whole groups
            yield False, options, {**small, "N": 128, "K": options["N"]}, M
        yield False, {**small, "N": options["K"], "K": 128}, options, M
        if options["N"] % 64 == 0:
            yield True, {**small, "N": options["K"], "K": 128}, options, M


def check_norms(checks: Checks) -> None:
    """Layers around RMSNorm of a sum, which share it or not."""
    pairs = list(norm_pairs())
    warmup([replace(problem_of(first, M), summed=True) for _, first, _, M in pairs])
    warmup([replace(problem_of(second, M), scaled=True, gated=gated) for gated, _, second, M in pairs])
    for gated, first, second, M in pairs:
        pair = Normed(Layer(**first), (GatedLayer if gated else Layer)(**second))
        x, dtype = tokens(M, first["K"], first["dtype"]), first["dtype"]
        name = f"norm between {first} and {'gated ' * gated}{second} {M=}"
        poison()
        z, total, means = pair.sums(x)
        y, mean = pair(x), total.double().pow(2).mean(-1) + pair.eps
        wanted = pair.sum(x), pair.product(x, total)
        errors = [relative_error(*both) for both in zip((total, y), wanted, strict=True)]
        checks.worst[dtype] = max(checks.worst.get(dtype, 0), *errors)
        checks.expect(max(errors) <= TOLERANCE[dtype], f"{name}: relative errors {errors}")
        if problem_of(first, M).shares_norm:
            exact = torch.equal(z, pair.z(x, total)) and torch.allclose(means.double().sum(-1), mean, rtol=1e-5)
        else:
            exact = torch.equal(means.sum(-1), torch.ones_like(means[:, 0]))
        checks.expect(exact, f"z and means, {name}")
        checks.expect(torch.equal(y, pair(x)), f"same bits again, {name}")
        x[-1] *= 1e-3  # a token's result does not depend on what the others hold
        checks.expect(torch.equal(y[:-1], pair(x)[:-1]), f"other tokens, {name}")


def check_older_gpus(checks: Checks) -> None:
    """The tiles of GPUs without clusters, programmatic launches or wgmma, run on this one."""
    few, many = itertools.product((320, 128), (1, 2, 9, 40)), itertools.product((8192, 20000), (66, 300, 1000))
    for kind, sm, bits, (N, M) in itertools.product((Layer, GatedLayer), (80, 86), (2, 4, 7, 8), (*few, *many)):
        if kind is GatedLayer and N % 64:
            continue
        options: dict[str, Any] = {"N": N, "K": 2048, "bits": bits, "resident": bits == 4, "zeros": bits == 7}
        options["group_size"] = 16 if bits == 7 and M == 66 else 128
        layer, x = kind(**options), tokens(M, 2048, "float16") * 0.3
        here = replace(problem_of(options, M), gated=kind is GatedLayer)
        launcher = make_launcher(here, choose(replace(here, sm=sm)), 0, programmatic=False)
        y = torch.full((M, N), float("nan"), device="cuda", dtype=torch.float16)
        zeros = 0 if layer.zeros is None else layer.zeros.data_ptr()
        stream = torch.cuda.current_stream().cuda_stream
        launcher(stream, M, x.data_ptr(), layer.planes.data_ptr(), layer.scales.data_ptr(), zeros, 0, y.data_ptr())
        error = relative_error(y, layer.reference(x))
        name = f"tiles of sm_{sm} {kind.__name__} {bits=} {M=}"
        checks.expect(error <= TOLERANCE["float16"], f"{name}: relative error {error:.2e}")


def check_determinism(checks: Checks) -> None:
    """The same bits again, and a row's whatever the other rows hold."""
    shapes = ((512, 4096), (4096, 4096), (5120, 8192))
    for bits, M, (N, K) in itertools.product((2, 4, 8), (1, 2, 5, 16, 40, 100, 600), shapes):
        layer, x = Layer(N, K, bits), tokens(M, K, "float16")
        first = layer(x)
        checks.expect(all(torch.equal(layer(x), first) for _ in range(5)), f"same bits again {bits=} {M=} {N}x{K}")
        other = tokens(M, K, "float16", seed=9) * 50
        other[M // 2] = x[M // 2]
        checks.expect(torch.equal(layer(other)[M // 2], first[M // 2]), f"a row alone {bits=} {M=} {N}x{K}")


def check_graph(checks: Checks) -> None:
    """Chained layers in a CUDA graph, with programmatic launches between ours and torch's kernels between."""
    for M in (1, 4, 12, 40, 100, 300):
        check_graph_of(checks, M, 1024)
    for M in (16, 60, 200):  # stream-K
        check_graph_of(checks, M, 5120)
    for M in (1, 6, 30):
        check_graph_of(checks, M, 1024, GatedLayer)


def check_graph_of(checks: Checks, M: int, size: int, kind: type[Layer] = Layer) -> None:
    """`check_graph` for a number of tokens and layers of one size."""
    layers = [kind(size, size, bits, seed=bits) for bits in (2, 3, 4, 8)]
    x = tokens(M, size, "float16")

    def chain(v: Tensor) -> Tensor:
        for layer in layers:
            v = layer(v if kind is GatedLayer else layer(v)) * 0.5  # gated twice it would be beyond fp16
            v = v / v.abs().amax()
        return v

    want = chain(x)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(want)
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        checks.expect(torch.equal(out, want), f"graph replay {M=} {size=} {kind.__name__}")
    streams = [torch.cuda.Stream() for _ in range(3)]
    sides = []
    for stream in streams:  # at once
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            sides.append([chain(x) for _ in range(5)])
    torch.cuda.synchronize()
    checks.expect(
        all(torch.equal(y, want) for side in sides for y in side), f"other streams {M=} {size=} {kind.__name__}"
    )
