"""Loaded kernels and their launch: the current stream, no synchronisation, no allocation."""

import ctypes
import struct
import threading
from functools import cache
from typing import Any

import torch

from . import nvrtc
from .tiles import Config, Problem, defines, grid, inbox_offset, shared_bytes

_KERNEL = b"matgptq_linear"
_PARAMS = struct.Struct("6Q10if4x")  # linear.cu, Params
_thread = threading.local()  # a launch writes its parameters into memory of its thread: the driver copies them


class LaunchError(RuntimeError):
    """The CUDA driver refused to load or launch a kernel."""


class Launcher:
    """One problem's kernel on one device, for at most ``problem.M`` tokens; for any number if that fills a tile."""

    def __init__(self, problem: Problem, config: Config, device: int, programmatic: bool = True):
        driver = _driver()
        self.problem, self._config = problem, config
        self.checked: set[tuple[int, ...]] = set()  # operands that matmul has checked
        # The decoded level is taken about 128; without a zeros tensor that is the zero point as well.
        shift = problem.level_offset + (128.0 if problem.zeros else 0.0)
        sizes = (problem.N, problem.K, problem.row_tiles, problem.k_tiles, problem.stored, problem.groups)
        splits = (config.split_tiles(problem), config.chunk_tiles, inbox_offset(problem, config))
        self._constants = (*sizes, *splits, shift)
        self._shared = shared_bytes(problem, config)
        self._grid, self._tokens = grid(problem, config), config.tokens
        self._function = _load(tuple(defines(problem, config).items()), f"sm_{problem.sm}", device)
        _check(
            driver.cuFuncSetAttribute(
                self._function,
                driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                max(self._shared, _shared_of(self._function)),
            )
        )
        self._attributes = []
        if problem.sm >= 90 and config.splits > 1:
            cluster = driver.CUlaunchAttribute()
            cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = config.splits, 1, 1
            self._attributes.append(cluster)
        if problem.sm >= 90 and programmatic:
            overlap = driver.CUlaunchAttribute()
            overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            overlap.value.programmaticStreamSerializationAllowed = 1
            self._attributes.append(overlap)
        self._launches: dict[tuple[int, int], Any] = {}  # (stream, token blocks) -> launch configuration
        self._launch = driver.cuLaunchKernelEx

    def __call__(self, stream: int, M: int, x: int, planes: int, scales: int, zeros: int, bias: int, y: int) -> None:
        """Launches on ``stream``; the rest are device addresses, 0 for none."""
        token_blocks = -(-M // self._tokens)
        launch = self._launches.get((stream, token_blocks))
        if launch is None:
            launch = self._launches[(stream, token_blocks)] = self._configuration(stream, token_blocks)
        try:
            buffer, address = _thread.params
        except AttributeError:
            buffer, address = _thread.params = _params()
        _PARAMS.pack_into(buffer, 0, x, planes, scales, zeros, bias, y, M, *self._constants)
        (status,) = self._launch(launch, self._function, address, 0)
        if status:
            _check((status,))

    def _configuration(self, stream: int, token_blocks: int) -> Any:
        launch = _driver().CUlaunchConfig()
        launch.gridDimX, _, launch.gridDimZ = self._grid
        launch.gridDimY = token_blocks
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = self._config.threads, 1, 1
        launch.sharedMemBytes = self._shared
        launch.hStream = stream
        launch.attrs, launch.numAttrs = self._attributes, len(self._attributes)
        return launch


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise LaunchError(f"the CUDA kernels need cuda-bindings (pip install cuda-bindings): {error}") from error
    return driver


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise LaunchError(f"the CUDA driver failed: {status.name}")
    return values[0] if values else None


@cache
def _load(macros: tuple[tuple[str, str], ...], arch: str, device: int) -> Any:
    cubin = nvrtc.load_cubin(dict(macros), arch)
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # the context exists
        module = _check(_driver().cuModuleLoadData(cubin))
        return _check(_driver().cuModuleGetFunction(module, _KERNEL))


def _shared_of(function: Any) -> int:
    """What other problems of the same kernel have asked for."""
    attribute = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return _check(_driver().cuFuncGetAttribute(attribute, function))


def _params() -> tuple[ctypes.Array[ctypes.c_char], int]:
    """A buffer for Params, and the address of the argument list that points to it (kept behind it)."""
    size = _PARAMS.size
    buffer = ctypes.create_string_buffer(size + 8)
    start = ctypes.addressof(buffer)
    struct.pack_into("Q", buffer, size, start)
    return buffer, start + size
