"""Tiles of linear.cu and few.cu, the kernels for few tokens (stream.cuh): data in, data out, no GPU needed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .problem import MEAN_ROWS, TILE, Problem

MAX_SPLITS = 8  # portable cluster size
_FACTOR_BYTES = 128  # stream.cuh, kFactorBytes


@dataclass(frozen=True)
class Config:
    """Tile of a launch; the macros of linear.cu and few.cu, then what is decided at launch, and which of them it is."""

    token_tiles: int
    row_tiles: int
    turn_tiles: int
    warps_n: int
    warps_k: int
    stages: int
    blocks: int
    splits: int
    chunk_tiles: int
    few: bool = False
    gated: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_n * self.warps_k

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return TILE * self.warps_n * self.row_tiles

    @property
    def outputs(self) -> int:
        """Outputs of a block and token."""
        return self.rows // 2 if self.gated else self.rows

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return 2 if self.few else 8 * self.token_tiles

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.splits

    def split_tiles(self, problem: Problem) -> int:
        """k tiles of one of ``splits`` blocks, in whole turns."""
        turns = -(-problem.k_tiles // self.turn_tiles)
        return -(-turns // self.splits) * self.turn_tiles


def defines(problem: Problem, config: Config) -> dict[str, str]:
    """The macros that linear.cu and few.cu are compiled with, besides those of the problem."""
    return {
        "TOKEN_TILES": str(config.token_tiles),
        "ROW_TILES": str(config.row_tiles),
        "K_TILES": str(config.turn_tiles),
        "WARPS_N": str(config.warps_n),
        "WARPS_K": str(config.warps_k),
        "STAGES": str(config.stages),
        "BLOCKS": str(config.blocks),
        "GATED": str(int(config.gated)),
        "SUMMED": str(int(problem.summed and problem.shares_norm)),
        "SCALED": str(int(problem.scaled and problem.shares_norm)),
    }


def inbox_offset(problem: Problem, config: Config) -> int:
    """Shared memory before the inbox: the ring and x, or the partial sums that follow in the same place."""
    turn = TILE * config.turn_tiles
    part = next(k for k in (turn, 64, 32, 16) if max(problem.group_size, 0) % k == 0)
    slabs = config.turn_tiles * problem.planes + turn // part * (3 if problem.zeros else 1)
    ring = config.warps_n * config.warps_k * config.stages * config.row_tiles * slabs * 512
    chunk = min(problem.M, config.tokens) * config.chunk_tiles * TILE  # values of x
    chunk_bytes = -(-(3 * chunk + 4 * chunk // part) // 16) * 16 if config.few else 2 * chunk
    x = chunk_bytes * (2 if config.split_tiles(problem) > config.chunk_tiles else 1)
    partial = config.warps_k * config.tokens * (config.rows + 4) * 4
    return max(ring + x, partial)


def share_bits(problem: Problem, config: Config) -> int:
    """The logarithm of how many times four outputs each block of the cluster finishes; the last ones may have none."""
    quads = min(problem.M, config.tokens) * config.outputs // 4
    return (quads - 1).bit_length() + 1 - config.splits.bit_length()


def _inbox_bytes(problem: Problem, config: Config) -> int:
    """Partial sums of a block's share from each block of the cluster, and a barrier."""
    sums = 4 * config.splits * (2 if config.gated else 1) << share_bits(problem, config)
    return 16 + 4 * sums if config.splits > 1 else 0


def shared_bytes(problem: Problem, config: Config) -> int:
    """Dynamic shared memory of a block; of some tiles with one block an SM so much that there is no second.

    A block starts while others' still run. Where two fit an SM they would be given the first ones that are free, and
    other SMs none. H200, a layer of Llama-3.1-8B: 2026-11-30, one token, 4 bits 43.6 us, 40.9 so; 2026-12-01, 4 tokens
    by linear.cu, 2 bits 45.0, 40.7. few.cu's tiles of layers behind no norm took up to 8 % longer so.
    """
    factors = _FACTOR_BYTES if problem.scaled and problem.shares_norm else 0
    needed = factors + inbox_offset(problem, config) + _inbox_bytes(problem, config)
    alone = config.blocks == 1 and (problem.scaled or not config.few)
    return max(needed, (problem.shared_limit + 1) * 512) if alone else needed


def grid(problem: Problem, config: Config) -> tuple[int, int, int]:
    """Blocks: k splits (one cluster), token tiles, row blocks."""
    return config.splits, -(-problem.M // config.tokens), -(-problem.N // config.outputs)


def supports(config: Config, problem: Problem) -> bool:
    """Whether a tile fits the problem and its GPU."""
    limit = problem.shared_limit * 1024
    split_tiles = config.split_tiles(problem)
    turn_of_all = config.warps_k * config.turn_tiles
    return (
        shared_bytes(problem, config) <= limit
        and config.chunk_tiles % turn_of_all == 0
        and (not config.gated or (problem.gated and config.warps_n * config.row_tiles % 2 == 0))
        and _chunk_fits(config, problem)
        and 1 <= config.splits <= (MAX_SPLITS if problem.sm >= 90 else 1)
        and (not problem.summed or 4 << share_bits(problem, config) >= MEAN_ROWS)
        and (config.splits - 1) * split_tiles < problem.k_tiles  # no block without work
        and config.threads * config.blocks <= (2048 if problem.sm in (80, 87, 90, 100, 103) else 1536)
    )


def _chunk_fits(config: Config, problem: Problem) -> bool:
    """Whether a chunk of x is of a size that the kernel can work with."""
    if config.few:
        return config.chunk_tiles % 4 == 0 and 4 * config.chunk_tiles * min(problem.M, config.tokens) <= config.threads
    whole = config.chunk_tiles >= config.split_tiles(problem)
    return whole or config.chunk_tiles >= config.stages * config.warps_k * config.turn_tiles


def few_choice(problem: Problem) -> Config | None:
    """The tile of few.cu for a problem; None where linear.cu is the better kernel, or the only one."""
    if problem.M > 2 or (problem.group_size > 0 and problem.group_size % 64):
        return None
    return next((config for config in _few_tiles(problem) if fits(config, problem)), None)


def _few_tiles(p: Problem) -> Iterator[Config]:
    """The best tile and what to take where it does not fit, measured as `_preferred`'s, for M = 1 and 2."""
    planes, rows, long, short = p.planes, p.row_tiles, p.k_tiles >= 128, p.k_tiles <= 48

    def tile(turn_tiles: int, warps_n: int, warps_k: int, stages: int, splits: int, blocks: int = 2) -> Config:
        splits = splits if p.sm >= 90 else 1
        return with_chunk(p, Config(1, 1, turn_tiles, warps_n, warps_k, stages, blocks, splits, 0, True))

    if p.sm >= 90:
        yield from (tile(*fields) for fields in _tiles_in_a_step(p))
    if rows >= 256:
        if planes == 4 and short and rows <= 264:
            return
        if planes <= 3 or (planes == 4 and not long):
            yield tile(2, 2, 4, 3 if planes <= 3 and not long else 2, 2 if long else 1)
        elif planes <= 6:
            yield tile(2 if planes == 4 else 1, 1, 8, 2, 1) if long else tile(1, 2, 4, 3, 1)
        return
    if 132 < rows <= 192 and planes <= 3:
        yield tile(2, 2, 4, 3, 2)
    if 132 < rows <= 192 and planes == 4 and not short:
        yield tile(2, 1, 4, 3, 2)
    if 66 < rows < 128 and planes == 4 and p.k_tiles >= 256:
        yield tile(2, 1, 4, 3, 2)
    if rows > 132 or (planes > 2 and rows < 128 and p.k_tiles > 128):
        return
    if rows >= 128 and p.k_tiles <= 64:
        if planes <= 3:
            yield tile(2, 2, 4, 3, 2)
        elif planes == 4 and not short:
            yield tile(2, 1, 4, 3, 2)
        elif planes == 4:
            return
        elif short:
            yield tile(1, 2, 4, 3, 2)
    if rows <= 22 and p.M == 2 and (planes > 4 or p.k_tiles > 32):
        return
    if 22 < rows <= 66 and p.k_tiles <= 16 and planes <= 4:
        yield tile(2, 1, 8, 2, 1)
    if 66 < rows < 128 and planes <= 3 and p.M == 2 and p.k_tiles > 64:
        yield tile(2, 2, 4, 3, 2)
    if rows <= 66 and long and p.M == 1:
        yield tile(2, 1, 8, 4, 2)
    if (planes <= 3 and not 66 < rows < 128) or (planes == 4 and rows >= 128):
        yield tile(2, 1, 8, 2, 2)
    elif planes <= 6 and (rows >= 128 or 48 < rows <= 66):
        yield tile(1, 1, 8, 3, 2)
    elif rows < 128:
        yield tile(2, 1, 4, 3, 2)
    if rows > 66:
        yield tile(1, 1, 8, 2, 2)


def _tiles_in_a_step(p: Problem) -> Iterator[tuple[int, int, int, int, int, int]]:
    """K tiles a turn, warps along rows and k, stages, blocks of a cluster and an SM, of layers as a step has them.

    H200, 2026-11-30: layers of Llama-3.1-8B (2, 3, 4, 8 bits), Qwen3-4B and 14B (2, 4 bits), one after the other
    (`benchmarks/results/h200/chain_tiles.json`; two tokens 2026-12-01, `chain_few_tokens.json`). A layer starts while
    one of another shape ends, and waits for what that one writes: few.cu, which has asked for a whole ring of weights
    by then, gains more on linear.cu than alone.
    """
    planes, rows, k = p.planes, p.row_tiles, p.k_tiles
    if p.scaled and 66 < rows <= 128 and k <= 96:
        yield (2, 4, 2, 3, 4, 1) if planes <= 4 else (1, 2, 4, 3, 2, 1)
    if p.scaled and rows >= 400 and planes <= 3:
        yield 2, 4, 2, 3, 2, 2
    if p.scaled and rows >= 256 and planes > 6 and not 528 < rows < 660:  # nor a second wave that is nearly empty
        yield 1, 4, 2, 2, 1, 1
    if not 36 <= rows <= 80:
        return
    if 40 < k <= 96 and not p.scaled and p.M == 1:
        if planes <= 3:
            yield 2, 1, 4, 3, 2, 1
        elif planes == 4 and k > 64:
            yield 2, 4, 2, 4, 4, 1
    if k > 128 and 5 <= planes <= 6 and (p.M == 1 or rows <= 66):
        yield 1, 1, 8, 3, 2, 1
    elif k > 128 and planes <= 4 and 48 < rows <= 66:
        yield {2: (2, 1, 16, 2, 2, 1), 3: (2, 1, 8, 4, 2, 1), 4: (2, 1, 8, 3, 2, 1)}[planes]
    elif k >= 128 and planes <= 3:
        yield 2, 2, 4, 3, 4, 2
    elif k > 128 and planes == 4:
        yield (2, 1, 4, 4, 2, 1) if k >= 256 else (2, 1, 8, 2, 4, 1)


def linear_choice(problem: Problem) -> Config:
    """The tile of linear.cu for a problem."""
    config = _preferred(problem)
    if problem.sm < 90:
        config = with_chunk(problem, replace(config, splits=1))
    while not fits(config, problem):
        config = _smaller(config, problem)
    return config


def _preferred(p: Problem) -> Config:
    """Measured on an H200, 2026-11-22, for 1 and 2 tokens 2026-11-23: fp16, group_size 128, widths 2, 3, 4, 6, 8, M 1
    to 64, N x K 2048^2 to 16384^2, 6144 x 4096, 28672 x 4096, 4096 x 14336; at 2, 4, 8 bits 34 shapes of Llama and
    Qwen3 models (`benchmarks/results/h200/model_tiles.json`)."""
    low, rows = p.planes <= 4, p.row_tiles
    splits = 2 if rows <= 64 else 1

    def tile(
        token_tiles: int,
        row_tiles: int,
        turn_tiles: int,
        warps_n: int,
        warps_k: int,
        stages: int,
        blocks: int,
        splits: int,
    ) -> Config:
        return with_chunk(p, Config(token_tiles, row_tiles, turn_tiles, warps_n, warps_k, stages, blocks, splits, 0))

    # Several scales a tile take registers, so there are fewer warps or tokens.
    if p.group_size > 0 and p.group_size % 32:
        return tile(1, 1, 1, 1, 8, 2, 1, splits)
    if p.group_size > 0 and p.group_size % 64 and (p.M > 8 or (p.dtype == "bfloat16" and not low)):
        return tile(1 if p.M <= 8 else 2, 1, 1, 1, 8, 2, 1, splits)
    if p.M > 16:
        warps_n = 1 if rows <= 96 else 2 if rows < 256 else 4
        blocks = -(-rows // warps_n) * -(-p.M // 32)
        splits = 2 if 2 * blocks <= 132 else 1
        registers_for_32 = not (p.zeros and p.planes > 6 and p.dtype == "bfloat16")
        return tile(4 if registers_for_32 else 2, 1, 1, warps_n, 8 // warps_n, 2 if warps_n == 1 else 3, 1, splits)
    if p.M > 8:
        if rows <= 64:
            return tile(2, 1, 1, 1, 8 if p.k_tiles < 128 else 12, 2, 1, splits)
        warps_n = 1 if rows < 384 else 2
        return tile(2, 2, 2 if p.planes == 2 else 1, warps_n, 8 // warps_n, 2, 1, 2 if rows <= 128 else 1)
    two = 2 if low or p.dtype == "float16" or not p.rounds else 1  # blocks an SM: the registers of several planes
    if p.M > 2:
        return tile(1, 1, *_three_to_eight(p, two))
    # Few rows, or 1.2 waves of one row tile a block: four blocks share a long k.
    if (
        rows <= 22
        or (rows <= 48 and not low and p.k_tiles >= 64 and p.M == 2)
        or (66 < rows <= 96 and p.k_tiles >= 256)
    ):
        return tile(1, 1, 1, 1, 8, 2, two, 4) if rows <= 66 or p.M == 2 else tile(1, 1, 1, 1, 16, 2, 1, 1)
    # Where two blocks of a cluster split k, they must all run at once. Blocks of more rows read x less often.
    if rows >= 256 and not (p.planes == 4 and p.k_tiles <= 48 and rows <= 264):
        if not low:
            return tile(1, 1, 1, 2, 8, 2, 1, 1) if p.k_tiles >= 128 else tile(1, 1, 1, 1, 8, 2, 2, 1)
        return tile(1, 1, 2, 4, 4, 2, 1, 2 if rows <= 264 else 1)
    if rows <= 66 and (p.k_tiles >= 128 or p.planes >= 7):
        return tile(1, 1, 2 if p.planes <= 6 else 1, 1, 8, 3, 1, splits)
    if p.k_tiles >= 128 and rows <= 96 and 2 < p.planes <= 4:
        return tile(1, 1, 1, 1, 16, 2, 1, splits)
    return tile(1, 1, 2 if low else 1, 1, 8, 2, two, splits)


def _three_to_eight(p: Problem, two: int) -> tuple[int, int, int, int, int, int]:
    """K tiles a turn, warps along rows and k, stages, blocks an SM and in a cluster, for 3 to 8 tokens.

    H200, 2026-11-30: 15 shapes, 2, 4 and 8 bits, 4 and 8 tokens (`benchmarks/results/h200/stream_tiles.json`). A block
    of more rows reads x less often, one of less k has less of x to wait for. To k = 96, and 80 row tiles, as a step of
    Llama-3.1-8B and Qwen3-14B has them (2026-12-01, `chain_few_tokens.json`).
    """
    rows, k = p.row_tiles, p.k_tiles
    if p.sm < 90:  # no clusters
        turn_tiles = 2 if p.planes <= 4 else 1
        return (turn_tiles, 4, 4, 2, 1, 1) if rows >= 256 else (turn_tiles, 1, 8, 2, two, 1)
    if rows <= 22:
        return 1, 1, 8, 2, two, 4
    if p.planes > 4:
        if rows <= 48:
            return 2, 1, 4, 2, two, 4
        if rows <= 66:
            return (1, 1, 16, 2, 1, 2) if k >= 128 else (1, 1, 8, 2, 1, 2)
        if rows <= 84 and (p.M <= 4 or k <= 96):
            return 1, 1, 4, 2, two, 4
        if rows <= 96 or (rows <= 132 and k <= 96):
            return 1, 2, 4, 2, two, 4
        if rows <= 132:
            return 1, 1, 8, 2, two, 2
        if rows <= 264:
            return (1, 4, 2, 2, two, 4) if rows <= 192 else (1, 4, 4, 2, 1, 2) if p.M <= 4 else (1, 2, 8, 3, 1, 1)
        if rows <= 400:
            return 1, 1, 8, 2, two, 1
        return (1, 4, 4, 2, 1, 1) if rows <= 528 else (1, 4, 2, 2, two, 4) if k <= 96 else (2, 1, 4, 2, two, 1)
    if rows <= 48:
        return 2, 2, 4, 2, 2, 4
    if rows <= 66:
        return 2, 1, 8, 2, 1, 2
    if rows <= 84 and k <= 96:
        return 1, 1, 4, 3, 2, 4
    if rows <= 132 and k <= 96:
        return 2, 4, 2, 3 if p.planes <= 3 else 2, 2, 4
    if rows <= 96:
        return (2, 2, 4, 2, 2, 4) if k < 256 else (2, 1, 4, 2, 2, 4) if rows <= 84 and p.M <= 4 else (2, 4, 4, 2, 1, 4)
    if rows <= 132:
        return (2, 2, 4, 2, 1, 2) if p.planes == 2 or p.M > 4 else (1, 2, 8, 2, 1, 2)
    if rows <= 192:
        return 2, 4, 2, 2, 2, 4
    if rows <= 264:
        return (2, 4, 4, 2, 1, 2) if p.planes <= 3 else (2, 4, 2, 2, 1, 2)
    if rows > 528 and k <= 96:
        return 2, 4, 2, 3 if p.planes <= 3 else 2, 2, 4
    return (2, 4, 4, 2, 1, 1) if rows <= 528 else (2, 1, 8, 2, 2, 1)


def with_chunk(problem: Problem, config: Config) -> Config:
    """The tile with its chunk of x: all of a block's k; in few.cu at most 16 values of x a thread."""
    turn = config.turn_tiles * config.warps_k
    chunk = max(-(-config.split_tiles(problem) // turn), 1) * turn
    if config.few:
        chunk = min(chunk, max(config.threads // (4 * problem.M) // turn, 1) * turn)
    return replace(config, chunk_tiles=chunk)


def fits(config: Config, problem: Problem) -> bool:
    """Whether as many blocks as a tile is compiled for fit an SM's shared memory (1 KiB of each is the system's)."""
    capacity = (problem.shared_limit + 1) * 1024
    return supports(config, problem) and config.blocks * (shared_bytes(problem, config) + 1024) <= capacity


def _smaller(config: Config, problem: Problem) -> Config:
    """The next best tile after one that does not fit."""
    if config.splits > 1 and (config.splits - 1) * config.split_tiles(problem) >= problem.k_tiles:
        return with_chunk(problem, replace(config, splits=config.splits - 1))
    turn = config.turn_tiles * config.warps_k
    least = max(config.stages, 2) * turn  # where x does not fit whole, small pieces were faster than large ones
    if config.chunk_tiles > least:
        return replace(config, chunk_tiles=least)
    if config.stages > 2:
        return with_chunk(problem, replace(config, stages=config.stages - 1))
    if config.blocks > 1:
        return with_chunk(problem, replace(config, blocks=config.blocks // 2))
    if config.turn_tiles > 1:
        return with_chunk(problem, replace(config, turn_tiles=1))
    if config.row_tiles > 1:
        return with_chunk(problem, replace(config, row_tiles=1))
    if config.stages > 1:
        return with_chunk(problem, replace(config, stages=1))
    assert config.warps_k > 1, (config, problem)
    return with_chunk(problem, replace(config, warps_k=config.warps_k // 2))
