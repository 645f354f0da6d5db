"""Tiles of a model's layers, timed one after the other as in a decoding step: for the rules of `stream` and `hopper`.

    PYTHONPATH=. python benchmarks/chain_tiles.py --models llama-3.1-8b --bits 2 3 4 --out chain_tiles.json

A call that is alone in a benchmark starts while its like ends. In a step it starts while a layer of another shape ends,
and waits for what that one writes. So six layers of a model run here in a CUDA graph: q, k and v, a kernel in place of
attention, the output layer, gate and up (gated), down, with the norms between them. Kind by kind the tile is exchanged
for others, and the best is kept for the kinds after it. --chosen times two ways only: tiles as they are chosen, and as
they would be by times of calls alone. Bfloat16, groups of 128, random codes; only time is looked at (`gpu_check.py`
compares with float64). A row of the results is the model, tokens, bits, kind, kernel, the tile (its fields in order),
and microseconds a layer of the model, all four kinds; with --chosen the model, tokens, bits, and microseconds of both
ways. Exits with 2 if there is no CUDA GPU.
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
from typing import Any
from unittest import mock

import torch
from sweep_tiles import hopper_tiles, linear_tiles
from torch import Tensor

from matgptq.bench import Case, new_report, random_layer, time_calls
from matgptq.bench_linear import MODELS
from matgptq.kernels import stream
from matgptq.kernels.hopper import HopperConfig
from matgptq.kernels.launch import Launcher, compile_tiles, make_launcher
from matgptq.kernels.problem import MEAN_ROWS, Problem
from matgptq.kernels.stream import Config, grid
from matgptq.kernels.tiles import AnyConfig, choose, defines, gated_choice, supports
from matgptq.packed import PackedLinear

KINDS = ("qkv", "o", "gate_up", "down")
LAYERS = 6
SMS = 132  # of an H200


def problems_of(model: str, tokens: int, bits: int, sm: int = 90) -> dict[str, Problem]:
    """What a layer of a model asks of the kernels, by kind."""
    found = {}
    for kind, (N, K) in zip(KINDS, MODELS[model], strict=True):
        gated, scaled = kind == "gate_up", kind in ("qkv", "gate_up")
        p = Problem(tokens, N // 2 if gated else N, K, bits, "bfloat16", sm=sm, gated=gated)
        found[kind] = replace(p, scaled=scaled, summed=not scaled)
    return found


def tiles(p: Problem) -> list[AnyConfig]:
    """What may be worth a try: tiles of few.cu, linear.cu and hopper.cu, gated as `choose` makes them."""
    found: list[AnyConfig] = [*_stream_tiles(p.layer), *_hopper_tiles(p.layer)]
    if p.gated:
        found = [gated_choice(p, tile) or tile for tile in found]
    return [tile for tile in dict.fromkeys(found) if supports(tile, p)]


def _stream_tiles(p: Problem) -> Iterator[Config]:
    if p.M > 8:
        return
    for tile in linear_tiles(p):
        blocks = math.prod(grid(p, tile)) // tile.splits
        split = tile.splits == 1 or (tile.splits in (2, 4) and blocks < 2 * SMS)
        turns = (2, 3, 4) if tile.few else (2, 3)
        fair = tile.row_tiles == 1 and tile.stages in turns and tile.threads * tile.blocks <= 512
        if split and fair and 2 * blocks * tile.splits >= SMS:
            yield tile


def _hopper_tiles(p: Problem) -> Iterator[HopperConfig]:
    if p.M <= 4:
        return
    for tile in hopper_tiles(p):
        blocks = -(-p.N // tile.rows) * tile.splits
        fair = tile.splits == 1 or (tile.splits != 5 and blocks <= SMS * tile.blocks)
        if fair and 2 * blocks >= SMS and tile.tokens < p.M + 8 and not tile.stream_k:
            yield tile


class Chain:
    """The layers of a model, and what they read and write."""

    def __init__(self, problems: dict[str, Problem], device: torch.device):
        self.problems, self.device = problems, device
        self.layers: dict[str, list[PackedLinear]] = {}
        for kind, p in problems.items():
            case = Case(p.M, p.layer.N, p.K, p.bits, p.dtype, p.group_size)
            self.layers[kind] = [random_layer(case, device, seed)[1] for seed in range(LAYERS)]
        tokens, hidden = problems["qkv"].M, problems["qkv"].K

        def room(size: int) -> Tensor:
            return torch.randn(tokens, size, device=device).bfloat16()

        self.outputs = {kind: room(p.N) for kind, p in problems.items()}
        self.attended, self.sums = room(problems["o"].K), [room(hidden), room(hidden)]
        self.means = torch.ones(tokens, hidden // MEAN_ROWS, device=device) * (MEAN_ROWS / hidden)
        self.norms = torch.ones(2 * LAYERS, hidden, device=device, dtype=torch.bfloat16)

    def run(self, launchers: dict[str, Launcher]) -> Tensor:
        """All layers once."""
        queue = torch.cuda.current_stream(self.device).cuda_stream

        def call(kind: str, layer: int, x: Tensor, *rest: float) -> Tensor:
            weights, y = self.layers[kind][layer], self.outputs[kind]
            addresses = (v.data_ptr() for v in (x, weights.planes, weights.scales))
            launchers[kind](queue, len(x), *addresses, 0, 0, y.data_ptr(), *rest)
            return y

        means = self.means.data_ptr()
        scaled = (means, 0, 0, 0, 0.0) if self.problems["qkv"].shares_norm else ()
        first, second = (total.data_ptr() for total in self.sums)
        y = self.outputs["down"]
        for i in range(LAYERS):
            before, after = (self.norms[n].data_ptr() for n in (2 * i, 2 * i + 1))
            q = call("qkv", i, y, *scaled)
            torch.sin(q[:, : self.attended.shape[1]], out=self.attended)
            y = call("o", i, self.attended, means, first, before, second, 1e-5)
            y = call("gate_up", i, y, *scaled)
            y = call("down", i, y, means, second, after, first, 1e-5)
        return y

    def microseconds(self, configs: dict[str, AnyConfig]) -> float:
        """Of one layer of the model."""
        index = self.device.index or 0
        launchers = {kind: make_launcher(p, configs[kind], index) for kind, p in self.problems.items()}
        return time_calls([partial(self.run, launchers)], self.device)["us"] / LAYERS


def main() -> None:
    """Time the tiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["llama-3.1-8b"], metavar="MODEL")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="widths, bits")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="tokens a call, to 16")
    parser.add_argument("--chosen", action="store_true", help="no other tiles than those that are or would be chosen")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("chain_tiles.py needs a CUDA GPU, and torch finds none", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    report = new_report(device)
    report["columns"] = [
        "model",
        "M",
        "bits",
        *(("chosen", "alone") if options.chosen else ("kind", "kernel", "tile", "us")),
    ]
    for model, bits, M in itertools.product(options.models, options.bits, options.batch_sizes):
        problems = problems_of(model, M, bits)
        report["results"] += [[model, M, bits, *row] for row in (ways if options.chosen else sweep)(problems, device)]
        print(f"{model}, {bits} bits, M = {M}: {report['results'][-1][3:]}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(report) + "\n", encoding="utf-8")


def ways(problems: dict[str, Problem], device: torch.device) -> list[list[float]]:
    """Microseconds with tiles as they are chosen, and as they would be by times of calls alone."""
    chosen: dict[str, AnyConfig] = {kind: choose(p) for kind, p in problems.items()}
    with mock.patch.object(stream, "_tiles_in_a_step", return_value=()):
        alone: dict[str, AnyConfig] = {kind: choose(p) for kind, p in problems.items()}
    compile_tiles((problems[kind], c) for configs in (chosen, alone) for kind, c in configs.items())
    chain = Chain(problems, device)
    times = [chain.microseconds(configs) for configs in (chosen, alone, alone, chosen)]
    return [[round(math.sqrt(first * again), 3) for first, again in (times[::3], times[1:3])]]


def sweep(problems: dict[str, Problem], device: torch.device) -> list[list[Any]]:
    """Kind, kernel, tile and microseconds of every tile, the tile that is chosen first."""
    best: dict[str, AnyConfig] = {kind: choose(p) for kind, p in problems.items()}
    others = {kind: [c for c in tiles(p) if c != best[kind]] for kind, p in problems.items()}
    compile_tiles((problems[kind], c) for kind in KINDS for c in (best[kind], *others[kind]))
    chain, rows = Chain(problems, device), []
    least = chain.microseconds(best)
    for kind in reversed(KINDS):
        for tile in (best[kind], *others[kind]):
            us = chain.microseconds({**best, kind: tile})
            if us < least:
                least, best[kind] = us, tile
            kernel, fields = defines(problems[kind], tile)["KERNEL"], [int(v) for v in astuple(tile)]
            rows.append([kind, kernel, fields, round(us, 3)])
    return rows


if __name__ == "__main__":
    main()
