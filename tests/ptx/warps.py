"""Instructions of a warp: their threads come in whole ones."""

import re
from collections.abc import Callable

import numpy as np

from .arithmetic import Step, from_16, halves, pair
from .copies import Copies
from .memory import Array


class Warps(Copies):
    """Instructions that a warp executes together."""

    def _elect(self, parts: list[str], operands: list[str]) -> Step:
        write = self._write(operands[0].split("|")[1])
        return lambda threads: write(threads, threads % 32 == 0)

    def _bar(self, parts: list[str], operands: list[str]) -> Step:
        assert parts == ["warp", "sync"]

        def synchronise(threads: Array) -> None:
            if self._races:
                self._races.of_warp[threads // 32] += 1

        return synchronise

    def _ldmatrix(self, parts: list[str], operands: list[str]) -> Step:
        assert parts == ["sync", "aligned", "m8n8", "x4", "shared", "b16"]
        write, address = self._writes(operands[0]), self._address(operands[1])

        def load(threads: Array) -> None:
            rows = self._load_shared(threads, address(threads), 16)
            words = rows.view(np.uint32).reshape(-1, 4, 8, 4)  # warp, matrix, row, word: lane 4 row + word
            write(threads, np.ascontiguousarray(words.transpose(0, 2, 3, 1)).reshape(-1, 4))

        return load

    def _movmatrix(self, parts: list[str], operands: list[str]) -> Step:
        def transpose(a: Array) -> Array:
            rows = np.ascontiguousarray(halves(a)).reshape(-1, 8, 8)  # warp, row, column
            return pair(rows.transpose(0, 2, 1).reshape(-1, 2))

        return self._apply(operands, ["u32"], transpose)

    def _stmatrix(self, parts: list[str], operands: list[str]) -> Step:
        assert parts == ["sync", "aligned", "m8n8", "x4", "trans", "shared", "b16"]
        address, read = self._address(operands[0]), self._reads(operands[1], "u32")

        def store(threads: Array) -> None:
            words = np.ascontiguousarray(read(threads)).reshape(-1, 32, 4)  # warp, lane, matrix
            columns = np.ascontiguousarray(halves(words.transpose(0, 2, 1))).reshape(-1, 4, 8, 8).transpose(0, 1, 3, 2)
            self._store_shared(threads, address(threads), np.ascontiguousarray(columns).reshape(-1, 8).view(np.uint8))

        return store

    def _wgmma(self, parts: list[str], operands: list[str]) -> Step:
        """D = A B or D += A B, of m64nNk16: A in registers, B in shared memory, N rows of 128 bytes, swizzled."""
        size = int(re.fullmatch(r"m64n(\d+)k16", parts[3])[1])  # type: ignore[index]
        write, read_d, read_a = (
            self._writes(operands[0]),
            self._reads(operands[0], "f32"),
            self._reads(operands[1], "u32"),
        )
        descriptor, add = self._read(operands[2], "u64"), self._read(operands[3], "pred")

        def multiply(threads: Array) -> None:
            a = operand_a(np.ascontiguousarray(read_a(threads)), parts[5])
            what = descriptor(threads).reshape(-1, 32)[:, 0].astype(np.int64)  # of each warp
            assert ((what >> 62) == 1).all()
            assert ((what >> 32 & 0x3FFF) == 64).all()
            place = (what & 0x3FFF)[:, None, None] * 16 + np.arange(size)[:, None] * 128 + np.arange(0, 32, 2)
            place ^= (place >> 7 & 7) << 4
            warps = threads[::32]
            of_block = self._block[warps] * self._shared_size
            raw = self._shared.view(np.uint16)[(of_block[:, None, None] + place) // 2]
            d = a @ from_16(raw, parts[6]).transpose(0, 2, 1)  # warp, row, column
            d = d.reshape(-1, 2, 8, size // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5).reshape(-1, size // 2)
            before = np.where(add(threads)[:, None], read_d(threads), np.float32(0))
            write(threads, (d + before).astype(np.float32))

        return multiply

    def _mma(self, parts: list[str], operands: list[str]) -> Step:
        """D = A B + C, of m16n8: lane 4g + t has rows g and g + 8, columns 2t and 2t + 1."""
        write, read_c = self._writes(operands[0]), self._reads(operands[3], "f32" if parts[5] == "f32" else "s32")
        read_a, read_b = self._reads(operands[1], "u32"), self._reads(operands[2], "u32")

        def multiply(threads: Array) -> None:
            a = operand_a(np.ascontiguousarray(read_a(threads)), parts[6])
            b = values_of(np.ascontiguousarray(read_b(threads)).reshape(-1, 8, 4, 2), parts[7])
            b = b.transpose(0, 1, 3, 2, 4).reshape(len(a), 8, -1)
            d = a @ b.transpose(0, 2, 1)  # warp, row, column
            d = d.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
            c = read_c(threads)
            write(threads, (d + c).astype(c.dtype))

        return multiply

    def _redux(self, parts: list[str], operands: list[str]) -> Step:
        assert parts[1] == "max"
        return self._apply(operands[:2], [parts[-1]], lambda a: np.repeat(a.reshape(-1, 32).max(1), 32))

    def _lanes(self, operands: list[str]) -> Callable[[Array], int]:
        """How many neighbouring lanes exchange values, by their mask: four or all."""
        read = self._read(operands[-1], "u32")

        def lanes_of(threads: Array) -> int:
            lanes = 32 if (read(threads) == 0xFFFFFFFF).all() else 4
            assert (read(threads) == (2**lanes - 1) << threads % 32 // lanes * lanes).all()
            return lanes

        return lanes_of

    def _shfl(self, parts: list[str], operands: list[str]) -> Step:
        assert parts[1] in ("bfly", "idx")
        lanes_of = self._lanes(operands)
        write = self._write(operands[0].split("|")[0])
        read, which = self._read(operands[1], parts[-1]), self._read(operands[2], "u32")

        def exchange(threads: Array) -> None:
            lanes = lanes_of(threads)
            of = np.broadcast_to(which(threads), len(threads)).reshape(-1, lanes).astype(np.int64)
            of = np.arange(lanes) ^ of if parts[1] == "bfly" else of
            write(threads, np.take_along_axis(read(threads).reshape(-1, lanes), of, 1).reshape(-1))

        return exchange


def values_of(words: Array, kind: str) -> Array:
    """(..., values of a register)"""
    if kind in ("u8", "s8"):
        return words[..., None].view(np.uint8 if kind == "u8" else np.int8).astype(np.float64)
    return from_16(words[..., None].view(np.uint16), kind)


def operand_a(words: Array, kind: str) -> Array:
    """(warps, 16, k) of the registers of A, (threads, 4)."""
    a = values_of(words.reshape(-1, 8, 4, 2, 2), kind)  # warp, g, t, half of k, half of rows
    return a.transpose(0, 4, 1, 3, 2, 5).reshape(len(a), 16, -1)
