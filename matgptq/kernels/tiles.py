"""Which tile a problem is computed with: data in, data out, no GPU needed.

``choose(problem)`` is pure and total over what ``can_implement`` accepts. Thresholds name their GPU and date.
"""

from dataclasses import dataclass, replace

TILE = 64  # rows and k of a weight tile, packing.TILE
MAX_SPLITS = 8  # portable cluster size
# KiB of shared memory that a block may have.
_SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


@dataclass(frozen=True)
class Problem:
    """One call: ``M`` tokens, ``N`` out_features, ``K`` in_features, served at ``bits``.

    ``dtype`` is "float16" or "bfloat16"; ``group_size`` -1 is one group a row; ``resident``: the weights are held as
    8-bit planes; ``zeros``: there is a zeros tensor (else 128); ``sm`` is 10 * major + minor.
    """

    M: int
    N: int
    K: int
    bits: int
    dtype: str = "float16"
    group_size: int = 128
    resident: bool = False
    rule: str = "round"
    zeros: bool = False
    sm: int = 90

    @property
    def rounds(self) -> bool:
        """Whether the kernel rounds slices itself, by one more plane."""
        return self.resident and self.rule == "round" and self.bits < 8

    @property
    def shift(self) -> int:
        """What is added to decoded levels: 0 nothing, 1 a constant, 2 a constant, and zeros taken off."""
        return 2 if self.zeros else 1 if self.level_offset else 0

    @property
    def planes(self) -> int:
        """Planes read."""
        return self.bits + self.rounds

    @property
    def stored(self) -> int:
        """Planes in memory."""
        return 8 if self.resident else self.bits

    @property
    def k_tiles(self) -> int:
        """Weight tiles along in_features."""
        return -(-self.K // TILE)

    @property
    def row_tiles(self) -> int:
        """Weight tiles along out_features."""
        return -(-self.N // TILE)

    @property
    def groups(self) -> int:
        """Scales a row."""
        return 1 if self.group_size == -1 else self.K // self.group_size

    @property
    def level_offset(self) -> float:
        """What the rule adds to ``S << (8 - bits)`` to make a level."""
        return (2 ** (8 - self.bits) - 1) / 2 if self.rule == "prefix" else 0.0


@dataclass(frozen=True)
class Config:
    """Tile of a launch; the macros of linear.cu, then what is decided at launch."""

    token_tiles: int
    row_tiles: int
    turn_tiles: int
    warps_n: int
    warps_k: int
    stages: int
    blocks: int
    splits: int
    chunk_tiles: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_n * self.warps_k

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return TILE * self.warps_n * self.row_tiles

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return 8 * self.token_tiles

    def split_tiles(self, problem: Problem) -> int:
        """k tiles of one of ``splits`` blocks, in whole turns."""
        turns = -(-problem.k_tiles // self.turn_tiles)
        return -(-turns // self.splits) * self.turn_tiles


def can_implement(problem: Problem) -> tuple[bool, str]:
    """Whether the kernels serve a problem, and if not, why."""
    p = problem
    if p.sm < 80:
        return False, f"the GPU must be of compute capability 8.0 or newer, got {p.sm // 10}.{p.sm % 10}"
    if p.dtype not in ("float16", "bfloat16"):
        return False, f"dtype must be float16 or bfloat16, got {p.dtype}"
    if not 2 <= p.bits <= 8:
        return False, f"bits must be 2..8, got {p.bits}"
    if p.rule not in ("round", "prefix"):
        return False, f"rule must be round or prefix, got {p.rule!r}"
    if p.K < 16 or p.K % 16:
        return False, f"in_features must be a positive multiple of 16, got {p.K}"
    if p.N < 1:
        return False, f"out_features must be positive, got {p.N}"
    if p.group_size != -1 and (p.group_size < 16 or p.group_size % 16 or p.K % p.group_size):
        return False, f"group_size must be -1 or a multiple of 16 that divides in_features {p.K}, got {p.group_size}"
    return True, ""


def defines(problem: Problem, config: Config) -> dict[str, str]:
    """The macros that linear.cu is compiled with."""
    return {
        "FORMAT": "Half" if problem.dtype == "float16" else "BFloat",
        "BITS": str(problem.bits),
        "ROUND": str(int(problem.rounds)),
        "SHIFT": str(problem.shift),
        "GROUP_SIZE": str(max(problem.group_size, 0)),
        "TOKEN_TILES": str(config.token_tiles),
        "ROW_TILES": str(config.row_tiles),
        "K_TILES": str(config.turn_tiles),
        "WARPS_N": str(config.warps_n),
        "WARPS_K": str(config.warps_k),
        "STAGES": str(config.stages),
        "BLOCKS": str(config.blocks),
    }


def inbox_offset(problem: Problem, config: Config) -> int:
    """Shared memory before the inbox: the ring and x, or the partial sums that follow in the same place."""
    turn = TILE * config.turn_tiles
    part = next(k for k in (turn, 64, 32, 16) if max(problem.group_size, 0) % k == 0)
    slabs = config.turn_tiles * problem.planes + turn // part * (3 if problem.zeros else 1)
    ring = config.warps_n * config.warps_k * config.stages * config.row_tiles * slabs * 512
    chunks = 2 if config.split_tiles(problem) > config.chunk_tiles else 1
    x = chunks * min(problem.M, config.tokens) * config.chunk_tiles * TILE * 2
    partial = config.warps_k * config.tokens * (config.rows + 4) * 4
    return max(ring + x, partial)


def shared_bytes(problem: Problem, config: Config) -> int:
    """Dynamic shared memory of a block; its inbox takes partial sums of its share from each block of the cluster."""
    share = -(-min(problem.M, config.tokens) * config.rows // config.splits)
    return inbox_offset(problem, config) + (4 * config.splits * share if config.splits > 1 else 0)


def grid(problem: Problem, config: Config) -> tuple[int, int, int]:
    """Blocks: k splits (one cluster), token tiles, row blocks."""
    return config.splits, -(-problem.M // config.tokens), -(-problem.N // config.rows)


def supports(config: Config, problem: Problem) -> bool:
    """Whether a tile fits the problem and its GPU."""
    limit = _SHARED_LIMIT.get(problem.sm, 99) * 1024
    split_tiles = config.split_tiles(problem)
    turn_of_all = config.warps_k * config.turn_tiles
    return (
        shared_bytes(problem, config) <= limit
        and config.chunk_tiles % turn_of_all == 0
        and (config.chunk_tiles >= split_tiles or config.chunk_tiles >= config.stages * turn_of_all)
        and 1 <= config.splits <= (MAX_SPLITS if problem.sm >= 90 else 1)
        and (config.splits - 1) * split_tiles < problem.k_tiles  # no block without work
        and config.threads * config.blocks <= (2048 if problem.sm in (80, 87, 90, 100, 103) else 1536)
    )


def choose(problem: Problem) -> Config:
    """The tile for a problem; raises ValueError for one that ``can_implement`` refuses."""
    able, reason = can_implement(problem)
    if not able:
        raise ValueError(reason)
    config = _preferred(problem)
    if problem.sm < 90:
        config = _whole(problem, replace(config, splits=1))
    while not _fits(config, problem):
        config = _smaller(config, problem)
    return config


def _preferred(p: Problem) -> Config:
    """Measured on an H200, 2026-11-22: fp16, group_size 128, widths 2, 3, 4, 6, 8, M 1 to 64, N x K 2048^2 to 16384^2,
    6144 x 4096, 28672 x 4096, 4096 x 14336."""
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
        return _whole(p, Config(token_tiles, row_tiles, turn_tiles, warps_n, warps_k, stages, blocks, splits, 0))

    # Several scales a tile take registers, so there are fewer warps or tokens.
    if p.group_size > 0 and p.group_size % 32:
        return tile(1, 1, 1, 1, 8, 2, 1, splits)
    if p.group_size > 0 and p.group_size % 64 and (p.M > 8 or (p.dtype == "bfloat16" and not low)):
        return tile(1 if p.M <= 8 else 2, 1, 1, 1, 8, 2, 1, splits)
    if p.M > 16:
        warps_n = 1 if rows <= 96 else 2 if rows < 256 else 4
        blocks = -(-rows // warps_n) * -(-p.M // 32)
        splits = 2 if 2 * blocks <= 132 else 1
        return tile(4, 1, 1, warps_n, 8 // warps_n, 2 if warps_n == 1 else 3, 1, splits)
    if p.M > 8:
        if rows <= 64:
            if p.planes == 2 and not p.zeros:  # registers for two blocks
                return tile(2, 1, 1, 1, 8, 2, 2, splits)
            return tile(2, 1, 1, 1, 8 if p.k_tiles < 128 else 12, 2, 1, splits)
        warps_n = 1 if rows < 384 else 2
        return tile(2, 2, 2 if p.planes == 2 else 1, warps_n, 8 // warps_n, 2, 1, 2 if rows <= 128 else 1)
    if low and p.planes > 2 and rows < 256 and p.k_tiles >= 128:
        return tile(1, 1, 1, 1, 16, 2, 1, splits)
    if low and rows >= 256 and p.M > 4:
        return tile(1, 2, 2, 2, 4, 2, 1, 2 if p.k_tiles >= 256 else 1)
    if low and rows >= 256:
        return tile(1, 1, 2 if p.planes < 4 else 1, 2, 8, 2, 1, 1) if p.k_tiles >= 256 else tile(1, 1, 2, 2, 4, 2, 2, 1)
    if not low and rows >= 256 and p.k_tiles >= 128:
        return tile(1, 1, 1, 2, 8, 2, 1, 1)
    if not low and rows <= 128 and p.M > 2 and p.k_tiles >= 128:
        splits = 2
    registers_for_two = low or p.dtype == "float16" or not p.rounds
    return tile(1, 1, 2 if low else 1, 1, 8, 2, 2 if registers_for_two else 1, splits)


def _whole(problem: Problem, config: Config) -> Config:
    """The tile with all x of a block's k in one chunk."""
    turns = -(-config.split_tiles(problem) // (config.turn_tiles * config.warps_k))
    return replace(config, chunk_tiles=max(turns, 1) * config.turn_tiles * config.warps_k)


def _fits(config: Config, problem: Problem) -> bool:
    """Whether as many blocks as a tile is compiled for fit an SM's shared memory (1 KiB of each is the system's)."""
    capacity = (_SHARED_LIMIT.get(problem.sm, 99) + 1) * 1024
    return supports(config, problem) and config.blocks * (shared_bytes(problem, config) + 1024) <= capacity


def _smaller(config: Config, problem: Problem) -> Config:
    """The next best tile after one that does not fit."""
    if config.splits > 1 and (config.splits - 1) * config.split_tiles(problem) >= problem.k_tiles:
        return _whole(problem, replace(config, splits=config.splits - 1))
    turn = config.turn_tiles * config.warps_k
    least = max(config.stages, 2) * turn  # where x does not fit whole, small pieces were faster than large ones
    if config.chunk_tiles > least:
        return replace(config, chunk_tiles=least)
    if config.stages > 2:
        return _whole(problem, replace(config, stages=config.stages - 1))
    if config.blocks > 1:
        return _whole(problem, replace(config, blocks=config.blocks // 2))
    if config.turn_tiles > 1:
        return _whole(problem, replace(config, turn_tiles=1))
    if config.row_tiles > 1:
        return _whole(problem, replace(config, row_tiles=1))
    if config.stages > 1:
        return _whole(problem, replace(config, stages=1))
    assert config.warps_k > 1, (config, problem)
    return _whole(problem, replace(config, warps_k=config.warps_k // 2))
