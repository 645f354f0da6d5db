"""Tiles of many.cu, the kernel for many tokens on GPUs that hopper.cu is not for: data in, data out, no GPU needed."""

from dataclasses import dataclass

from .problem import TILE, Problem

# Multiprocessors of a GPU of each kind, its largest where they differ.
_SMS = {80: 108, 86: 84, 87: 16, 89: 142, 100: 148, 103: 148, 120: 188, 121: 48}


@dataclass(frozen=True)
class ManyConfig:
    """Tile of a launch; the macros of many.cu."""

    row_tiles: int
    tokens: int
    stages: int
    blocks: int
    gated = False
    cluster = 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 64 * self.row_tiles

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return TILE * self.row_tiles


def stage_bytes(problem: Problem, row_tiles: int, tokens: int) -> int:
    """Shared memory of a k tile: x, planes, scales, zeros."""
    part = next(k for k in (64, 32, 16) if max(problem.group_size, 0) % k == 0)
    scales = TILE // part * (384 if problem.zeros else 128)
    return tokens * 128 + row_tiles * (problem.planes * 512 + scales)


def shared_bytes(problem: Problem, config: ManyConfig) -> int:
    """Dynamic shared memory of a block: the ring, or y that takes its place."""
    ring = config.stages * stage_bytes(problem, config.row_tiles, config.tokens)
    return max(ring, config.tokens * (config.rows + 8) * 2)


def defines(config: ManyConfig) -> dict[str, str]:
    """The macros that many.cu is compiled with, besides those of the problem."""
    return {
        "ROW_TILES": str(config.row_tiles),
        "TOKENS": str(config.tokens),
        "STAGES": str(config.stages),
        "BLOCKS": str(config.blocks),
    }


def supports(config: ManyConfig, problem: Problem) -> bool:
    """Whether a tile fits the problem and its GPU."""
    shared = config.blocks * (shared_bytes(problem, config) + 1024)
    return config.stages > 1 and config.tokens % 32 == 0 and shared <= (problem.shared_limit + 1) * 1024


def choose(problem: Problem) -> ManyConfig | None:
    """The tile of many.cu for a problem; None where linear.cu is expected to be the better kernel.

    By reckoning alone: none of these GPUs was there to measure.
    """
    p = problem
    # Registers for sums of 128 tokens are there where weights are made in few steps.
    most = 96 if p.rounds or (p.zeros and p.group_size % TILE and p.group_size > 0) else 128
    # Decoding a k tile costs about what multiplying it with 16 tokens does.
    tokens = min((t for t in (64, 96, 128) if t <= most), key=lambda t: (-(-p.M // t) * (t + 16), -t))
    # A warp for every scheduler, or linear.cu, whose warps share k; two, or smaller blocks, to spread them evenly.
    warps = 2 * p.row_tiles * -(-p.M // tokens) / (4 * _SMS.get(p.sm, 108))
    if p.M <= 64 or warps < 1:
        return None
    return _with_stages(p, 2 if warps >= 2 else 1, tokens)


def _with_stages(p: Problem, row_tiles: int, tokens: int) -> ManyConfig:
    """Four warps of each of two blocks, or fewer blocks where so many would have less than two k tiles in the ring."""
    for blocks in (4 // row_tiles, 2 // row_tiles, 1):
        room = 1024 * (p.shared_limit + 1) // blocks - 1024
        stages = min(room // stage_bytes(p, row_tiles, tokens), 4)
        if stages > 1:
            break
    return ManyConfig(row_tiles, tokens, stages, blocks)
