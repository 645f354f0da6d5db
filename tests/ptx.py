"""Runs kernels without a GPU: an interpreter of the PTX that NVRTC makes of them.

All threads of a grid are one axis of numpy arrays, and those at one place of the program take its instruction together.
It is stricter than a GPU, and raises `Fault` for

- global memory outside the buffers, shared memory outside what the launch asked for, addresses that are not aligned;
- deadlocks, and warps that are not whole at instructions that take warps;
- with ``races``, two threads that use the same 16 bits of shared memory, one of them to write, with no barrier of the
  block between (it does not know what mbarriers order).

Shared memory holds NaN at first. Where a copy is on its way there is NaN too: cp.async lands when its thread waits for
it, bulk copies and sums for other blocks when no thread can go on without.

Source: NVIDIA, "Parallel Thread Execution ISA", 9.0; only what the kernels use of it. An mma adds in float64, and a
wgmma is over when it is issued.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Step = Callable[[Array], None]
Jump = Callable[[int, Array], dict[int, Array] | None]

_TYPES = {
    **dict.fromkeys(("b8", "u8"), np.uint8),
    **dict.fromkeys(("b16", "u16", "f16", "bf16"), np.uint16),
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2", "u16x2"), np.uint32),
    **dict.fromkeys(("b64", "u64"), np.uint64),
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f32": np.float32,
    "pred": np.bool_,
}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_OTHER_BLOCK = 24  # bit of a shared address from which on is the block of its cluster, plus 1
_OF_WARPS = ("mma.", "wgmma.mma_async", "ldmatrix", "stmatrix", "movmatrix", "shfl", "redux", "bar.warp.sync", "elect")
_NOTHING = ("fence", "griddepcontrol", "setmaxnreg", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group")


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


class Kernel:
    """A parsed program: statements as (predicate, opcode, operands), names of inner scopes made unique."""

    def __init__(self, ptx: str) -> None:
        self.types: dict[str, Any] = {}  # by name of a register, or of a family of them without its number
        self.labels: dict[str, int] = {}
        self.code: list[tuple[str, str, list[str]]] = []
        scopes: list[dict[str, str]] = []
        opened = 0
        body = re.sub(r"\{(?=\s*\.reg)|(?<=;)\s*(?=\})", r"\g<0>\n", ptx[ptx.index(".entry") :])
        for line in body[body.index("{") :].splitlines():
            line = line.split("//")[0].strip()
            if line == "{":
                scopes.append({})
                opened += 1
            elif line == "}":
                scopes.pop()
            elif line.endswith(":"):
                scopes[-1][line[:-1]] = name = line[:-1] + (f"@{opened}" if len(scopes) > 1 else "")
                self.labels[name] = len(self.code)
            else:
                for statement in filter(None, map(str.strip, line.split(";"))):
                    self._parse(statement, scopes, opened)

    def _parse(self, statement: str, scopes: list[dict[str, str]], opened: int) -> None:
        if statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            for name in names.replace(" ", "").split(","):
                name = name.split("<")[0]
                unique = name + (f"@{opened}" if len(scopes) > 1 else "")
                scopes[-1][name] = unique
                self.types[unique] = np.bool_ if kind == ".pred" else _UNSIGNED[np.dtype(_TYPES[kind[1:]]).itemsize]
        elif not statement.startswith("."):
            found = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", statement)
            assert found, statement
            inner = {name: unique for scope in scopes[1:] for name, unique in scope.items()}
            predicate, operands = (re.sub(r"[%$\w]+", lambda m: inner.get(m[0], m[0]), found[i] or "") for i in (1, 3))
            self.code.append((predicate, found[2], _split(operands)))

    def type_of(self, operand: str) -> Any:
        """Of a register; None for what is not one."""
        return self.types.get(operand) or self.types.get(re.sub(r"\d+$", "", operand))


def _split(text: str) -> list[str]:
    """What stands between commas outside of brackets."""
    return re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\s])+", text)


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


class Run:
    """A launch of ``grid`` blocks of ``threads`` threads; ``params`` are the bytes of the kernel's one argument."""

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
        self._kernel, self._memory, self._params = kernel, memory, np.frombuffer(params, np.uint8)
        blocks = grid[0] * grid[1] * grid[2]
        everyone = np.arange(blocks * threads)
        self._block, self._shared_size, self._cluster = everyone // threads, shared, cluster
        self._special = {"%tid.x": everyone % threads, "%laneid": everyone % 32}
        of_block = (self._block % grid[0], self._block // grid[0] % grid[1], self._block // grid[0] // grid[1])
        for axis, place, size in zip("xyz", of_block, grid, strict=True):
            self._special |= {f"%ctaid.{axis}": place, f"%nctaid.{axis}": np.full_like(everyone, size)}
        self._registers: dict[str, Array] = {}
        self._shared = np.full(blocks * shared, 0xFF, np.uint8)  # all ones are NaN in every format
        self._races = _Races(blocks * shared, self._block) if races else None
        self._copies: list[tuple[Array, Array, Array, Array]] = []  # threads, their groups, places, bytes
        self._group = np.zeros_like(everyone)  # that a thread's next copies belong to
        self._flights: list[Callable[[], None]] = []  # what lands when nothing else can be done
        self._mbarriers: dict[int, _Mbarrier] = {}  # by place in shared memory
        self._met, self._arrived = (np.zeros(blocks // cluster, int) for _ in range(2))  # at a cluster's barrier
        self._meeting = np.zeros_like(everyone)  # of the cluster's, that a thread has arrived at
        self._releases = 0  # stores that others may wait for
        self._seen = np.full((len(everyone), 2), -1)  # of them, when a thread last looked, and where
        self._alive = np.full(blocks, threads)
        self._ready: dict[int, Array] = {}  # place in the program -> threads there
        self._partial: dict[int, Array] = {}  # the same, waiting for the rest of their warp
        self._parked: dict[int, Array] = {}  # the same, waiting for an mbarrier, their cluster or global memory
        self._waiting: dict[tuple[int, int], list[tuple[int | None, Array]]] = defaultdict(list)  # by block and barrier
        code = [self._compile(*statement) for statement in kernel.code]
        with np.errstate(all="ignore"):
            self._run(code, everyone)

    # Control: threads at the lowest place go first, so that those that branched apart meet again.

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
        step: Step = getattr(self, f"_{name}")(parts, operands)
        if opcode.startswith(_OF_WARPS):
            assert test is None, opcode
            return self._of_warps(step)
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

    def _of_warps(self, step: Step) -> Jump:
        def step_of_warps(place: int, threads: Array) -> dict[int, Array] | None:
            if place in self._partial:
                threads = np.sort(np.concatenate([self._partial.pop(place), threads]))
            whole = np.bincount(threads // 32)[threads // 32] == 32
            if whole.all():
                step(threads)
                return {place + 1: threads}
            self._partial[place] = threads[~whole]
            if whole.any():
                step(threads[whole])
            return {place + 1: threads[whole]}

        return step_of_warps

    # Operands.

    def _register(self, name: str) -> Array:
        if name not in self._registers:
            self._registers[name] = np.zeros(len(self._block), self._kernel.type_of(name))
        return self._registers[name]

    def _read(self, operand: str, kind: str) -> Callable[[Array], Array]:
        """What an operand is in threads, as ``kind``; of a wider register the lower bits."""
        dtype = np.dtype(_TYPES[kind])
        if self._kernel.type_of(operand):
            register = self._register(operand)
            if dtype == np.bool_:
                return lambda threads: register[threads]
            return lambda threads: register[threads].astype(_UNSIGNED[dtype.itemsize], copy=False).view(dtype)
        if operand in self._special:
            special = self._special[operand].astype(dtype)
            return lambda threads: special[threads]
        if operand == "shared" or "_param_" in operand:  # each the start of its own space
            value = np.zeros(1, dtype)
        elif operand.startswith("0f"):
            value = np.array([int(operand[2:], 16)], np.uint32).view(dtype)
        else:
            number = int(operand.rstrip("U"), 0) & ((1 << 64) - 1)
            value = np.array([number], np.uint64).astype(_UNSIGNED[dtype.itemsize]).view(dtype)
        return lambda threads: np.broadcast_to(value, len(threads))

    def _write(self, operand: str) -> Callable[[Array, Array], None]:
        if operand == "_":
            return lambda threads, values: None
        register = self._register(operand)

        def write(threads: Array, values: Array) -> None:
            register[threads] = values if values.dtype == np.bool_ else values.view(_UNSIGNED[values.itemsize])

        return write

    def _reads(self, operand: str, kind: str) -> Callable[[Array], Array]:
        """(threads, values) of a vector, or of one operand."""
        parts = [self._read(part, kind) for part in _split(operand.strip("{}"))]
        return lambda threads: np.stack([part(threads) for part in parts], -1)

    def _writes(self, operand: str) -> Callable[[Array, Array], None]:
        parts = [self._write(part) for part in _split(operand.strip("{}"))]

        def write(threads: Array, values: Array) -> None:
            for i, part in enumerate(parts):
                part(threads, np.ascontiguousarray(values[:, i]))

        return write

    def _address(self, operand: str) -> Callable[[Array], Array]:
        base, _, offset = operand.strip("[]").partition("+")
        start = self._read(base, "u32" if self._kernel.type_of(base) == np.uint32 else "u64")
        return lambda threads: start(threads).astype(np.int64) + int(offset or 0)

    # Arithmetic.

    def _apply(self, operands: list[str], kinds: list[str], function: Callable[..., Array]) -> Step:
        """operands[0] = function(the others)."""
        write = self._write(operands[0])
        reads = [self._read(operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)]
        return lambda threads: write(threads, function(*(read(threads) for read in reads)))

    def _elementwise(self, parts: list[str], operands: list[str], function: Callable[..., Array]) -> Step:
        """The same of operands of one type, which may be a pair."""
        kind = parts[-1]
        of_one = function
        if kind in ("f16x2", "bf16x2"):
            half = kind.removesuffix("x2")

            def of_one(*pairs: Array) -> Array:
                return _pair(to_16(function(*(from_16(_halves(pair), half) for pair in pairs)), half))

        elif kind == "u16x2":

            def of_one(*pairs: Array) -> Array:
                return _pair(function(*map(_halves, pairs)))

        return self._apply(operands, [kind] * (len(operands) - 1), of_one)

    def _add(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.add)

    def _sub(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.subtract)

    def _min(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.fmin)

    def _max(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.fmax)

    def _and(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.bitwise_and)

    def _or(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.bitwise_or)

    def _xor(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.bitwise_xor)

    def _not(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.invert)

    def _neg(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.negative)

    def _rem(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.fmod)

    def _ex2(self, parts: list[str], operands: list[str]) -> Step:
        return self._elementwise(parts, operands, np.exp2)

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
                return _pair(to_16(np.stack([low, high], -1).astype(np.float64), to.removesuffix("x2")))

            return self._apply(operands, ["f32"] * 2, pack)
        if of in ("f16", "bf16"):
            return self._apply(operands, [of], lambda a: from_16(a, of).astype(_TYPES[to]))
        if to in ("f16", "bf16"):
            return self._apply(operands, [of], lambda a: to_16(a.astype(np.float64), to))
        return self._apply(operands, [of], lambda a: a.astype(_TYPES[to]))

    def _mov(self, parts: list[str], operands: list[str]) -> Step:
        to, of = operands
        if to.startswith("{"):
            halves, whole = self._writes(to), self._read(of, "u32")
            return lambda threads: halves(threads, _halves(whole(threads)))
        if of.startswith("{"):
            write, pair = self._write(to), self._reads(of, "u16")
            return lambda threads: write(threads, _pair(pair(threads)))
        return self._apply(operands, [parts[-1]], lambda a: a)

    def _cvta(self, parts: list[str], operands: list[str]) -> Step:
        return self._apply(operands, ["u64"], lambda a: a)

    # Memory.

    def _ld(self, parts: list[str], operands: list[str]) -> Step:
        space, dtype = parts[0], np.dtype(_TYPES[parts[-1]])
        write, address = self._writes(operands[0]), self._address(operands[1])
        size = dtype.itemsize * len(_split(operands[0].strip("{}")))

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
        other = address >> _OTHER_BLOCK
        address = address - (other << _OTHER_BLOCK)
        if (address + size > self._shared_size).any() or (address % (align or size)).any():
            raise Fault(f"{size} bytes of shared memory, outside {self._shared_size} or not aligned: {address.max()}")
        block = self._block[threads]
        block = np.where(other > 0, block // self._cluster * self._cluster + other - 1, block)
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
                    mask = int(blocks(threads)[i]) if blocks else 0
                    others = [1 + b << _OTHER_BLOCK for b in range(self._cluster) if mask >> b & 1] if mask else [0]
                    for other in others:
                        self._fly(thread, int(to(threads)[i]) + other, data, int(barrier(threads)[i]) + other)

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
                    self._mbarriers[place] = _Mbarrier(int(n))

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
        return self._apply(
            operands, ["u32", "u32"], lambda address, block: address + (block + np.uint32(1) << np.uint32(_OTHER_BLOCK))
        )

    # Instructions of a warp: threads come in whole ones.

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
            rows = np.ascontiguousarray(_halves(a)).reshape(-1, 8, 8)  # warp, row, column
            return _pair(rows.transpose(0, 2, 1).reshape(-1, 2))

        return self._apply(operands, ["u32"], transpose)

    def _stmatrix(self, parts: list[str], operands: list[str]) -> Step:
        assert parts == ["sync", "aligned", "m8n8", "x4", "trans", "shared", "b16"]
        address, read = self._address(operands[0]), self._reads(operands[1], "u32")

        def store(threads: Array) -> None:
            words = np.ascontiguousarray(read(threads)).reshape(-1, 32, 4)  # warp, lane, matrix
            columns = np.ascontiguousarray(_halves(words.transpose(0, 2, 1))).reshape(-1, 4, 8, 8).transpose(0, 1, 3, 2)
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
            a = _operand_a(np.ascontiguousarray(read_a(threads)), parts[5])
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
            a = _operand_a(np.ascontiguousarray(read_a(threads)), parts[6])
            b = _values(np.ascontiguousarray(read_b(threads)).reshape(-1, 8, 4, 2), parts[7])
            b = b.transpose(0, 1, 3, 2, 4).reshape(len(a), 8, -1)
            d = a @ b.transpose(0, 2, 1)  # warp, row, column
            d = d.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
            c = read_c(threads)
            write(threads, (d + c).astype(c.dtype))

        return multiply

    def _redux(self, parts: list[str], operands: list[str]) -> Step:
        assert parts[1] == "max"
        return self._apply(operands[:2], [parts[-1]], lambda a: np.repeat(a.reshape(-1, 32).max(1), 32))

    def _shfl(self, parts: list[str], operands: list[str]) -> Step:
        def exchange(a: Array, which: Array) -> Array:
            of = which.reshape(-1, 32).astype(np.int64)
            of = np.arange(32) ^ of if parts[1] == "bfly" else of
            return np.take_along_axis(a.reshape(-1, 32), of, 1).reshape(-1)

        assert parts[1] in ("bfly", "idx")

        to = operands[0].split("|")[0]
        return self._apply([to, *operands[1:3]], [parts[-1], "u32"], exchange)


def _values(words: Array, kind: str) -> Array:
    """(..., values of a register)"""
    if kind in ("u8", "s8"):
        return words[..., None].view(np.uint8 if kind == "u8" else np.int8).astype(np.float64)
    return from_16(words[..., None].view(np.uint16), kind)


def _operand_a(words: Array, kind: str) -> Array:
    """(warps, 16, k) of the registers of A, (threads, 4)."""
    a = _values(words.reshape(-1, 8, 4, 2, 2), kind)  # warp, g, t, half of k, half of rows
    return a.transpose(0, 4, 1, 3, 2, 5).reshape(len(a), 16, -1)


class _Mbarrier:
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


def _halves(pairs: Array) -> Array:
    return np.stack([pairs.astype(np.uint16), (pairs >> 16).astype(np.uint16)], -1)


def _pair(halves: Array) -> Array:
    return halves[..., 0].astype(np.uint32) | (halves[..., 1].astype(np.uint32) << 16)


class _Races:
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
