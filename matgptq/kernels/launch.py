"""Loaded kernels and their launch: the current stream, no synchronisation; stream-K allocates room for its sums."""

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from . import hopper, many, nvrtc
from .hopper import HopperConfig
from .many import ManyConfig
from .problem import TILE, Problem
from .stream import Config, grid, inbox_offset, share_bits, shared_bytes
from .tiles import AnyConfig, Gate, Norm, architecture, defines, gate_follows, kernels, norm_follows

_PARAMS = struct.Struct("6Q11if")  # call.cuh, Params
_WITH_NORM = struct.Struct(f"{_PARAMS.format}4Qf4x")  # the same with norm.cuh, SharedNorm
_HOPPER = struct.Struct("128s5Q10ifi2Q3i12x")  # hopper.cu, Params
_GATE = struct.Struct("6Q2i")  # gate.cu, Params
_NORM = struct.Struct("6Q2if4x")  # norm.cu, Params
_MANY_MAPS = 1024  # tensor maps that a launcher keeps
_TICKET = int.from_bytes(os.urandom(8), "little") | 1  # hopper.cu, Params: a number that memory does not hold by chance
_UNSPLIT = (0, 0, 0, 0)  # call.cuh, Params, of blocks that take all of k
_ALONE = (0, 0, 0, 0, 0, 0)  # hopper.cu, Params, of tiles that blocks do not share
_lock = threading.Lock()
_thread = threading.local()  # a launch writes its parameters into memory of its thread: the driver copies them


class LaunchError(RuntimeError):
    """The CUDA driver refused to load or launch a kernel."""


def make_launcher(problem: Problem, config: AnyConfig, device: int, programmatic: bool = True) -> "Launcher":
    """The launcher of a tile's kernel; of more, where the problem is gated or summed and the tile is not."""
    if problem.scaled and not problem.shares_norm:
        return make_launcher(replace(problem, scaled=False), config, device, programmatic)
    if norm_follows(problem):
        layer = make_launcher(replace(problem, summed=False), config, device, programmatic)
        return NormLauncher(layer, problem, device, programmatic)
    if gate_follows(problem, config):
        return GateLauncher(make_launcher(problem.layer, config, device, programmatic), problem, device, programmatic)
    if isinstance(config, HopperConfig):
        return HopperLauncher(problem, config, device, programmatic)
    if isinstance(config, ManyConfig):
        return ManyLauncher(problem, config, device, programmatic)
    return Launcher(problem, config, device, programmatic)


def compile_tiles(tiles: Iterable[tuple[Problem, AnyConfig]]) -> int:
    """Compiles in parallel what kernels of ``tiles`` the cache does not hold yet; returns how many kernels they are."""
    variants = set()
    for p, c in tiles:
        variants |= {(tuple(defines(p, kernel).items()), architecture(p, kernel)) for kernel in kernels(p, c)}
    nvrtc.load_cubins((dict(macros), arch) for macros, arch in sorted(variants))
    return len(variants)


class Launcher:
    """One problem's kernel on one device, for at most ``problem.M`` tokens; for any number if that fills a tile."""

    _pack: Callable[..., None] = _PARAMS.pack_into

    def __init__(self, problem: Problem, config: Config, device: int, programmatic: bool = True):
        self._prepare(problem, config, shared_bytes(problem, config), device, programmatic)
        inbox = (inbox_offset(problem, config), share_bits(problem, config))
        splits = (config.split_tiles(problem), config.chunk_tiles, *inbox)
        if problem.summed or problem.scaled:
            self._pack = _WITH_NORM.pack_into
        self._constants = (*_sizes(problem), *splits, _shift(problem))
        self._splits, _, self._row_blocks = grid(problem, config)

    def _prepare(
        self, problem: Problem, config: AnyConfig | Gate | Norm, shared: int, device: int, programmatic: bool
    ) -> None:
        driver = _driver()
        self.problem, self._shared = problem, shared
        self._threads, self._tokens = config.threads, config.tokens
        self.checked: set[tuple[int, ...]] = set()  # operands that matmul has checked
        function = _load(tuple(defines(problem, config).items()), architecture(problem, config), device)
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with _lock:  # other problems of the same kernel may ask for more
            _check(driver.cuFuncSetAttribute(function, limit, max(shared, _shared_of(function))))
        self._function = int(function)
        self._attributes = []
        if problem.sm >= 90 and config.cluster > 1:
            cluster = driver.CUlaunchAttribute()
            cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = config.cluster, 1, 1
            self._attributes.append(cluster)
        if problem.sm >= 90 and programmatic:
            overlap = driver.CUlaunchAttribute()
            overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            overlap.value.programmaticStreamSerializationAllowed = 1
            self._attributes.append(overlap)
        self._launches: dict[tuple[int, int], int] = {}  # (stream, token blocks) -> address of what is below
        self._configurations: list[Any] = []
        self._launch = _launch_function()

    def __call__(
        self, stream: int, M: int, x: Any, planes: int, scales: int, zeros: int, bias: int, y: int, *rest: float
    ) -> None:
        """Launches on ``stream``; from x to y they are device addresses, 0 for none; ``rest`` ends the Params.

        For a summed problem that is the addresses of means, residual, norm and sum, and eps; for a scaled one that of
        means, and zeros (norm.cuh).
        """
        token_blocks = -(-M // self._tokens)
        launch = self._launches.get((stream, token_blocks)) or self._configure(stream, token_blocks)
        try:
            buffer, address = _thread.params
        except AttributeError:
            buffer, address = _thread.params = _params()
        self._pack(buffer, 0, x, planes, scales, zeros, bias, y, M, *self._constants, *rest)
        status = self._launch(launch, self._function, address, None)
        if status:
            _check((_driver().CUresult(status),))

    def _blocks(self, token_blocks: int) -> tuple[int, int, int]:
        return self._splits, token_blocks, self._row_blocks

    def _configure(self, stream: int, token_blocks: int) -> int:
        launch = _driver().CUlaunchConfig()
        launch.gridDimX, launch.gridDimY, launch.gridDimZ = self._blocks(token_blocks)
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = self._threads, 1, 1
        launch.sharedMemBytes = self._shared
        launch.hStream = stream
        launch.attrs, launch.numAttrs = self._attributes, len(self._attributes)
        self._configurations.append(launch)
        address = self._launches[(stream, token_blocks)] = int(launch.getPtr())
        return address


class HopperLauncher(Launcher):
    """The same for hopper.cu, and for any number of tokens."""

    _pack = _HOPPER.pack_into

    def __init__(self, problem: Problem, config: HopperConfig, device: int, programmatic: bool = True):
        self._prepare(problem, config, hopper.shared_bytes(problem, config), device, programmatic)
        splits = (config.splits, config.split_turns(problem), hopper.barriers_offset(problem, config))
        self._constants = (*_sizes(problem), *splits, _shift(problem), *(() if config.stream_k else _ALONE))
        self._config, self._device = config, device
        self._clusters = -(-problem.N // (config.outputs * (2 if config.pair else 1)))  # along rows
        self._resident = torch.cuda.get_device_properties(device).multi_processor_count * config.blocks
        self._maps: dict[tuple[int, int], bytes] = {}  # (address of x, M) -> tensor map
        self._shares: dict[int, hopper.Shares] = {}  # by token blocks

    def __call__(
        self, stream: int, M: int, x: Any, planes: int, scales: int, zeros: int, bias: int, y: int, *_: float
    ) -> None:
        """Launches on ``stream``, the current one; from x to y they are device addresses, 0 for none."""
        tensor_map = self._maps.get((x, M))
        if tensor_map is None:
            if len(self._maps) >= _MANY_MAPS:
                self._maps.clear()
            tensor_map = self._maps[(x, M)] = _tensor_map(x, M, self.problem.K, self._config.box_tokens)
        if not self._config.stream_k:
            super().__call__(stream, M, tensor_map, planes, scales, zeros, bias, y)
            return
        token_blocks = -(-M // self._tokens)
        shares = self._shares.get(token_blocks)
        if shares is None:
            tiles, blocks = self._clusters * token_blocks, self._blocks(token_blocks)[0]
            shares = self._shares[token_blocks] = hopper.Shares.of(self.problem, self._config, tiles, blocks)
        left = _room(shares.left_bytes, self._device)
        rest = (shares.shared_tiles, left.data_ptr(), _TICKET, shares.share, shares.one_more, shares.waves)
        super().__call__(stream, M, tensor_map, planes, scales, zeros, bias, y, *rest)

    def _blocks(self, token_blocks: int) -> tuple[int, int, int]:
        config, clusters = self._config, self._clusters * token_blocks
        if config.stream_k:
            clusters *= config.split_turns(self.problem) // config.turns_at_once
        if config.persistent:  # blocks then compute several tiles
            clusters = min(clusters, self._resident // config.cluster)
        return clusters * config.cluster, 1, 1


class ManyLauncher(Launcher):
    """The same for many.cu, and for any number of tokens."""

    def __init__(self, problem: Problem, config: ManyConfig, device: int, programmatic: bool = True):
        self._prepare(problem, config, many.shared_bytes(problem, config), device, programmatic)
        self._constants = (*_sizes(problem), *_UNSPLIT, _shift(problem))
        self._row_blocks = -(-problem.N // config.rows)

    def _blocks(self, token_blocks: int) -> tuple[int, int, int]:
        return self._row_blocks * token_blocks, 1, 1


class GateLauncher(Launcher):
    """A layer's kernel, and gate.cu after it."""

    _pack = _GATE.pack_into

    def __init__(self, layer: Launcher, problem: Problem, device: int, programmatic: bool = True):
        self._prepare(problem, Gate(), 0, device, programmatic)
        self._layer, self._device = layer, device
        self._constants = (problem.N,)

    def __call__(
        self, stream: int, M: int, x: Any, planes: int, scales: int, zeros: int, bias: int, y: int, *rest: float
    ) -> None:
        """Launches on ``stream``, the current one; from x to y they are device addresses, 0 for none."""
        outputs = _room(4 * M * self.problem.N, self._device)
        self._layer(stream, M, x, planes, scales, zeros, bias, outputs.data_ptr(), *rest)
        super().__call__(stream, M, outputs.data_ptr(), 0, 0, 0, 0, y)

    def _blocks(self, token_blocks: int) -> tuple[int, int, int]:
        outputs = token_blocks * self._tokens * self.problem.N
        return -(-outputs // (8 * self._threads)), 1, 1


class NormLauncher(Launcher):
    """The kernel of a layer, and norm.cu after it."""

    _pack = _NORM.pack_into

    def __init__(self, layer: Launcher, problem: Problem, device: int, programmatic: bool = True):
        self._prepare(problem, Norm(), Norm().threads // 8, device, programmatic)
        self._layer, self._device = layer, device
        self._constants = (problem.N,)

    def __call__(
        self, stream: int, M: int, x: Any, planes: int, scales: int, zeros: int, bias: int, y: int, *rest: float
    ) -> None:
        """Launches on ``stream``, the current one, as `Launcher`."""
        means, residual, norm, total, eps = rest
        outputs = _room(2 * M * self.problem.N, self._device)
        self._layer(stream, M, x, planes, scales, zeros, bias, outputs.data_ptr())
        super().__call__(stream, M, outputs.data_ptr(), int(residual), int(norm), int(means), int(total), y, eps)

    def _blocks(self, token_blocks: int) -> tuple[int, int, int]:
        return token_blocks, 1, 1


def _room(size: int, device: int) -> torch.Tensor:
    """Memory that the current stream, or the graph being captured, has alone: its next kernels may have it again."""
    return torch.empty(size, dtype=torch.uint8, device=device)


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise LaunchError(f"the CUDA kernels need cuda-bindings (pip install cuda-bindings): {error}") from error
    return driver


@cache
def _launch_function() -> Any:
    """The driver's cuLaunchKernelEx: a launch configuration, a function, arguments and options, all by address."""
    driver = _driver()
    flags = driver.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
    address, _ = _check(driver.cuGetProcAddress(b"cuLaunchKernelEx", 11060, flags))
    # cuda-bindings' own copies the configuration at each call
    return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(address)


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise LaunchError(f"the CUDA driver failed: {status.name}")
    return values if len(values) > 1 else values[0] if values else None


@cache
def _load(macros: tuple[tuple[str, str], ...], arch: str, device: int) -> Any:
    cubin = nvrtc.load_cubin(dict(macros), arch)
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # the context exists
        module = _check(_driver().cuModuleLoadData(cubin))
        source = dict(macros)["KERNEL"]
        name = f"matgptq_{source if source in ('gate', 'norm') else 'linear'}"
        return _check(_driver().cuModuleGetFunction(module, name.encode()))


def _shared_of(function: Any) -> int:
    """What other problems of the same kernel have asked for."""
    attribute = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return _check(_driver().cuFuncGetAttribute(attribute, function))


def _sizes(problem: Problem) -> tuple[int, ...]:
    return problem.N, problem.K, problem.row_tiles, problem.k_tiles, problem.stored, problem.groups


def _shift(problem: Problem) -> float:
    # The decoded level is taken about 128; without a zeros tensor that is the zero point as well.
    return problem.level_offset + (128.0 if problem.zeros else 0.0)


def _tensor_map(x: int, M: int, K: int, tokens: int) -> bytes:
    """How TMA reads boxes of ``tokens`` x 64 k of x (M, K): 16-bit values, rows swizzled, zeros beyond the edges."""
    driver = _driver()
    tensor_map = _check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,
            2,
            x,
            [driver.cuuint64_t(K), driver.cuuint64_t(M)],
            [driver.cuuint64_t(2 * K)],
            [driver.cuuint32_t(TILE), driver.cuuint32_t(tokens)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(tensor_map.getPtr(), 128)


def _params() -> tuple[ctypes.Array[ctypes.c_char], int]:
    """A buffer for Params, and the address of the argument list that points to it (kept behind it)."""
    size = max(_WITH_NORM.size, _HOPPER.size)
    buffer = ctypes.create_string_buffer(size + 8)
    start = ctypes.addressof(buffer)
    struct.pack_into("Q", buffer, size, start)
    return buffer, start + size
