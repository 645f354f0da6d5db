"""The kernels to cubins, by NVRTC, from a disk cache where it can.

Nothing but NVRTC is needed: no nvcc, no host compiler, no CUDA headers, no GPU. Cubins are cached by source, macros,
architecture and NVRTC version in $MATGPTQ_CACHE; where that is not set in ~/.cache/matgptq ($XDG_CACHE_HOME), and where
that cannot be written, in a private folder under the system's temporary folder. With none of them, every process
compiles.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
_HEADERS = tuple(_FOLDER / f"{name}.cuh" for name in ("decode", "call", "norm", "stream", "hopper"))
_OPTIONS = ("--std=c++17", "--ptxas-options=-v")


class CompileError(RuntimeError):
    """NVRTC is missing, or refused the source; the message has its log."""


def compile_cubin(macros: dict[str, str], arch: str) -> tuple[bytes, str]:
    """Compiles the source that KERNEL names; returns the cubin and the compiler's log, with registers and spills.

    For a virtual architecture ("compute_80") the cubin is PTX.
    """
    nvrtc = _nvrtc()
    source = _source(macros)
    options = [option.encode() for option in _options(macros, arch)]
    headers = [header.read_bytes() for header in _HEADERS]
    names = [header.name.encode() for header in _HEADERS]
    program = _check(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(headers), headers, names))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        text = bytes(log).rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC could not compile {source.name} for {arch} with {macros}:\n{text}")
        kind = "PTX" if arch.startswith("compute_") else "CUBIN"
        cubin = bytearray(_check(getattr(nvrtc, f"nvrtcGet{kind}Size")(program)))
        _check(getattr(nvrtc, f"nvrtcGet{kind}")(program, cubin))
        return bytes(cubin), text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def load_cubin(macros: dict[str, str], arch: str) -> bytes:
    """The cubin of one variant, from the cache or compiled and put there. Safe for threads and processes at once."""
    folder = _cache_folder()
    path = folder / f"{_key(macros, arch)}.cubin" if folder else None
    if path is not None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            pass
    cubin, _ = compile_cubin(macros, arch)
    if path is not None:
        _write(path, cubin)
    return cubin


def load_cubins(variants: Iterable[tuple[dict[str, str], str]]) -> list[bytes]:
    """The cubins of many variants; several processes compile what the cache lacks (NVRTC has one lock in each)."""
    variants = list(variants)
    folder = _cache_folder()
    missing = [v for v in variants if folder and not (folder / f"{_key(*v)}.cubin").exists()]
    workers = min(len(missing), os.cpu_count() or 1)
    if workers > 1:
        shares = [json.dumps(missing[i::workers]).encode() for i in range(workers)]
        # This file alone, as a script: a worker must not import the package, and torch with it.
        command = [sys.executable, str(Path(__file__))]
        processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in shares]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda process, share: process.communicate(share), processes, shares))
    return [load_cubin(*variant) for variant in variants]  # raises what a worker met


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except Exception as error:  # ImportError, or the loader's own kinds
        raise CompileError(
            "the CUDA kernels need NVRTC and cuda-bindings of PyTorch's CUDA version (pip install cuda-bindings "
            f"nvidia-cuda-nvrtc, or a CUDA toolkit): {error}"
        ) from error
    return nvrtc


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise CompileError(f"NVRTC failed: {status.name}")
    return values[0] if values else None


def _options(macros: dict[str, str], arch: str) -> list[str]:
    return [*_OPTIONS, f"--gpu-architecture={arch}", *(f"-D{name}={value}" for name, value in macros.items())]


def _source(macros: dict[str, str]) -> Path:
    return _FOLDER / f"{macros['KERNEL']}.cu"


@cache
def _text(source: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in (source, *_HEADERS))


@cache
def _version() -> str:
    _, major, minor = _nvrtc().nvrtcVersion()
    return f"{major}.{minor}"


def _key(macros: dict[str, str], arch: str) -> str:
    text = "\0".join([*_options(macros, arch), _version()])
    return hashlib.sha256(_text(_source(macros)) + text.encode()).hexdigest()[:40]


@cache
def _cache_folder() -> Path | None:
    named = os.environ.get("MATGPTQ_CACHE")
    if named:
        candidates = [Path(named).expanduser()]
    else:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        candidates = [Path(home).expanduser() / "matgptq", Path(tempfile.gettempdir()) / f"matgptq-{os.getuid()}"]
    for folder in candidates:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        # Cubins are run: only a folder of this user's own will do.
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            return folder
    return None


def _write(path: Path, data: bytes) -> None:
    """Write and rename: readers see all of a file or none of it. A full or lost disk only costs the cache."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        file.touch(mode=0o600)
        file.write_bytes(data)
        os.replace(file, path)


if __name__ == "__main__":
    for macros, arch in json.load(sys.stdin):
        load_cubin(macros, arch)
