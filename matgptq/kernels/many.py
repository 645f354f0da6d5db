"""Tiles of many.cu, the kernel for many tokens on GPUs that hopper.cu is not for: data in, data out, no GPU needed."""

import math
from dataclasses import dataclass

from .problem import TILE, Problem

# Multiprocessors of a GPU of each kind, its largest where they differ.
_SMS = {80: 108, 86: 84, 87: 16, 89: 142, 100: 148, 103: 148, 120: 188, 121: 48}
_ROW_TILES = 2  # of a block
# By tokens of a block: microseconds a k tile on an H200 (2026-11-23, tiles for sm_80, 4 bits), of one block an SM and
# of two. Of 64 tokens three fit an SM, and some have them while others have one.
_ALONE = {64: 0.54, 96: 0.69, 128: 0.86}
_PAIR = {64: 1.16, 96: 1.14, 128: 1.46}


@dataclass(frozen=True)
class ManyConfig:
    """Tile of a launch; the macros of many.cu."""

    tokens: int
    stages: int
    blocks: int
    gated = False
    cluster = 1
    rows = TILE * _ROW_TILES
    threads = 64 * _ROW_TILES


def stage_bytes(problem: Problem, tokens: int) -> int:
    """Shared memory of a k tile: x, planes, scales, zeros."""
    part = next(k for k in (64, 32, 16) if max(problem.group_size, 0) % k == 0)
    scales = TILE // part * (384 if problem.zeros else 128)
    return tokens * 128 + _ROW_TILES * (problem.planes * 512 + scales)


def shared_bytes(problem: Problem, config: ManyConfig) -> int:
    """Dynamic shared memory of a block: the ring, or y that takes its place."""
    ring = config.stages * stage_bytes(problem, config.tokens)
    return max(ring, config.tokens * (config.rows + 8) * 2)


def defines(config: ManyConfig) -> dict[str, str]:
    """The macros that many.cu is compiled with, besides those of the problem."""
    return {"TOKENS": str(config.tokens), "STAGES": str(config.stages), "BLOCKS": str(config.blocks)}


def supports(config: ManyConfig, problem: Problem) -> bool:
    """Whether a tile fits the problem and its GPU."""
    shared = config.blocks * (shared_bytes(problem, config) + 1024)
    return config.stages > 1 and config.tokens % 32 == 0 and shared <= (problem.shared_limit + 1) * 1024


def choose(problem: Problem, linear_rows: int, linear_tokens: int) -> ManyConfig | None:
    """The tile of many.cu for a problem; None where linear.cu, by blocks of ``linear_rows`` x ``linear_tokens``, is
    expected to be faster.

    By the time of the multiprocessor with most blocks, if it were an H200's: at 4096 x 4096, 8192 x 8192 and 28672 x
    4096, M 48 to 1024, 4 bits, 0.6 % from the fastest in the mean, 5 % at most (2026-11-23,
    `benchmarks/results/h200/many_tiles.json`). The GPUs that it is for were not there to measure.
    """
    p, sms = problem, _SMS.get(problem.sm, 108)
    if p.M <= 32:
        return None

    def most_blocks(rows: int, tokens: int) -> int:
        return math.ceil(-(-p.N // rows) * -(-p.M // tokens) / sms)

    def microseconds(tokens: int) -> float:
        pairs, alone = divmod(most_blocks(ManyConfig.rows, tokens), 2)
        return pairs * _PAIR[tokens] + alone * _ALONE[tokens]

    # Registers for sums of 128 tokens are there where weights are made in few steps.
    most = 96 if p.rounds or (p.zeros and p.group_size > 0 and p.group_size % TILE) else 128
    tokens = min((t for t in _PAIR if t <= most), key=microseconds)
    if microseconds(tokens) > most_blocks(linear_rows, linear_tokens) * max(0.26, linear_rows / 390):
        return None
    for blocks in (2, 1):  # an SM, if each has two k tiles in its ring
        room = 1024 * (p.shared_limit + 1) // blocks - 1024
        stages = min(room // stage_bytes(p, tokens), 4)
        if stages > 1:
            break
    return ManyConfig(tokens, stages, blocks)
