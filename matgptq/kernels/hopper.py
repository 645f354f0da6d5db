"""Tiles of hopper.cu, the kernel for many tokens on sm_90: data in, data out, no GPU needed."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .problem import TILE, Problem

TOKENS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # that hopper.cu has a wgmma for
MAX_SPLITS = 8
_SHARED = 227 * 1024  # of a block; an SM has 1 KiB more, of which the system takes 1 KiB a block


@dataclass(frozen=True)
class HopperConfig:
    """Tile of a launch: hopper.cu's macros, then the blocks of a cluster, which split k.

    ``pair``: clusters of two blocks that share x. ``stream_k``: blocks share the k of tiles that do not fill a wave.
    ``gated``: a block has as many row tiles of one layer as of the other. ``long_turns``: a turn has twice the k tiles.
    """

    row_tiles: int
    words: int
    tokens: int
    k_groups: int
    blocks: int
    splits: int
    pair: bool = False
    stream_k: bool = False
    gated: bool = False
    long_turns: bool = False

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 2 if self.pair else self.splits

    @property
    def box_tokens(self) -> int:
        """Tokens that a block asks for at a time."""
        return self.tokens // 2 if self.pair else self.tokens

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.row_tiles * self.k_groups // self.words + 128

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return TILE * self.row_tiles

    @property
    def outputs(self) -> int:
        """Outputs of a block and token."""
        return self.rows // 2 if self.gated else self.rows

    @property
    def persistent(self) -> bool:
        """Whether a block may compute several tiles: sums that blocks or warpgroups exchange need its ring."""
        return self.splits == 1 and self.k_groups == 1

    @property
    def turn_tiles(self) -> int:
        """k tiles of a turn."""
        if self.tokens > 128:
            return 1
        return 2 * max(self.k_groups // self.words, 1) * (2 if self.long_turns else 1)

    @property
    def turns_at_once(self) -> int:
        """Turns that a warp takes together: it has two sets of operands."""
        return 2 if self.turn_tiles // self.k_groups * self.words == 1 else 1

    def split_turns(self, problem: Problem) -> int:
        """Turns of one of ``splits`` blocks; an even number where a turn is one k tile."""
        pair = max(self.turn_tiles, 2)
        return -(-problem.k_tiles // (pair * self.splits)) * (pair // self.turn_tiles)


def stage_bytes(problem: Problem, config: HopperConfig) -> int:
    """Shared memory of a turn: x, planes, scales, zeros."""
    turn = TILE * config.turn_tiles
    part = next(k for k in (512, 256, 128, 64, 32, 16) if k <= turn and max(problem.group_size, 0) % k == 0)
    scales = turn // part * config.row_tiles * (384 if problem.zeros else 128)
    size = config.turn_tiles * (config.tokens * 128 + config.row_tiles * problem.planes * 512) + scales
    return -(-size // 1024) * 1024


def staged_bytes(config: HopperConfig) -> int:
    """Shared memory that y passes through: of a warpgroup's rows 64 tokens, 32 where they are two tiles, or less."""
    if not config.persistent or (config.tokens < 48 and not config.gated):
        return 0
    tokens = 64 // config.words if config.tokens % 64 == 0 else 16 if config.tokens <= 16 else 32
    return tokens * 2 * config.rows


def stages(problem: Problem, config: HopperConfig) -> int:
    """Turns in flight: what fits, to a limit."""
    room = (_SHARED + 1024) // config.blocks - 1024 - 256 - staged_bytes(config)
    return min(room // stage_bytes(problem, config), 8)


def barriers_offset(problem: Problem, config: HopperConfig) -> int:
    """Shared memory before the barriers: the ring and what follows it, or the partial sums that take its place."""
    units = config.tokens // 8 * config.words
    of_groups = config.k_groups * units if config.k_groups > 1 else 0
    of_blocks = -(-units // config.splits) * config.splits if config.splits > 1 else 0
    partial = (of_groups + of_blocks) * config.row_tiles * 2048 // config.words
    return max(stages(problem, config) * stage_bytes(problem, config) + staged_bytes(config), partial)


def shared_bytes(problem: Problem, config: HopperConfig) -> int:
    """Dynamic shared memory of a block."""
    ring = stages(problem, config)
    return barriers_offset(problem, config) + 16 * ring + 8 * (ring if config.pair else 1)


def defines(problem: Problem, config: HopperConfig) -> dict[str, str]:
    """The macros that hopper.cu is compiled with, besides those of the problem."""
    return {
        "ROW_TILES": str(config.row_tiles),
        "WORDS": str(config.words),
        "TOKENS": str(config.tokens),
        "K_GROUPS": str(config.k_groups),
        "TURN_TILES": str(config.turn_tiles),
        "STAGES": str(stages(problem, config)),
        "BLOCKS": str(config.blocks),
        "SPLIT": str(int(config.splits > 1)),
        "PAIR": str(int(config.pair)),
        "STREAM_K": str(int(config.stream_k)),
        "GATED": str(int(config.gated)),
    }


@dataclass(frozen=True)
class Shares:
    """Stream-K (arXiv 2301.03598): how blocks share the k of tiles; hopper.cu's Params.

    Attributes:
        shared_tiles: the first tiles, whose turns all blocks share: what whole waves leave, and one wave.
        share: turns of a block, or pairs of them where they are multiplied so.
        one_more: blocks, the first, that have one more.
        waves: tiles that a block computes whole before.
        left_bytes: global memory for the sums that blocks leave to others, and for tickets that say so.
    """

    shared_tiles: int
    share: int
    one_more: int
    waves: int
    left_bytes: int

    @classmethod
    def of(cls, problem: Problem, config: HopperConfig, tiles: int, blocks: int) -> "Shares":
        """Of ``tiles`` tiles, with at least a turn or pair of them for each of ``blocks`` blocks."""
        waves = max(tiles // blocks - 1, 0)
        shared = tiles - waves * blocks
        turns = shared * config.split_turns(problem) // config.turns_at_once
        left_bytes = blocks * (config.rows * config.tokens * 4 + 8)
        return cls(shared, turns // blocks, turns % blocks, waves, left_bytes)


def supports(config: HopperConfig, problem: Problem) -> bool:
    """Whether a tile fits the problem and its GPU."""
    return (
        problem.sm == 90
        and config.tokens in TOKENS
        and config.row_tiles in (1, 2, 4)
        and config.words in (1, 2)
        and config.row_tiles % config.words == 0
        and (config.tokens <= 128 or config.words * config.k_groups == 1)
        and config.threads in (384, 640)
        and config.threads * config.blocks <= 768
        and config.words * config.tokens <= (96 if config.blocks == 2 else 128 if config.threads == 640 else 256)
        and stages(problem, config) >= (4 if config.turn_tiles == 1 else 2)
        and shared_bytes(problem, config) <= (_SHARED + 1024) // config.blocks - 1024
        and 1 <= config.splits <= MAX_SPLITS
        and not (config.long_turns and config.tokens > 128)
        and (not config.pair or (config.persistent and config.tokens >= 64))
        and (not config.stream_k or (config.persistent and not config.pair))
        and (not config.gated or (problem.gated and config.persistent and config.row_tiles % 2 == 0))
        # the second layer's weights are found by 32 bits from the first's; zeros take the producer's last registers
        and (not config.gated or problem.row_tiles * problem.k_tiles * problem.stored < 1 << 22)
        and not (config.gated and config.stream_k and problem.zeros)
        and (config.splits - 1) * config.split_turns(problem) * config.turn_tiles
        < problem.k_tiles  # no block without work
    )


def choose(problem: Problem) -> HopperConfig | None:
    """The tile of hopper.cu for a problem; None where linear.cu is the better kernel, or the only one."""
    p = problem
    # H200, 2026-11-30: hopper.cu is faster from 9 tokens on nearly everywhere, from 5 on where there are many planes.
    # To 16 tokens it was timed only where it scales sums.
    scales_sums = not p.shift and max(p.group_size, 0) % TILE == 0
    many_planes = p.planes >= 8 or (p.planes >= 6 and p.row_tiles < 256) or (p.planes >= 4 and p.row_tiles > 528)
    if p.sm != 90 or p.M <= 4 or (p.M <= 8 and not many_planes) or (p.M <= 16 and not scales_sums):
        return None
    if p.M <= 256 or (p.row_tiles * -(-p.M // 128) <= 264 and p.k_tiles < 128):
        best = next((c for c in _tiles(p) if supports(c, p)), None)
        if best and best.tokens > 32 and p.M <= 64:
            best = _lengthened(p, best, p.planes <= 4)
    else:
        best = min((c for c in _candidates(p) if supports(c, p)), key=lambda c: _cost(p, c), default=None)
    if best is None:
        return None
    if p.M >= 4096:  # power bounds the clock: x from the L2 costs some, SMs that wait cost none
        return replace(best, pair=True) if best.persistent and best.row_tiles * best.tokens == 512 else best
    shared, worth = _stream_k_tile(p), 0.98 if p.M < 1024 and p.planes <= 4 else 0.95
    if p.M > 256 and _waves(p, shared) < 1:
        worth = 0.92  # its times scatter: 6144 x 4096, M = 512, 4 bits 42 to 52 us, where the other tile took 43
    return shared if supports(shared, p) and _microseconds(p, shared) < worth * _microseconds(p, best) else best


def _waves(p: Problem, c: HopperConfig) -> float:
    """How often its blocks fill the SMs of an H200."""
    return _cluster_count(p, c) / (_CLUSTERS[c.splits] * _blocks_at_once(p, c))


def _cluster_count(p: Problem, c: HopperConfig) -> int:
    return -(-p.N // c.rows) * -(-p.M // c.tokens)


def _blocks_at_once(p: Problem, c: HopperConfig) -> int:
    """Blocks that an SM has at once: where there are few, they have one each."""
    return c.blocks if c.stream_k or _cluster_count(p, c) > _CLUSTERS[c.splits] else 1


def _stream_k_tile(p: Problem) -> HopperConfig:
    """The tile whose k blocks share where others leave SMs idle."""
    if p.M <= 128:
        t = next(t for t in TOKENS if t >= p.M)
        registers_for_two_words = not (p.zeros and p.planes > 6)
        if t > 32 and p.row_tiles > 256 and registers_for_two_words:
            return HopperConfig(4, 2, t, 1, 1, 1, stream_k=True)
        two = _registers_for_two_blocks(p) and t <= 32 and p.planes <= 4
        tile = HopperConfig(2, 1, t, 1, 2 if two else 1, 1, stream_k=True)
        return _lengthened(p, tile, t <= 64)
    padded = {t: -(-p.M // t) * t for t in (128, 192, 256)}
    t = 192 if p.M <= 192 else min(padded, key=lambda t: padded[t] * (1 + (256 - t) / 3200))
    small = HopperConfig(2, 1, 128, 1, 1, 1, stream_k=True)
    waves = _waves(p, small)
    # It leaves half the sums to others, but decodes twice as often (`hopper_tiles.json`, runs 6 and 8).
    if p.M <= 512 and waves <= 1 and waves * p.k_tiles <= 128 and padded[128] <= padded[t]:
        return small
    row_tiles, words = (4, 2) if t == 128 else (2, 1)
    return HopperConfig(row_tiles, words, t, 1, 1, 1, stream_k=True)


def _registers_for_two_blocks(p: Problem) -> bool:
    """Whether two blocks an SM may do: many scales take registers."""
    return p.group_size <= 0 or p.group_size % 32 == 0


def _microseconds(p: Problem, c: HopperConfig) -> float:
    """Estimated time of a tile, to decide between one wave more and stream-K.

    H200, 2026-11-23, 4 bits, 14 shapes of Llama and Qwen3 models, M 16 to 2048 (`hopper_tiles.json`, run 6): 0.4 % from
    the fastest tile of both kinds in the mean; 7.6 % without stream-K.
    """
    waves = _waves(p, c)
    cycles = max(145 + c.tokens, 2.26 * c.tokens)  # of an SM, for 64 x 64 weights
    if p.M > 64:  # to 64 tokens memory bounds many planes, wherever they are multiplied
        cycles += 12 * max(p.planes - 4, 0)
    if c.row_tiles == 2 and c.tokens <= 128 and p.M > 512:
        cycles *= 1.2  # x comes from the L2 more often
    tile = c.row_tiles * p.k_tiles / c.splits * _blocks_at_once(p, c) * cycles / 1755
    if c.stream_k:  # the sums of a tile's blocks are added one after the other
        return waves * tile + 2 + 0.012 * c.row_tiles * c.tokens + 0.7 / min(waves, 1)
    # Sums that blocks of a cluster exchange: 0.012 a row tile and token by run 6, 0.005 by its clusters of three. The
    # smaller changes few tiles that were not timed, and mends 2560 x 9728, M = 128: 27.4 so, 20.8 by stream-K.
    exchange = 0.005 * c.row_tiles * c.tokens if c.splits > 1 else 0
    later = math.ceil(waves) - 1  # waves; those of tiles that are split begin anew
    return tile + exchange + later * (tile + (0 if c.persistent else 8))


def _tiles(p: Problem) -> Iterator[HopperConfig]:
    """Where one wave of blocks may do: the best tile and what to take where it does not fit.

    Measured on an H200, 2026-11-23: fp16, groups of 128, 2, 4 and 8 bits, M 8 to 768, 2048 x 2048 to 16384 x 16384,
    6144 x 4096, 28672 x 4096, 4096 x 14336 (`benchmarks/results/h200/hopper_tiles.json`): with `_candidates` 0.4 %
    longer than the fastest tile in the mean. Blocks, in clusters that run at once, are to fill 132 SMs once. Tiles are
    (row tiles, words, tokens, k groups, blocks an SM, blocks of a cluster).
    """
    if p.M <= 128:
        t = next(t for t in TOKENS if t >= p.M)
    else:
        t = 96 if p.M <= 192 or 256 < p.M <= 384 or 512 < p.M <= 768 else 128
        if p.M > 256 and p.row_tiles * -(-p.M // t) > 264:
            t = 128  # else blocks would not fit the SMs once
    rows = p.row_tiles * -(-p.M // t)
    two, long = _registers_for_two_blocks(p), p.k_tiles >= 128
    if 128 < p.M <= 256:
        yield from _tiles_of_all_tokens(p)
    if t <= 32:
        yield from _tiles_of_few_tokens(p, t)
    elif rows <= 33 or (rows <= 66 and t == 128 and not long):
        if two and (t <= 64 or (t == 96 and p.planes <= 6)):
            yield HopperConfig(1, 1, 48 if t == 96 else 32, 2, 2, 2)
        yield HopperConfig(1, 1, 48 if t in (48, 96) else 64, 2, 1, 2 if rows <= 33 else 1)
    elif rows <= 66:
        yield HopperConfig(2, 1, t, 1, 1, 3) if t == 128 else HopperConfig(1, 1, t, 2, 1, 2)
    elif rows <= 132:
        if t <= 64 or (t == 96 and (p.planes <= 3 or p.M > 256)) or (t == 128 and p.planes <= 4 and not long):
            yield HopperConfig(1, 1, t, 2, 1, 1)
        yield HopperConfig(2, 1, t, 1, 1, 2)
    elif rows <= 264 and p.M > 96:
        yield HopperConfig(2, 1, t, 1, 1, 1)
    else:
        yield HopperConfig(4, 2, t, 1, 1, 2 if rows <= 264 else 1)
    yield from (HopperConfig(1, 1, min(t, 64), 2, 1, splits) for splits in (2, 1))


def _tiles_of_few_tokens(p: Problem, t: int) -> Iterator[HopperConfig]:
    """To 32 tokens, where turns are long if that pays: a thread that asks for weights does so for more at a time.

    Measured on an H200, 2026-11-30 (`hopper_tiles.json`, run 7): 15 shapes, 2, 4 and 8 bits, 8, 16 and 32 tokens.
    """
    rows, two, short = p.row_tiles, _registers_for_two_blocks(p), p.k_tiles < 128
    few_planes, some_planes = p.planes <= 3, p.planes <= 6
    if rows <= 22 and two:
        yield HopperConfig(1, 1, t, 2, 2, 6)
    if t <= 16:  # as a step has them (2026-12-01, `chain_few_tokens.json`)
        if rows <= 66 and not short:
            yield _lengthened(p, HopperConfig(1, 1, t, 2, 1, 2))
        if t == 8 and 66 < rows <= 132 and short and not some_planes:
            yield HopperConfig(1, 1, t, 4, 1, 1)
        if 264 < rows <= 528 and p.planes >= 3:
            yield _lengthened(p, HopperConfig(4, 1, t, 1, 1, 1), some_planes or t == 8)
    if rows <= 132:
        if two and t <= 16 and (few_planes or (t == 8 and (short or rows > 66))):
            yield _lengthened(p, HopperConfig(1, 1, t, 2, 2, 2), some_planes)
        if rows <= 66:
            if two and short and p.planes <= (5 if t == 32 else 6 if t > 16 else 8):
                yield HopperConfig(1, 1, t, 2, 2, 2)
            yield _lengthened(p, HopperConfig(1, 1, t, 2, 1, 2), some_planes and not short)
        yield _lengthened(p, HopperConfig(1, 1, t, 2, 1, 1), some_planes)
    else:
        if two and (few_planes or rows > 264):
            yield _lengthened(p, HopperConfig(2, 1, t, 1, 2, 2 if rows <= 264 else 1))
        yield _lengthened(p, HopperConfig(2, 1, t, 2, 1, 1), some_planes)


def _lengthened(p: Problem, c: HopperConfig, wanted: bool = True) -> HopperConfig:
    """The tile with long turns, if they are wanted and three fit."""
    long = replace(c, long_turns=True)
    return long if wanted and supports(long, p) and stages(p, long) >= 3 else c


def _tiles_of_all_tokens(p: Problem) -> Iterator[HopperConfig]:
    """129 to 256 tokens: one tile holds them all where there are rows enough, and then decodes each weight once."""
    t = 192 if p.M <= 192 else 256
    many_planes = p.planes >= 8
    least = 66 if many_planes and t == 192 else 96 if many_planes or t == 192 else 132
    if p.row_tiles > least:
        yield HopperConfig(2, 1, t, 1, 1, 1 if p.row_tiles > 132 else 2)
    if p.row_tiles <= 33 and t == 192:
        yield HopperConfig(1, 1, 48, 2, 1, 1)


def _candidates(p: Problem) -> Iterator[HopperConfig]:
    """Where it takes several waves: tiles that were the fastest somewhere."""
    for t, splits in itertools.product((96, 128, 192, 256), _CLUSTERS):
        if t <= 128 or splits == 1 or p.M <= 512:
            yield HopperConfig(2, 1, t, 1, 1, splits)
        # It decodes twice as often as 256 tokens: three planes took 0.4 to 4 % longer so than four by the other.
        if t == 128 and (p.planes != 3 or p.M < 512):
            yield HopperConfig(4, 2, t, 1, 1, splits)
        if t == 128 and p.planes <= 4:
            yield HopperConfig(1, 1, t, 2, 1, splits)


# By blocks of a cluster: clusters that an H200 runs at once, a block an SM (cuOccupancyMaxActiveClusters). Its 132 SMs
# come in groups of different sizes.
_CLUSTERS = {1: 132, 2: 66, 3: 39, 4: 30, 6: 17, 8: 15}


def _cost(p: Problem, c: HopperConfig) -> float:
    """A number that ranks tiles of a block an SM.

    Its constants were fitted to 2400 times on an H200, 2026-11-22 (fp16, groups of 128, 2, 4 and 8 bits, M 9 to 512,
    2048 x 2048 to 16384 x 16384, 6144 x 4096, 28672 x 4096, 4096 x 14336), and to 2 kinds of tiles of an earlier
    kernel from M = 1024 on.
    """
    waves = -(-_cluster_count(p, c) // _CLUSTERS[c.splits])
    turns = -(-p.k_tiles // (2 * c.splits))  # of 128 k
    sums = c.row_tiles * c.tokens
    multiply = 4 * sums
    decode = c.row_tiles * (167.6 + 4.397 * p.planes)
    fetch = 3.368 * c.tokens + 2.991 * c.row_tiles * p.planes
    throughput = (multiply**1.292 + decode**1.292 + fetch**1.292) ** (1 / 1.292)
    latency = (541.7 + 9.627 * p.planes + 0.4304 * c.tokens) * c.words / c.k_groups
    turn = (throughput**3.585 + latency**3.585) ** (1 / 3.585)
    reduction = (17.43 * sums + 11 if c.splits > 1 else 0) + (7.322 * sums * c.k_groups if c.k_groups > 1 else 0)
    return waves * (turns * turn + reduction + 4893)
