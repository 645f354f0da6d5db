"""Threads on their way through a program."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from .arithmetic import Step
from .memory import Array, Fault, Memory
from .program import Kernel
from .warps import Warps

Jump = Callable[[int, Array], dict[int, Array] | None]
_OF_WARPS = ("mma.", "wgmma.mma_async", "ldmatrix", "stmatrix", "movmatrix", "shfl", "redux", "bar.warp.sync", "elect")
_NOTHING = ("fence", "griddepcontrol", "prefetch", "setmaxnreg")
_NOTHING += ("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group")


class Run(Warps):
    """A launch of ``grid`` blocks of ``threads`` threads; ``params`` are the bytes of the kernel's one argument.

    Threads at the lowest place of the program go first, so that those that branched apart meet again.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        params: bytes,
        cluster: int = 1,
        races: bool = False,
    ) -> None:
        blocks = grid[0] * grid[1] * grid[2]
        everyone = np.arange(blocks * threads)
        block = everyone // threads
        special = {"%tid.x": everyone % threads, "%laneid": everyone % 32}
        of_block = (block % grid[0], block // grid[0] % grid[1], block // grid[0] // grid[1])
        for axis, place, size in zip("xyz", of_block, grid, strict=True):
            special |= {f"%ctaid.{axis}": place, f"%nctaid.{axis}": np.full_like(everyone, size)}
        super().__init__(kernel, memory, params, special, block, shared, cluster, races)
        self._met, self._arrived = (np.zeros(blocks // cluster, int) for _ in range(2))  # at a cluster's barrier
        self._meeting = np.zeros_like(everyone)  # of the cluster's, that a thread has arrived at
        self._seen = np.full((len(everyone), 2), -1)  # releases when a thread last looked, and where
        self._alive = np.full(blocks, threads)
        self._ready: dict[int, Array] = {}  # place in the program -> threads there
        self._partial: dict[int, Array] = {}  # the same, waiting for the rest of their warp
        self._parked: dict[int, Array] = {}  # the same, waiting for an mbarrier, their cluster or global memory
        self._waiting: dict[tuple[int, int], list[tuple[int | None, Array]]] = defaultdict(list)  # by block and barrier
        code = [self._compile(*statement) for statement in kernel.code]
        with np.errstate(all="ignore"):
            self._run(code, everyone)

    def _run(self, code: list[Jump], everyone: Array) -> None:
        self._go(0, everyone)
        while self._ready or self._land_flights():
            place = min(self._ready)
            threads = self._ready.pop(place)
            meet = min(self._ready, default=len(code))
            while True:
                after = code[place](place, threads)
                if after is not None:
                    for there, who in after.items():
                        self._go(there, who)
                    break
                place += 1
                if place == meet or place in self._ready:
                    self._go(place, threads)
                    break
        if self._partial or self._parked or any(self._waiting.values()):
            raise Fault("deadlock: threads wait at a barrier, or for the rest of their warp")

    def _go(self, place: int, threads: Array) -> None:
        if place in self._ready:
            threads = np.sort(np.concatenate([self._ready[place], threads]))
        if len(threads):
            self._ready[place] = threads

    def _land_flights(self) -> bool:
        flights, self._flights = self._flights, []
        for land in flights:
            land()
        return bool(self._ready)

    def _park(self, place: int, threads: Array) -> None:
        waiting = self._parked.get(place)
        self._parked[place] = threads if waiting is None else np.sort(np.concatenate([waiting, threads]))

    def _wake(self) -> None:
        """What parked threads wait for may have come: they look again."""
        parked, self._parked = self._parked, {}
        for place, threads in parked.items():
            self._go(place, threads)

    def _compile(self, predicate: str, opcode: str, operands: list[str]) -> Jump:
        name, *parts = opcode.split(".")
        wanted = not predicate.startswith("!")
        test = self._read(predicate.lstrip("!"), "pred") if predicate else None
        if name == "bra":
            return self._branch(self._kernel.labels[operands[0]], test, wanted)
        jump = self._jump(opcode, parts, operands)
        if jump:
            assert test is None, opcode
            return jump
        step = self._step(name, parts, operands)
        if opcode.startswith(_OF_WARPS):
            assert test is None, opcode
            return self._of_warps(step, self._lanes(operands) if name == "shfl" else lambda threads: 32)
        if test is None:
            return lambda place, threads: step(threads)

        def if_true(place: int, threads: Array) -> None:
            chosen = threads[test(threads) == wanted]
            if len(chosen):
                step(chosen)

        return if_true

    def _jump(self, opcode: str, parts: list[str], operands: list[str]) -> Jump | None:
        """Of what threads may not all go on after."""
        if opcode == "ret":
            return self._leave
        if opcode in ("bar.sync", "bar.arrive"):
            return self._barrier(operands, opcode == "bar.sync")
        if opcode.startswith("mbarrier.try_wait"):
            return self._try_wait(operands)
        if opcode.startswith("barrier.cluster.arrive"):
            return self._arrive_at_cluster
        if opcode.startswith("barrier.cluster.wait"):
            return self._wait_for_cluster
        if opcode.startswith("ld.acquire"):
            return self._load_anew(parts[-1], operands)
        if opcode.startswith(_NOTHING):
            return lambda place, threads: None
        return None

    def _branch(self, target: int, test: Callable[[Array], Array] | None, wanted: bool) -> Jump:
        def branch(place: int, threads: Array) -> dict[int, Array] | None:
            if test is None:
                return {target: threads}
            taken = test(threads) == wanted
            return {target: threads[taken], place + 1: threads[~taken]} if taken.any() else None

        return branch

    def _leave(self, place: int, threads: Array) -> dict[int, Array]:
        np.subtract.at(self._alive, self._block[threads], 1)
        return {}

    def _barrier(self, operands: list[str], waits: bool) -> Jump:
        number = self._read(operands[0], "u32")
        count = self._read(operands[1], "u32") if len(operands) > 1 else None

        def arrive(place: int, threads: Array) -> dict[int, Array]:
            blocks, numbers = self._block[threads], number(threads)
            for block, which in np.unique(np.stack([blocks, numbers], -1), axis=0):
                here = threads[(blocks == block) & (numbers == which)]
                waiting = self._waiting[(int(block), int(which))]
                waiting.append((place + 1 if waits else None, here))
                there = sum(len(who) for _, who in waiting)
                expected = int(count(here)[0]) if count else self._alive[block]
                if there > expected:
                    raise Fault(f"{there} threads at a barrier of {expected}")
                if there == expected:
                    for after, who in waiting:
                        if after is not None:
                            self._go(after, who)
                    waiting.clear()
                    if self._races:
                        self._races.barrier(block)
            return {} if waits else {place + 1: threads}

        return arrive

    def _try_wait(self, operands: list[str]) -> Jump:
        write, address, parity = self._write(operands[0]), self._address(operands[1]), self._read(operands[2], "u32")

        def try_wait(place: int, threads: Array) -> dict[int, Array] | None:
            barriers, wanted = self._places(threads, address(threads), 8, False)[:, 0], parity(threads)
            over = np.array([self._mbarriers[b].phase % 2 != w for b, w in zip(barriers, wanted, strict=True)])
            write(threads, np.ones(len(threads), np.bool_))
            if over.all():
                return None
            self._park(place, threads[~over])
            return {place + 1: threads[over]}

        return try_wait

    def _arrive_at_cluster(self, place: int, threads: Array) -> None:
        self._meeting[threads] += 1
        np.add.at(self._arrived, self._block[threads] // self._cluster, 1)
        over = self._arrived == self._cluster * (len(self._block) // len(self._alive))
        self._arrived[over] = 0
        self._met[over] += 1
        if over.any():
            self._wake()

    def _wait_for_cluster(self, place: int, threads: Array) -> dict[int, Array]:
        over = self._met[self._block[threads] // self._cluster] >= self._meeting[threads]
        if not over.all():
            self._park(place, threads[~over])
        return {place + 1: threads[over]}

    def _load_anew(self, kind: str, operands: list[str]) -> Jump:
        load, address = self._ld(["global", kind], operands), self._address(operands[1])

        def load_anew(place: int, threads: Array) -> dict[int, Array]:
            now = np.stack([np.full_like(threads, self._releases), address(threads)], -1)
            new = (self._seen[threads] != now).any(1)  # else it would read the same again
            self._seen[threads] = now
            if not new.all():
                self._park(place, threads[~new])
            if new.any():
                load(threads[new])
            return {place + 1: threads[new]}

        return load_anew

    def _of_warps(self, step: Step, lanes_of: Callable[[Array], int]) -> Jump:
        def step_of_warps(place: int, threads: Array) -> dict[int, Array] | None:
            if place in self._partial:
                threads = np.sort(np.concatenate([self._partial.pop(place), threads]))
            lanes = lanes_of(threads)
            whole = np.bincount(threads // lanes)[threads // lanes] == lanes
            if whole.all():
                step(threads)
                return {place + 1: threads}
            self._partial[place] = threads[~whole]
            if whole.any():
                step(threads[whole])
            return {place + 1: threads[whole]}

        return step_of_warps
