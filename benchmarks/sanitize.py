"""A few calls of the kernels for compute-sanitizer: every way of holding weights, ragged sizes, many tokens.

    PYTHONPATH=. compute-sanitizer --tool memcheck --report-api-errors no python benchmarks/sanitize.py

racecheck is slow: ``--skip 20`` goes on behind the first 20. Exits with 1 if a result is wrong, and with 2 if there is
no CUDA GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from kernel_checks import Checks
from kernel_layers import GatedLayer, Layer, Normed, tokens

from matgptq.kernels import launch, matmul
from matgptq.kernels.hopper import HopperConfig
from matgptq.kernels.many import ManyConfig
from matgptq.kernels.tiles import AnyConfig

CASES = [  # bits, M, N, K, group_size, zeros, resident
    (2, 1, 4096, 1024, 128, False, False),
    (4, 5, 200, 528, 16, True, True),
    (3, 16, 320, 1024, 64, False, True),
    (8, 40, 192, 576, 32, True, False),
    (4, 130, 100, 208, 16, False, False),
    (7, 8, 128, 4096, -1, False, True),
    (6, 600, 300, 640, 128, False, False),
    (5, 20, 601, 4160, -1, True, True),
    # hopper.cu: one row tile, two and four groups of warps along k; four row tiles; rings that go on; 256 tokens, split
    (4, 12, 4096, 1024, 128, False, False),
    (4, 17, 3000, 1024, 128, False, False),
    (2, 64, 28672, 256, 128, False, True),
    (8, 100, 28672, 256, 128, False, False),
    (4, 512, 17000, 256, 64, False, False),
    (4, 520, 512, 8192, 128, True, False),
    (8, 8, 300, 2048, 128, False, False),
    (4, 128, 2200, 8192, 128, False, False),
    (3, 60, 4200, 512, 64, False, True),
    # 192 tokens, several tiles a block and k split; 96 and 128
    (4, 150, 17000, 256, 128, False, False),
    (8, 150, 8000, 512, 128, False, False),
    (4, 1030, 6200, 256, 64, False, False),
    (2, 1030, 6200, 256, 128, False, True),
    # linear.cu: blocks of four row tiles, of two in a cluster
    (2, 6, 16500, 512, 128, False, False),
    (4, 3, 8100, 1024, 128, False, True),
    # of two and four row tiles, four in a cluster
    (2, 8, 2500, 1024, 128, False, False),
    (4, 4, 10200, 1024, 64, False, True),
    (8, 4, 5100, 1024, -1, True, False),
    # few.cu: several chunks of x, ragged N and K, all kinds of weights
    (2, 2, 4096, 8192, 128, False, False),
    (3, 1, 200, 4128, 32, True, True),
    (8, 2, 130, 1168, -1, False, False),
]


GATED = [  # few.cu, linear.cu by one block and by two of a cluster, a tile that is halved, gate.cu, hopper.cu
    (4, 1, 1024, 1024, 128, False, False),
    (3, 2, 192, 4096, 64, True, True),
    (2, 6, 8320, 512, 128, False, False),
    (4, 5, 192, 1024, 128, False, True),
    (8, 1, 14336, 256, 128, False, False),
    (4, 20, 192, 1024, 128, False, False),
    (4, 20, 14336, 256, 128, False, False),
    (2, 60, 14336, 256, 128, False, True),
    (4, 180, 9728, 512, 128, False, False),
]

BEFORE_NORM = [  # few.cu by one block and by two of a cluster; linear.cu; norm.cu after the others
    (2, 1, 17008, 1024, 128, False, False),
    (4, 2, 4096, 1024, -1, False, True),
    (3, 2, 320, 4096, 64, True, False),
    (4, 6, 192, 1024, 128, False, False),
    (4, 30, 320, 656, 16, True, False),
]
AFTER_NORM = [  # the same
    (2, 1, 7000, 4096, 128, False, False),
    (4, 2, 320, 1168, -1, False, True),
    (3, 1, 4500, 8192, 64, True, True),
    (4, 12, 192, 1024, 128, False, False),
]
GATED_AFTER_NORM = [
    (2, 1, 14336, 1024, 128, False, False),
    (8, 2, 320, 4096, 64, False, True),
    (8, 20, 192, 1024, 128, False, False),
]

SHARE_K, PAIR, LONG = {"stream_k": True}, {"pair": True}, {"long_turns": True}
TILES: list[tuple[tuple[Any, ...], AnyConfig]] = [  # which `choose` takes for larger problems
    # stream-K: whole tiles and pieces; a wave of whole tiles before (20 tokens); many blocks a tile
    ((4, 150, 17000, 256, 64, False, False), HopperConfig(2, 1, 192, 1, 1, 1, **SHARE_K)),
    ((6, 60, 34000, 256, 128, False, True), HopperConfig(4, 2, 64, 1, 1, 1, **SHARE_K)),
    ((4, 250, 17000, 256, 128, False, False), HopperConfig(2, 1, 256, 1, 1, 1, **SHARE_K)),
    ((8, 20, 34000, 272, 16, True, False), HopperConfig(2, 1, 24, 1, 1, 1, **SHARE_K)),
    ((5, 120, 33000, 256, 128, False, False), HopperConfig(4, 2, 128, 1, 1, 1, **SHARE_K)),
    ((3, 20, 1100, 2048, 128, False, False), HopperConfig(2, 1, 24, 1, 2, 1, **SHARE_K)),
    ((2, 90, 600, 4096, 128, False, True), HopperConfig(2, 1, 96, 1, 1, 1, **SHARE_K)),
    # long turns: of whole groups of k and not, zeros, k that ends inside one; the same, gated; shared
    ((4, 16, 4000, 2048, 128, False, False), HopperConfig(2, 1, 16, 1, 2, 1, **LONG)),
    ((2, 7, 300, 1216, 64, False, True), HopperConfig(1, 1, 8, 2, 2, 2, **LONG)),
    ((3, 30, 1000, 1168, 16, True, False), HopperConfig(1, 1, 32, 2, 1, 1, **LONG)),
    ((4, 60, 1000, 2048, 128, False, False), HopperConfig(4, 2, 64, 1, 1, 2, **LONG)),
    ((4, 16, 4032, 2048, 128, False, False), HopperConfig(2, 1, 16, 1, 2, 1, **LONG, gated=True)),
    ((2, 14, 17000, 1024, 128, False, False), HopperConfig(2, 1, 16, 1, 2, 1, **SHARE_K, **LONG)),
    # two blocks that share x, an odd number of them along rows
    ((4, 1030, 6200, 256, 64, False, False), HopperConfig(2, 1, 256, 1, 1, 1, **PAIR)),
    ((2, 1030, 6200, 256, 128, False, True), HopperConfig(4, 2, 128, 1, 1, 1, **PAIR)),
    # the same, gated
    ((4, 150, 8512, 256, 64, False, False), HopperConfig(2, 1, 192, 1, 1, 1, **SHARE_K, gated=True)),
    ((6, 40, 17024, 256, 128, False, True), HopperConfig(4, 2, 48, 1, 1, 1, **SHARE_K, gated=True)),
    ((4, 1030, 3136, 256, 64, False, False), HopperConfig(2, 1, 256, 1, 1, 1, **PAIR, gated=True)),
    # many.cu, which other GPUs take: ragged, several scales a k tile, zeros; many tokens; a short ring
    ((4, 70, 300, 272, 16, True, True), ManyConfig(96, 3, 2)),
    ((2, 600, 1000, 640, 128, False, False), ManyConfig(128, 4, 1)),
    ((7, 130, 601, 528, -1, False, False), ManyConfig(64, 2, 2)),
]


def room(size: int, device: int) -> torch.Tensor:
    """`launch._room` for initcheck: tickets are read before they are written, as any other first value will do."""
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    memory[-4096:] = 0
    return memory


def before_norm(N: int, *rest: Any, **options: Any) -> Normed:
    """A layer, a norm and a small layer."""
    layer = Layer(N, *rest, **options)
    return Normed(layer, Layer(100, N, 4, rest[2], 16))


def after_norm(N: int, K: int, *rest: Any, kind: type[Layer] = Layer, **options: Any) -> Normed:
    """A small layer, a norm and a layer."""
    return Normed(Layer(K, 128, 4, rest[1], 64), kind(N, K, *rest, **options))


def check(checks: Checks, kind: Callable[..., Layer | Normed], bits: int, M: int, N: int, K: int, *rest: Any) -> None:
    """Compare a product with float64."""
    group_size, zeros, resident = rest
    dtype = "float16" if isinstance(kind, type) else "bfloat16"  # in which norms are shared
    layer = kind(N, K, bits, dtype, group_size, "round", resident, zeros, bias=True)
    name = f"{getattr(kind, '__name__', 'gated after_norm')} {bits=} {M=} {N}x{K}"
    checks.close(layer, tokens(M, layer.in_features, dtype) * 0.3, name)
    print(name, flush=True)  # a tool that is slow may be stopped: this far it came


def main() -> None:
    """Run the cases and compare them with float64."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N cases")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("sanitize.py needs a CUDA GPU, and torch finds none", file=sys.stderr)
        sys.exit(2)
    launch._room = room
    checks = Checks()
    cases: list[tuple[Callable[..., Layer | Normed], tuple[Any, ...], AnyConfig | None]]
    cases = [(Layer, case, None) for case in CASES]
    cases += [(GatedLayer, case, None) for case in GATED]
    cases += [(GatedLayer if tile.gated else Layer, case, tile) for case, tile in TILES]
    cases += [(before_norm, case, None) for case in BEFORE_NORM]
    cases += [(after_norm, case, None) for case in AFTER_NORM]
    cases += [(partial(after_norm, kind=GatedLayer), case, None) for case in GATED_AFTER_NORM]
    for kind, case, tile in cases[options.skip :]:
        matmul.bind.cache_clear()  # a case before may be the same problem, by the tile that `choose` takes
        chosen = mock.patch.object(matmul, "choose", return_value=tile) if tile else contextlib.nullcontext()
        with chosen as choose:
            check(checks, kind, *case)
        assert choose is None or choose.called, case
    checks.close(Layer(256, 1024, 5, "bfloat16"), tokens(9, 1024, "bfloat16"), "bfloat16")
    torch.cuda.synchronize()
    print(f"{checks.run} checks, {len(checks.failures)} failures")
    sys.exit(bool(checks.failures))


if __name__ == "__main__":
    main()
