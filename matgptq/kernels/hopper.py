"""Tiles of hopper.cu, the kernel for many tokens on sm_90: data in, data out, no GPU needed."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .problem import TILE, Problem

TOKENS = (24, 32, 48, 64, 96, 128, 256)  # that hopper.cu has a wgmma for
MAX_SPLITS = 8
_SHARED = 227 * 1024  # of a block; an SM has 1 KiB more, of which the system takes 1 KiB a block


@dataclass(frozen=True)
class HopperConfig:
    """Tile of a launch: hopper.cu's macros, then the blocks of a cluster, which split k."""

    row_tiles: int
    words: int
    tokens: int
    k_groups: int
    blocks: int
    splits: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.row_tiles * self.k_groups // self.words + 128

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return TILE * self.row_tiles

    @property
    def persistent(self) -> bool:
        """Whether a block may compute several tiles: sums that blocks or warpgroups exchange need its ring."""
        return self.splits == 1 and self.k_groups == 1

    @property
    def turn_tiles(self) -> int:
        """k tiles of a turn."""
        return 4 if self.k_groups == 4 else 1 if self.tokens > 128 else 2

    def split_turns(self, problem: Problem) -> int:
        """Turns of one of ``splits`` blocks; an even number where a turn is one k tile."""
        pair = max(self.turn_tiles, 2)
        return -(-problem.k_tiles // (pair * self.splits)) * (pair // self.turn_tiles)


def stage_bytes(problem: Problem, config: HopperConfig) -> int:
    """Shared memory of a turn: x, planes, scales, zeros."""
    turn = TILE * config.turn_tiles
    part = next(k for k in (turn, 128, 64, 32, 16) if max(problem.group_size, 0) % k == 0)
    scales = turn // part * config.row_tiles * (384 if problem.zeros else 128)
    size = config.turn_tiles * (config.tokens * 128 + config.row_tiles * problem.planes * 512) + scales
    return -(-size // 1024) * 1024


def stages(problem: Problem, config: HopperConfig) -> int:
    """Turns in flight: what fits, to a limit."""
    room = (_SHARED + 1024) // config.blocks - 1024 - 256
    return min(room // stage_bytes(problem, config), 8)


def barriers_offset(problem: Problem, config: HopperConfig) -> int:
    """Shared memory before the barriers: the ring, or the partial sums that follow in the same place."""
    units = config.tokens // 8 * config.words
    partial = (
        max((config.k_groups - 1) * units, -(-units // config.splits) * config.splits)
        * config.row_tiles
        * 2048
        // config.words
    )
    return max(stages(problem, config) * stage_bytes(problem, config), partial)


def shared_bytes(problem: Problem, config: HopperConfig) -> int:
    """Dynamic shared memory of a block."""
    return barriers_offset(problem, config) + 16 * stages(problem, config)


def defines(problem: Problem, config: HopperConfig) -> dict[str, str]:
    """The macros that hopper.cu is compiled with, besides those of the problem."""
    return {
        "ROW_TILES": str(config.row_tiles),
        "WORDS": str(config.words),
        "TOKENS": str(config.tokens),
        "K_GROUPS": str(config.k_groups),
        "STAGES": str(stages(problem, config)),
        "BLOCKS": str(config.blocks),
    }


def supports(config: HopperConfig, problem: Problem) -> bool:
    """Whether a tile fits the problem and its GPU."""
    return (
        problem.sm == 90
        and config.tokens in TOKENS
        and config.row_tiles in (2, 4)
        and config.words == (2 if config.tokens <= 128 else 1)
        and (config.words == 2 or config.k_groups == 1)
        and config.threads in (384, 640)
        and config.threads * config.blocks <= 768
        and stages(problem, config) >= (4 if config.turn_tiles == 1 else 2)
        and shared_bytes(problem, config) <= (_SHARED + 1024) // config.blocks - 1024
        and 1 <= config.splits <= MAX_SPLITS
        and (config.splits - 1) * config.split_turns(problem) * config.turn_tiles
        < problem.k_tiles  # no block without work
    )


def choose(problem: Problem) -> HopperConfig | None:
    """The tile of least estimated cost; None where linear.cu is the better kernel, or the only one."""
    p = problem
    if (
        p.sm != 90 or p.M <= 16
    ):  # H200, 2026-11-22: at 24 tokens hopper.cu is faster nearly everywhere, at 16 it seldom is
        return None
    return min((c for c in _candidates(p) if supports(c, p)), key=lambda c: _cost(p, c), default=None)


def _candidates(p: Problem) -> Iterator[HopperConfig]:
    """Tiles that were the fastest somewhere."""
    tokens = {next((t for t in TOKENS if t >= p.M), 128)}
    tokens |= {t for t in (64, 96) if t < p.M <= 2 * t}
    for t, splits in itertools.product(sorted(min(t, 128) for t in tokens), _CLUSTERS[1]):
        if t > 32:
            yield HopperConfig(2, 2, t, 2, 1, splits)
            yield HopperConfig(4, 2, t, 1, 1, splits)
            continue
        yield HopperConfig(2, 2, t, 4, 1, splits)
        if p.group_size % 32 == 0 or p.group_size == -1:  # many scales take registers
            yield HopperConfig(2, 2, t, 2, 2, splits)
    if p.M >= 192:
        for splits in _CLUSTERS[1]:
            yield HopperConfig(2, 1, 256, 1, 1, splits)


# By blocks an SM and blocks of a cluster: clusters that an H200 runs at once (cuOccupancyMaxActiveClusters). Its 132
# SMs come in groups of different sizes.
_CLUSTERS = {
    1: {1: 132, 2: 66, 3: 39, 4: 30, 6: 17, 8: 15},
    2: {1: 264, 2: 132, 3: 79, 4: 62, 6: 39, 8: 30},
}


def _cost(p: Problem, c: HopperConfig) -> float:
    """A number that ranks tiles.

    Its constants were fitted to 2700 times on an H200, 2026-11-22 (fp16, groups of 128, 2, 4 and 8 bits, M 24 to 4096,
    2048 x 2048 to 16384 x 16384, 6144 x 4096, 28672 x 4096, 4096 x 14336): what it chooses takes 0.9 % longer than the
    best tile in the mean, 16 % at most.
    """
    clusters = -(-p.N // c.rows) * -(-p.M // c.tokens)
    waves = -(-clusters // _CLUSTERS[c.blocks][c.splits])
    turns = -(-p.k_tiles // (2 * c.splits))  # of 128 k
    sums = c.row_tiles * c.tokens
    multiply = 4 * sums
    decode = c.row_tiles * (169 + 8.4 * p.planes) * (1.9 if c.k_groups == 4 else 1)
    fetch = 0.67 * c.tokens + 2.8 * c.row_tiles * p.planes
    turn = (multiply**1.55 + decode**1.55 + fetch**1.55) ** (1 / 1.55)
    if c.blocks == 2:
        turn *= max(1.0, 2.5 * min(clusters * c.splits / waves / 132, 2))
    reduction = (9.4 * sums + 630 if c.splits > 1 else 0) + (4.4 * sums if c.k_groups > 1 else 0)
    return waves * (turns * turn + reduction + 18700)
