"""Global memory, and what is known of shared memory besides its bytes: mbarriers, and who used it last."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Fault(AssertionError):
    """What a kernel must not do."""


class Memory:
    """Global memory: the memory of arrays, by its real addresses, and nothing between them."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._buffers: list[Array] = []

    def add(self, array: Array) -> None:
        """Lets a kernel read and write an array."""
        start = array.ctypes.data
        i = int(np.searchsorted(self._starts, start))
        if i < len(self._starts) and self._starts[i] == start:  # its memory has been another's
            self._starts.pop(i), self._buffers.pop(i)
        self._starts.insert(i, start)
        self._buffers.insert(i, array.reshape(-1).view(np.uint8))

    def load(self, address: Array, size: int, align: int) -> Array:
        """(addresses, size) bytes."""
        out = np.empty((len(address), size), np.uint8)
        for buffer, inside, place in self._places(address, size, align):
            out[inside] = buffer[place]
        return out

    def store(self, address: Array, data: Array, align: int) -> None:
        """Puts (addresses, size) bytes there."""
        for buffer, inside, place in self._places(address, data.shape[1], align):
            buffer[place] = data[inside]

    def _places(self, address: Array, size: int, align: int) -> list[tuple[Array, Array, Array]]:
        which = np.searchsorted(np.array(self._starts), address, "right") - 1
        places = []
        for i in np.unique(which):
            inside = which == i
            offset = address[inside] - self._starts[i]
            if i < 0 or (offset + size > len(self._buffers[i])).any() or (address[inside] % align).any():
                raise Fault(f"{size} bytes of global memory, outside or not aligned: buffer {i}, offset {offset.max()}")
            places.append((self._buffers[i], inside, offset[:, None] + np.arange(size)))
        return places


class Mbarrier:
    """Arrivals and bytes that are still to come, and phases that are over."""

    def __init__(self, arrivals: int) -> None:
        self._all = self._arrivals = arrivals
        self._bytes = self.phase = 0

    def count(self, arrivals: int, size: int) -> bool:
        """Arrivals, and bytes that are to come; whether that was all of a phase."""
        self._arrivals -= arrivals
        self._bytes += size
        if self._arrivals < 0:
            raise Fault("more threads arrive at an mbarrier than it is for")
        if self._arrivals or self._bytes:
            return False
        self._arrivals = self._all
        self.phase += 1
        return True


class Races:
    """Who used each 16 bits (a word) of shared memory last, and whether a barrier has come since."""

    def __init__(self, size: int, block: Array) -> None:
        words = -(-size // 2)
        self._block, self._epoch = block, np.zeros(block[-1] + 1, np.int64)
        self.of_warp = np.zeros(len(block) // 32, np.int64)  # barriers of each warp
        # Of the last write, of a read, and of one by another warp: thread, epochs of its block and warp.
        self._write, self._read, self._other = (np.full((words, 3), -1) for _ in range(3))

    def barrier(self, block: int) -> None:
        """All threads of a block have met."""
        self._epoch[block] += 1

    def use(self, threads: Array, words: Array, write: bool) -> None:
        """Words (threads, n) are read or written."""
        who, word = np.repeat(threads, words.shape[1]), words.reshape(-1)
        now = np.stack([who, self._epoch[self._block[who]], self.of_warp[who // 32]], -1)
        self._check(now, self._write[word], "written")
        if not write:
            first = self._read[word]
            joins = (first[:, 1] == now[:, 1]) & (first[:, 0] // 32 != who // 32)
            self._other[word[joins]] = now[joins]
            self._read[word[~joins]] = now[~joins]
            return
        self._check(now, self._read[word], "read")
        self._check(now, self._other[word], "read")
        self._write[word] = now
        self._check(now, self._write[word], "written")  # by two threads at once

    def _check(self, now: Array, before: Array, what: str) -> None:
        same_warp = before[:, 0] // 32 == now[:, 0] // 32
        unordered = (before[:, 1] == now[:, 1]) & ~(same_warp & (before[:, 2] != now[:, 2]))
        race = (before[:, 0] >= 0) & (before[:, 0] != now[:, 0]) & unordered
        if race.any():
            one = np.flatnonzero(race)[0]
            raise Fault(
                f"thread {now[one, 0]} uses a word that thread {before[one, 0]} has {what}, with no barrier between"
            )
