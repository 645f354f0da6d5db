"""Threads' registers, and the instructions that compute with them."""

from collections.abc import Callable

import numpy as np

from .memory import Array
from .program import TYPES, UNSIGNED, Kernel, split

Step = Callable[[Array], None]
ELEMENTWISE = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "neg": np.negative,
    "rem": np.fmod,
    "ex2": np.exp2,
    "rsqrt": lambda v: 1 / np.sqrt(v),
    "not": np.invert,
}


def from_16(raw: Array, kind: str) -> Array:
    """float64 of the bits of fp16 ("f16") or bfloat16 ("bf16")."""
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_16(values: Array, kind: str) -> Array:
    """The other way, to nearest even."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return np.where(np.isnan(values), 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def halves(pairs: Array) -> Array:
    return np.stack([pairs.astype(np.uint16), (pairs >> 16).astype(np.uint16)], -1)


def pair(halves: Array) -> Array:
    return halves[..., 0].astype(np.uint32) | (halves[..., 1].astype(np.uint32) << 16)


class Arithmetic:
    """Instructions that each thread executes alone, on its registers. A method makes a step of an instruction."""

    def __init__(self, kernel: Kernel, special: dict[str, Array]) -> None:
        self._kernel, self._special = kernel, special
        self._registers: dict[str, Array] = {}

    def _register(self, name: str) -> Array:
        if name not in self._registers:
            self._registers[name] = np.zeros(len(self._block), self._kernel.type_of(name))
        return self._registers[name]

    def _read(self, operand: str, kind: str) -> Callable[[Array], Array]:
        """What an operand is in threads, as ``kind``; of a wider register the lower bits."""
        dtype = np.dtype(TYPES[kind])
        if self._kernel.type_of(operand):
            register = self._register(operand)
            if dtype == np.bool_:
                return lambda threads: register[threads]
            return lambda threads: register[threads].astype(UNSIGNED[dtype.itemsize], copy=False).view(dtype)
        if operand in self._special:
            special = self._special[operand].astype(dtype)
            return lambda threads: special[threads]
        if "_param_" in operand:  # the start of their space
            value = np.zeros(1, dtype)
        elif operand.startswith("0f"):
            value = np.array([int(operand[2:], 16)], np.uint32).view(dtype)
        else:
            number = int(operand.rstrip("U"), 0) & ((1 << 64) - 1)
            value = np.array([number], np.uint64).astype(UNSIGNED[dtype.itemsize]).view(dtype)
        return lambda threads: np.broadcast_to(value, len(threads))

    def _write(self, operand: str) -> Callable[[Array, Array], None]:
        if operand == "_":
            return lambda threads, values: None
        register = self._register(operand)

        def write(threads: Array, values: Array) -> None:
            register[threads] = values if values.dtype == np.bool_ else values.view(UNSIGNED[values.itemsize])

        return write

    def _reads(self, operand: str, kind: str) -> Callable[[Array], Array]:
        """(threads, values) of a vector, or of one operand."""
        parts = [self._read(part, kind) for part in split(operand.strip("{}"))]
        return lambda threads: np.stack([part(threads) for part in parts], -1)

    def _writes(self, operand: str) -> Callable[[Array, Array], None]:
        parts = [self._write(part) for part in split(operand.strip("{}"))]

        def write(threads: Array, values: Array) -> None:
            for i, part in enumerate(parts):
                part(threads, np.ascontiguousarray(values[:, i]))

        return write

    def _address(self, operand: str) -> Callable[[Array], Array]:
        base, _, offset = operand.strip("[]").partition("+")
        start = self._read(base, "u32" if self._kernel.type_of(base) == np.uint32 else "u64")
        return lambda threads: start(threads).astype(np.int64) + int(offset or 0)

    def _apply(self, operands: list[str], kinds: list[str], function: Callable[..., Array]) -> Step:
        """operands[0] = function(the others)."""
        write = self._write(operands[0])
        reads = [self._read(operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)]
        return lambda threads: write(threads, function(*(read(threads) for read in reads)))

    def _step(self, name: str, parts: list[str], operands: list[str]) -> Step:
        """Of the instruction ``name``, by the method of that name where there is one."""
        if name in ELEMENTWISE:
            return self._elementwise(parts, operands, ELEMENTWISE[name])
        step: Step = getattr(self, f"_{name}")(parts, operands)
        return step

    def _elementwise(self, parts: list[str], operands: list[str], function: Callable[..., Array]) -> Step:
        """The same of operands of one type, which may be a pair."""
        kind = parts[-1]
        of_one = function
        if kind in ("f16x2", "bf16x2"):
            half = kind.removesuffix("x2")

            def of_one(*pairs: Array) -> Array:
                return pair(to_16(function(*(from_16(halves(pair), half) for pair in pairs)), half))

        elif kind == "u16x2":

            def of_one(*pairs: Array) -> Array:
                return pair(function(*map(halves, pairs)))

        return self._apply(operands, [kind] * (len(operands) - 1), of_one)

    def _fma(self, parts: list[str], operands: list[str]) -> Step:
        def fma(a: Array, b: Array, c: Array) -> Array:
            return (a.astype(np.float64) * b + c).astype(a.dtype)

        return self._elementwise(parts, operands, fma)

    def _mul(self, parts: list[str], operands: list[str]) -> Step:
        kind = parts[-1]
        if parts[0] not in ("wide", "hi"):
            return self._elementwise(parts, operands, np.multiply)
        wide = np.int64 if kind[0] == "s" else np.uint64

        def multiply(a: Array, b: Array) -> Array:
            product = a.astype(wide) * b.astype(wide)
            return product if parts[0] == "wide" else (product >> 32).astype(a.dtype)

        return self._apply(operands, [kind] * 2, multiply)

    def _mad(self, parts: list[str], operands: list[str]) -> Step:
        assert parts[0] == "lo"
        return self._elementwise(parts, operands, lambda a, b, c: a * b + c)

    def _div(self, parts: list[str], operands: list[str]) -> Step:
        def divide(a: Array, b: Array) -> Array:
            if a.dtype == np.float32:
                return a / b
            return (a.astype(np.float64) / b).astype(np.int64).astype(a.dtype)  # towards zero; exact for 32 bits

        return self._elementwise(parts, operands, divide)

    def _shl(self, parts: list[str], operands: list[str]) -> Step:
        def shift(a: Array, n: Array) -> Array:
            most = 8 * a.itemsize - 1
            return np.where(n <= most, a << np.minimum(n, most).astype(a.dtype), 0).astype(a.dtype)

        return self._apply(operands, [parts[-1], "u32"], shift)

    def _shr(self, parts: list[str], operands: list[str]) -> Step:
        def shift(a: Array, n: Array) -> Array:
            most = 8 * a.itemsize - 1
            shifted = a >> np.minimum(n, most).astype(a.dtype)
            return shifted if a.dtype.kind == "i" else np.where(n <= most, shifted, 0).astype(a.dtype)

        return self._apply(operands, [parts[-1], "u32"], shift)

    def _lop3(self, parts: list[str], operands: list[str]) -> Step:
        table = int(operands[-1], 0)

        def lop3(a: Array, b: Array, c: Array) -> Array:
            terms = [
                (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1
            ]
            return np.bitwise_or.reduce(terms)

        return self._elementwise(parts, operands[:-1], lop3)

    def _prmt(self, parts: list[str], operands: list[str]) -> Step:
        def permute(a: Array, b: Array, selector: Array) -> Array:
            data = np.stack([a, b], -1).view(np.uint8)
            nibble = (selector[:, None] >> np.array([0, 4, 8, 12], np.uint32)) & 15
            byte = np.take_along_axis(data, (nibble & 7).astype(np.int64), 1)
            byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint8)  # 8: its sign, repeated
            return byte.view(np.uint32)[:, 0]

        return self._apply(operands, ["u32"] * 3, permute)

    def _bfi(self, parts: list[str], operands: list[str]) -> Step:
        def insert(a: Array, b: Array, start: Array, length: Array) -> Array:
            ones = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
            mask = (ones << start.astype(np.uint64)).astype(np.uint32)
            return (b & ~mask) | ((a << start) & mask)

        return self._apply(operands, ["u32"] * 4, insert)

    def _setp(self, parts: list[str], operands: list[str]) -> Step:
        compare = {
            "eq": np.equal,
            "ne": np.not_equal,
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
        }[parts[0]]
        kinds = [parts[-1]] * 2
        if len(parts) == 2:
            return self._apply(operands, kinds, compare)
        join = {"and": np.logical_and, "or": np.logical_or}[parts[1]]
        return self._apply(operands, [*kinds, "pred"], lambda a, b, c: join(compare(a, b), c))

    def _selp(self, parts: list[str], operands: list[str]) -> Step:
        return self._apply(operands, [parts[-1]] * 2 + ["pred"], lambda a, b, p: np.where(p, a, b))

    def _cvt(self, parts: list[str], operands: list[str]) -> Step:
        to, of = parts[-2:]
        if to in ("f16x2", "bf16x2"):

            def pack(high: Array, low: Array) -> Array:
                return pair(to_16(np.stack([low, high], -1).astype(np.float64), to.removesuffix("x2")))

            return self._apply(operands, ["f32"] * 2, pack)
        if of in ("f16", "bf16"):
            return self._apply(operands, [of], lambda a: from_16(a, of).astype(TYPES[to]))
        if to in ("f16", "bf16"):
            return self._apply(operands, [of], lambda a: to_16(a.astype(np.float64), to))
        return self._apply(operands, [of], lambda a: a.astype(TYPES[to]))

    def _mov(self, parts: list[str], operands: list[str]) -> Step:
        to, of = operands
        if to.startswith("{"):
            write, read = self._writes(to), self._read(of, "u32")
            return lambda threads: write(threads, halves(read(threads)))
        if of.startswith("{"):
            write, read = self._write(to), self._reads(of, "u16")
            return lambda threads: write(threads, pair(read(threads)))
        return self._apply(operands, [parts[-1]], lambda a: a)

    def _cvta(self, parts: list[str], operands: list[str]) -> Step:
        return self._apply(operands, ["u64"], lambda a: a)
