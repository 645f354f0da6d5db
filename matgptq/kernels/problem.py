"""What a call asks of the kernels: sizes and formats."""

from dataclasses import dataclass, replace

TILE = 64  # rows and k of a weight tile, packing.TILE
MEAN_ROWS = 16  # norm.cuh, kMeanRows: rows of a sum whose squares are added up
_MOST_SHARED = 2  # tokens of which calls share a norm: with more norm.cu is as fast, or faster
# KiB of shared memory that a block may have. An SM has one more, of which the system takes one a block.
_SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


@dataclass(frozen=True)
class Problem:
    """One call: ``M`` tokens, ``N`` out_features, ``K`` in_features, served at ``bits``.

    ``dtype`` is "float16" or "bfloat16"; ``group_size`` -1 is one group a row; ``resident``: the weights are held as
    8-bit planes; ``zeros``: there is a zeros tensor (else 128); ``sm`` is 10 * major + minor; ``gated``: the weights
    are those of two layers of N rows, one after the other, and the outputs ``silu(first) * second``; ``summed`` and
    ``scaled``: RMSNorm of a sum follows, or came before, and the calls may share it (norm.cuh).
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
    gated: bool = False
    summed: bool = False
    scaled: bool = False

    @property
    def shares_norm(self) -> bool:
        """Whether the calls around RMSNorm of a sum do its work; else norm.cu does, after the first of them."""
        return self.M <= _MOST_SHARED and self.dtype == "bfloat16"

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
    def layer(self) -> "Problem":
        """The same weights as one layer, whose outputs are not gated yet."""
        return replace(self, N=2 * self.N, gated=False) if self.gated else self

    @property
    def shared_limit(self) -> int:
        """KiB of shared memory that a block may have; what is not known has the least."""
        return _SHARED_LIMIT.get(self.sm, 99)

    @property
    def groups(self) -> int:
        """Scales a row."""
        return 1 if self.group_size == -1 else self.K // self.group_size

    @property
    def level_offset(self) -> float:
        """What the rule adds to ``S << (8 - bits)`` to make a level."""
        return (2 ** (8 - self.bits) - 1) / 2 if self.rule == "prefix" else 0.0


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
    if p.gated and p.N % TILE:
        return False, f"out_features must be a multiple of {TILE} in a gated layer, got {p.N}"
    if p.summed and (p.gated or p.N % MEAN_ROWS):
        return False, f"out_features must be a multiple of {MEAN_ROWS}, and not gated, before a norm, got {p.N}"
    if p.group_size != -1 and (p.group_size < 16 or p.group_size % 16 or p.K % p.group_size):
        return False, f"group_size must be -1 or a multiple of 16 that divides in_features {p.K}, got {p.group_size}"
    return True, ""
