"""Loads, stores and copies, and the mbarriers that count what lands."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import Arithmetic, Step
from .memory import Array, Fault, Mbarrier, Memory, Races
from .program import TYPES, Kernel, split

_OF_BLOCK = 24  # bit of a shared address from which on is the block of its cluster, plus 1 (a GPU does not add that)


def in_block(address: Any, rank: Any) -> Any:
    """The same place in the shared memory of the cluster's block ``rank``."""
    return address % (1 << _OF_BLOCK) + (rank + 1 << _OF_BLOCK)


class Copies(Arithmetic):
    """Instructions that move memory. `Run` says what threads do that must wait."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        params: bytes,
        special: dict[str, Array],
        block: Array,
        shared: int,
        cluster: int,
        races: bool,
    ) -> None:
        super().__init__(kernel, special | dict.fromkeys(("shared", "memory"), in_block(0, block % cluster)))
        self._memory, self._params = memory, np.frombuffer(params, np.uint8)
        self._block, self._shared_size, self._cluster = block, shared, cluster
        self._shared = np.full((block[-1] + 1) * shared, 0xFF, np.uint8)  # all ones are NaN in every format
        self._races = Races(len(self._shared), block) if races else None
        self._copies: list[tuple[Array, Array, Array, Array]] = []  # threads, their groups, places, bytes
        self._group = np.zeros_like(block)  # that a thread's next copies belong to
        self._flights: list[Callable[[], None]] = []  # what lands when nothing else can be done
        self._mbarriers: dict[int, Mbarrier] = {}  # by place in shared memory
        self._releases = 0  # stores that others may wait for

    def _wake(self) -> None:
        """What threads wait for may have come."""
        raise NotImplementedError

    def _ld(self, parts: list[str], operands: list[str]) -> Step:
        space, dtype = parts[0], np.dtype(TYPES[parts[-1]])
        write, address = self._writes(operands[0]), self._address(operands[1])
        size = dtype.itemsize * len(split(operands[0].strip("{}")))

        def load(threads: Array) -> None:
            place = address(threads)
            if space == "param":
                data = self._params[place[:, None] + np.arange(size)]
            elif space == "shared":
                data = self._load_shared(threads, place, size)
            else:
                data = self._memory.load(place, size, size)
            write(threads, np.ascontiguousarray(data).view(dtype))

        return load

    def _st(self, parts: list[str], operands: list[str]) -> Step:
        space, address, read = parts[0], self._address(operands[0]), self._reads(operands[1], parts[-1])
        if space == "async":
            return self._send(address, read, self._address(operands[2]))

        def store(threads: Array) -> None:
            data = np.ascontiguousarray(read(threads)).view(np.uint8)
            if space == "shared":
                self._store_shared(threads, address(threads), data)
                return
            self._memory.store(address(threads), data, data.shape[1])
            if space == "release":
                self._releases += 1
                self._wake()

        return store

    def _send(self, address: Callable[..., Array], read: Callable[..., Array], barrier: Callable[..., Array]) -> Step:
        def send(threads: Array) -> None:
            data = np.ascontiguousarray(read(threads)).view(np.uint8)
            places = self._places(threads, address(threads), data.shape[1], True)
            barriers = self._places(threads, barrier(threads), 8, False)[:, 0]

            def land() -> None:
                self._shared[places] = data
                for place in barriers:
                    self._count(place, 0, -data.shape[1])

            self._flights.append(land)

        return send

    def _places(self, threads: Array, address: Array, size: int, write: bool, align: int = 0) -> Array:
        """Of bytes in the shared memory of the threads' blocks, or of others of their clusters."""
        rank = (address >> _OF_BLOCK) - 1
        address = address % (1 << _OF_BLOCK)
        outside = (rank < 0) | (rank >= self._cluster) | (address + size > self._shared_size)
        if outside.any() or (address % (align or size)).any():
            raise Fault(f"{size} bytes of shared memory, outside {self._shared_size} or not aligned: {address.max()}")
        block = self._block[threads] // self._cluster * self._cluster + rank
        places = (block * self._shared_size + address)[:, None] + np.arange(size)
        if self._races:
            self._races.use(threads, places[:, ::2] // 2, write)
        return places

    def _load_shared(self, threads: Array, address: Array, size: int) -> Array:
        return self._shared[self._places(threads, address, size, False)]

    def _store_shared(self, threads: Array, address: Array, data: Array) -> None:
        self._shared[self._places(threads, address, data.shape[1], True)] = data

    def _cp(self, parts: list[str], operands: list[str]) -> Step:
        if parts[1] == "bulk":
            return self._bulk(parts, operands)
        if parts[1] == "commit_group":

            def commit(threads: Array) -> None:
                self._group[threads] += 1

            return commit
        if parts[1] == "wait_group":
            return lambda threads: self._land(threads, int(operands[0]))
        to, of, size = self._address(operands[0]), self._address(operands[1]), int(operands[2])
        taken = self._read(operands[3] if len(operands) > 3 else operands[2], "u32")

        def copy(threads: Array) -> None:
            data = np.zeros((len(threads), size), np.uint8)
            real = taken(threads) > 0
            assert (taken(threads)[real] == size).all()
            data[real] = self._memory.load(of(threads)[real], size, size)
            place = to(threads)
            self._store_shared(threads, place, np.full_like(data, 0xFF))
            self._copies.append((threads, self._group[threads], place, data))

        return copy

    def _land(self, threads: Array, pending: int) -> None:
        """What the threads have copied, but for their last ``pending`` groups."""
        waits = np.zeros(len(self._block), bool)
        waits[threads] = True
        left = []
        for who, group, place, data in self._copies:
            lands = waits[who] & (group < self._group[who] - pending)
            if lands.any():
                self._store_shared(who[lands], place[lands], data[lands])
            if not lands.all():
                left.append((who[~lands], group[~lands], place[~lands], data[~lands]))
        self._copies = left

    def _bulk(self, parts: list[str], operands: list[str]) -> Step:
        to, barrier = self._address(operands[0]), self._address(operands[-1])
        if parts[2] == "tensor":
            map_, place = operands[1].strip("[]").split(",", 1)
            address, coordinates = self._address(map_), self._reads(place.strip(), "s32")
            blocks = None
            if parts[-1] == "multicast::cluster":
                barrier, blocks = self._address(operands[2]), self._read(operands[3], "u16")

            def copy_box(threads: Array) -> None:
                for i, thread in enumerate(threads):
                    data = self._box(int(address(threads)[i]), *map(int, coordinates(threads)[i]))
                    place, counter = int(to(threads)[i]), int(barrier(threads)[i])
                    if blocks is None:
                        self._fly(thread, place, data, counter)
                        continue
                    for rank in range(self._cluster):
                        if int(blocks(threads)[i]) >> rank & 1:
                            self._fly(thread, in_block(place, rank), data, in_block(counter, rank))

            return copy_box
        of, size = self._address(operands[1]), self._read(operands[2], "u32")

        def copy(threads: Array) -> None:
            for i, thread in enumerate(threads):
                data = self._memory.load(of(threads)[i : i + 1], int(size(threads)[i]), 16)[0]
                self._fly(thread, int(to(threads)[i]), data, int(barrier(threads)[i]))

        return copy

    def _box(self, map_: int, k: int, token: int) -> Array:
        """x of 64 k and some tokens as TMA brings it: rows of 128 bytes, their 16-byte pieces swizzled, zeros beyond.

        A tensor map is here the address of x, K, M and the box's tokens, 8 bytes each.
        """
        x, K, M, tokens = (int(v) for v in self._params[map_ : map_ + 32].view(np.uint64))
        box = np.zeros((tokens, 8, 16), np.uint8)
        for row in range(max(min(tokens, M - token), 0)):
            size = max(min(64, K - k), 0) * 2
            if size:
                data = self._memory.load(np.array([x + ((token + row) * K + k) * 2]), size, 16)
                box[row].reshape(-1)[:size] = data[0]
            box[row] = box[row][np.arange(8) ^ row % 8]
        return box.reshape(-1)

    def _fly(self, thread: int, address: int, data: Array, barrier: int) -> None:
        """Copies to shared memory some time from now, and tells a barrier then."""
        who = np.array([thread])
        places = self._places(who, np.array([address]), len(data), True, align=16)[0]
        counter = self._places(who, np.array([barrier]), 8, False)[0, 0]
        self._shared[places] = 0xFF

        def land() -> None:
            self._shared[places] = data
            self._count(counter, 0, -len(data))

        self._flights.append(land)

    def _mbarrier(self, parts: list[str], operands: list[str]) -> Step:
        if parts[0] == "init":
            address, count = self._address(operands[0]), self._read(operands[1], "u32")

            def init(threads: Array) -> None:
                for place, n in zip(
                    self._places(threads, address(threads), 8, False)[:, 0], count(threads), strict=True
                ):
                    self._mbarriers[place] = Mbarrier(int(n))

            return init
        assert parts[0] == "arrive"
        assert operands[0] == "_"
        address = self._address(operands[1])
        expected = self._read(operands[2], "u32") if parts[1] == "expect_tx" else None

        def arrive(threads: Array) -> None:
            places = self._places(threads, address(threads), 8, False)[:, 0]
            expects = expected(threads) if expected else np.zeros(len(threads), int)
            for place, size in zip(places, expects, strict=True):
                self._count(place, 1, int(size))

        return arrive

    def _count(self, place: int, arrivals: int, size: int) -> None:
        if self._mbarriers[place].count(arrivals, size):
            self._wake()

    def _mapa(self, parts: list[str], operands: list[str]) -> Step:
        return self._apply(operands, ["u32", "u32"], in_block)
