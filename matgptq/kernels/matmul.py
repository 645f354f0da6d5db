"""y = x W^T + bias on CUDA, W packed by ``packing.pack_codes``."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from .launch import Launcher, compile_tiles, make_launcher
from .packing import TILE
from .problem import MEAN_ROWS, Problem, can_implement
from .tiles import choose

_MANY_TOKENS = 8192  # from here on the tile does not depend on M
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_MANY = 4096  # checked addresses and shapes that are remembered: more than a model has layers
Plan = tuple[int, tuple[int, ...], tuple[int, ...], Launcher]  # M, shape and strides of y, the kernel
# What compiled code allocates with, on the current device: the dispatcher would take as long again.
_empty: Callable[..., torch.Tensor] = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]


def matmul(
    x: torch.Tensor,
    planes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    rule: str = "round",
    resident: bool = False,
    gated: bool = False,
) -> torch.Tensor:
    """``y = x W^T + bias`` with ``W = scale * (level - zero)``, level the ``bits``-bit slice's.

    Args:
        x: (..., in_features), float16 or bfloat16.
        planes: int32 (ceil(N/64), ceil(K/64), bits or 8, 32, 4), ``pack_codes`` of the slices, or of the 8-bit codes
            where ``resident``.
        scales: ``pack_scales`` of (out_features, in_features / group_size), x's dtype.
        zeros: None for 128, or ``pack_scales`` of float32 zeros; in units of 8-bit codes, may be fractional.
        bias: (out_features,), x's dtype, or None.
        group_size: a multiple of 16 that divides in_features, or -1 for one group a row.
        rule: "round" or "prefix". A resident "round" slice reads one plane more than ``bits`` (not at 8).
        gated: weights, scales, zeros and bias are those of two layers of out_features (a multiple of 64), one after the
            other, and the result is ``silu(first) * second``, from results of theirs in x's dtype.

    Runs on the current stream without synchronising. Weights, scales, zeros and bias must not be written by a kernel
    that may still run: the one launched just before, and others if that one lets its successor start before it waits.
    Operands that have passed the checks once, by address, are not checked again.

    Raises ValueError for arguments that break these rules.
    """
    call = bind(bits, group_size, in_features, out_features, rule, resident, gated)
    return call(x, planes, scales, zeros, bias)


class BoundMatmul:
    """`matmul` of one kind of layer: what does not change between calls is looked up once.

    It holds no tensor, so it need not be told when a layer moves or its width changes. A call costs a few microseconds
    in all, so that every look-up counts.
    """

    def __init__(
        self, bits: int, group_size: int, in_features: int, out_features: int, rule: str, resident: bool, gated: bool
    ):
        self._constants = (out_features, in_features, bits, group_size, rule, resident, gated)
        self._launchers: dict[tuple[int, torch.dtype, bool, int, str], Launcher] = {}
        self._plans: dict[tuple[Any, ...], Plan] = {}  # by shape, dtype, zeros and device of a call

    def __call__(
        self,
        x: torch.Tensor,
        planes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `matmul`."""
        key = (x.shape, x.dtype, zeros is not None, x.get_device())
        M, shape, strides, launcher = self._plans.get(key) or self._plan(*key)
        # Addresses that have been checked are not checked again.
        operands = (
            planes.data_ptr(),
            scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
        if operands not in launcher.checked:
            _check_once(launcher, operands, x, planes, scales, zeros, bias)
        start = x.data_ptr()
        if start % 16 or not x.is_contiguous():
            x = x.clone(memory_format=torch.contiguous_format)
            start = x.data_ptr()
        index = key[3]
        if torch._C._cuda_getDevice() != index:  # the driver launches in the context of the current device
            with torch.cuda.device(index):
                return self(x, planes, scales, zeros, bias)
        y = _empty(shape, strides, x.dtype)
        if M:
            launcher(torch._C._cuda_getCurrentRawStream(index), M, start, *operands, y.data_ptr())
        return y

    def summed(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        planes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`shared_norm.summed_linear`.

        Raises ValueError for arguments that do not fit.
        """
        key = (x.shape, x.dtype, zeros is not None, x.get_device(), "summed")
        M, shape, _, launcher = self._plans.get(key) or self._plan(*key)
        _check_norm(x, shape, residual, norm, eps)
        y, total = x.new_empty(shape), x.new_empty(shape)
        means = means_of(y)
        residual, norm = _readable(residual), _readable(norm)
        rest = (means.data_ptr(), residual.data_ptr(), norm.data_ptr(), total.data_ptr(), eps)
        self._run(launcher, M, x, (planes, scales, zeros, bias), y, rest)
        return y, total, means

    def scaled(
        self,
        z: torch.Tensor,
        means: torch.Tensor,
        planes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """`shared_norm.scaled_linear`.

        Raises ValueError for arguments that do not fit.
        """
        key = (z.shape, z.dtype, zeros is not None, z.get_device(), "scaled")
        M, shape, _, launcher = self._plans.get(key) or self._plan(*key)
        wanted = (*z.shape[:-1], z.shape[-1] // MEAN_ROWS)
        if means.dtype != torch.float32 or means.shape != wanted or means.device != z.device:
            got = f"{means.dtype} {tuple(means.shape)} on {means.device}"
            raise ValueError(f"means must be torch.float32 {wanted} on {z.device}, got {got}")
        means = _readable(means)
        y = z.new_empty(shape)
        rest = (means.data_ptr(), 0, 0, 0, 0.0) if launcher.problem.scaled else ()
        self._run(launcher, M, z, (planes, scales, zeros, bias), y, rest)
        return y

    def _run(
        self,
        launcher: Launcher,
        M: int,
        x: torch.Tensor,
        operands: tuple[torch.Tensor | None, ...],
        y: torch.Tensor,
        rest: tuple[float, ...],
    ) -> None:
        addresses = tuple(0 if v is None else v.data_ptr() for v in operands)
        if addresses not in launcher.checked:
            _check_once(launcher, addresses, x, *operands)  # type: ignore[arg-type]
        x = _readable(x)
        with torch.cuda.device(x.get_device()):
            if M:
                stream = torch._C._cuda_getCurrentRawStream(x.get_device())
                launcher(stream, M, x.data_ptr(), *addresses, y.data_ptr(), *rest)

    def _plan(self, shape: torch.Size, dtype: torch.dtype, zeros: bool, index: int, norm: str = "") -> Plan:
        N, K, *_ = self._constants
        if not shape or shape[-1] != K:
            raise ValueError(f"x must have in_features {K} columns, got shape {tuple(shape)}")
        M = shape[:-1].numel()
        y = torch.empty((*shape[:-1], N), device="meta")
        plan = M, tuple(y.shape), y.stride(), self.load(bucket(M), dtype, zeros, index, norm)
        if len(self._plans) >= _MANY:
            self._plans.clear()
        self._plans[(shape, dtype, zeros, index, norm) if norm else (shape, dtype, zeros, index)] = plan
        return plan

    def load(self, M: int, dtype: torch.dtype, zeros: bool, index: int, norm: str = "") -> Launcher:
        """Compile and load the kernel for ``M`` tokens, a `bucket`, on the device ``index``.

        ``norm`` names the field of `Problem` that says where a norm is: "summed", "scaled" or none.
        """
        key = (M, dtype, zeros, index, norm)
        if key not in self._launchers:
            N, K, bits, group_size, rule, resident, gated = self._constants
            self._launchers[key] = _launcher(
                M, N, K, bits, dtype, group_size, rule, resident, zeros, gated, index, norm
            )
        return self._launchers[key]


@cache
def bind(
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    rule: str = "round",
    resident: bool = False,
    gated: bool = False,
) -> BoundMatmul:
    """`matmul` with these arguments bound; the same object for the same arguments."""
    return BoundMatmul(bits, group_size, in_features, out_features, rule, resident, gated)


def warmup(problems: Iterable[Problem], device: torch.device | str | int = "cuda") -> None:
    """Compiles (in parallel) and loads what problems need: before a CUDA graph is captured, or a first token is due."""
    device = torch.device(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    problems = [replace(p, M=bucket(max(p.M, 1))) for p in problems]
    compile_tiles((p, choose(p)) for p in problems)
    names = {name: dtype for dtype, name in _DTYPES.items()}
    for p in problems:
        call = bind(p.bits, p.group_size, p.K, p.N, p.rule, p.resident, p.gated)
        norm = "summed" if p.summed else "scaled" if p.scaled else ""
        call.load(p.M, names[p.dtype], p.zeros, index, norm)


def buckets(most: int) -> list[int]:
    """Every `bucket` of 1 to ``most`` tokens: kernels for these serve them all."""
    return sorted({bucket(M) for M in range(1, most + 1)})


def bucket(M: int) -> int:
    """The number of tokens that a tile is chosen for: from 64 on the next of eight to each power of two."""
    if M <= 64:
        return M
    step = 1 << ((M - 1).bit_length() - 4)
    return min(-(-M // step) * step, _MANY_TOKENS)


def _launcher(
    M: int,
    N: int,
    K: int,
    bits: int,
    dtype: torch.dtype,
    group_size: int,
    rule: str,
    resident: bool,
    zeros: bool,
    gated: bool,
    index: int,
    norm: str = "",
) -> Launcher:
    if index < 0:
        raise ValueError("x must be on a CUDA device, got the CPU")
    major, minor = torch.cuda.get_device_capability(index)
    name = _DTYPES.get(dtype, str(dtype))
    sm = 10 * major + minor
    problem = Problem(max(M, 1), N, K, bits, name, group_size, resident, rule, zeros, sm, gated)
    problem = replace(problem, summed=norm == "summed", scaled=norm == "scaled")
    able, reason = can_implement(problem)
    if not able:
        raise ValueError(reason)
    return make_launcher(problem, choose(problem), index)


def means_of(y: torch.Tensor) -> torch.Tensor:
    """Room for the means of sums of y's shape (norm.cuh): float32 ``(..., out_features / 16)``."""
    return y.new_empty((*y.shape[:-1], y.shape[-1] // MEAN_ROWS), dtype=torch.float32)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy that is contiguous and starts at a multiple of 16 bytes."""
    aligned = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)


def _check_norm(
    x: torch.Tensor, shape: tuple[int, ...], residual: torch.Tensor, norm: torch.Tensor, eps: float
) -> None:
    """Raises what is wrong with what is added to results of this shape, and with the norm, if anything."""
    for name, tensor, wanted in (("residual", residual, shape), ("norm", norm, shape[-1:])):
        if tensor.dtype != x.dtype or tensor.shape != wanted or tensor.device != x.device:
            got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must be {x.dtype} {tuple(wanted)} on {x.device}, got {got}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _check_once(
    launcher: Launcher,
    addresses: tuple[int, ...],
    x: torch.Tensor,
    planes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Checks operands, and remembers their addresses."""
    _check_operands(x, planes, scales, zeros, bias, launcher.problem)
    if len(launcher.checked) >= _MANY:
        launcher.checked.clear()
    launcher.checked.add(addresses)


def _check_operands(
    x: torch.Tensor,
    planes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    p: Problem,
) -> None:
    """Raises what is wrong with the operands of a call, if anything."""
    row_tiles = p.layer.row_tiles
    shape = (row_tiles, p.groups, TILE)
    for name, tensor, dtype, wanted in (
        ("planes", planes, torch.int32, (row_tiles, p.k_tiles, p.stored, 32, 4)),
        ("scales", scales, x.dtype, shape),
        ("zeros", zeros, torch.float32, shape),
        ("bias", bias, x.dtype, (p.layer.N,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} must be {dtype} {wanted}, got {tensor.dtype} {tuple(tensor.shape)}")
        if name != "bias" and tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes, got address {tensor.data_ptr():#x}")
        if tensor.get_device() != x.get_device() or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and on {x.device}, got {tensor.device}, strides {tensor.stride()}"
            )
