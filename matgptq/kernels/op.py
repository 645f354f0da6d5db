"""``torch.ops.matgptq.packed_linear``: the layer in the kernels' layout, by the kernels or, on a CPU, by unpacking.

``packed_linear_at`` is the same with the width in a tensor, for compiled code that serves all widths;
``packed_linears_at`` is several of these that share ``x``. `shared_norm` has those around RMSNorm of a sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import library, linear_by_pieces
from ..slicing import MAX_BITS
from .matmul import bind
from .packing import TILE, follows, joined, unpack, unpack_scales

library.define(
    "packed_linear(Tensor x, Tensor planes, Tensor scales, Tensor? zeros, Tensor? bias, int in_features, "
    "int out_features, int bits, int group_size, str rule, bool resident, bool gated=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "packed_linear_at(Tensor x, Tensor planes, Tensor[] scales, Tensor? zeros, Tensor? bias, Tensor width, "
    "int in_features, int out_features, int group_size, str rule, bool resident) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "packed_linears_at(Tensor x, Tensor[] planes, Tensor[] scales, Tensor[] zeros, Tensor[] biases, Tensor[] widths, "
    "int in_features, int[] out_features, int group_size, str rule, bool resident, bool gated=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def packed_linear(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    in_features: int,
    out_features: int,
    bits: int,
    group_size: int,
    rule: str = "round",
    resident: bool = False,
    gated: bool = False,
) -> Tensor:
    """`linear` with weights, scales and zeros in the kernels' layout (`matgptq.kernels.packing`).

    Args:
        x: float16 or bfloat16 ``(..., in_features)``.
        planes: int32, `pack_codes` of the ``bits``-wide slices; of 8-bit codes where ``resident``.
        scales: `pack_scales` of scales in the type of ``x``.
        zeros: `pack_scales` of float32 zeros, in units of 8-bit codes; None for 128.
        bias: ``(out_features,)`` in the type of ``x``.
        in_features, out_features: size of the weight, before padding.
        bits: served width, 2 to 8.
        group_size: weights along in_features that share a scale, -1 for one group a row.
        rule: slicing rule.
        resident: all eight planes are there, and the slice is taken here.
        gated: planes, scales, zeros and bias are those of two layers of ``out_features``, a multiple of 64, one after
            the other; the result is ``silu(first) * second`` of theirs (SwiGLU, arXiv 2002.05202).

    Returns:
        ``(..., out_features)`` in the type of ``x``; sums are float32.

    Raises:
        TypeError, ValueError: a type, shape, width, group size or rule does not fit.

    An eager call on a GPU goes straight to the kernels, past the dispatcher, which takes longer than all the rest. The
    op is called wherever something might want to see it (`_is_eager`).
    """
    if x.is_cuda and _is_eager(x):
        call = bind(bits, group_size, in_features, out_features, rule, resident, gated)
        return call(x, planes, scales, zeros, bias)
    return torch.ops.matgptq.packed_linear(
        x, planes, scales, zeros, bias, in_features, out_features, bits, group_size, rule, resident, gated
    )


def _is_eager(x: Tensor) -> bool:
    """Whether nothing but the kernels would see the op: no compiler, tracer, mode, transform, autograd or profiler."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not x.requires_grad
        and not _dispatch_modes()
        and not _function_modes()
        and _transform() is None
        and _trace() is None
        and not _profiled()
    )


_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _trace = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_profiled = torch._C._autograd._profiler_enabled  # type: ignore[attr-defined]


def packed_linear_at(
    x: Tensor,
    planes: Tensor,
    scales: list[Tensor],
    zeros: Tensor | None,
    bias: Tensor | None,
    width: Tensor,
    *,
    in_features: int,
    out_features: int,
    group_size: int,
    rule: str,
    resident: bool,
) -> Tensor:
    """`packed_linear` at a width that is read when it runs: code compiled once serves all widths.

    A CUDA graph still holds the width that it was captured at.

    Args:
        scales: the scales to choose from.
        width: integers ``(2,)`` on the CPU: bits, and which of ``scales`` goes with them.

    The other arguments, the result and the errors are those of `packed_linear`.
    """
    return torch.ops.matgptq.packed_linear_at(
        x, planes, scales, zeros, bias, width, in_features, out_features, group_size, rule, resident
    )


def linear_at(
    linear: Callable[..., Any],
    planes: Tensor,
    scales: list[Tensor],
    zeros: Tensor | None,
    bias: Tensor | None,
    width: Tensor,
    in_features: int,
    out_features: int,
    group_size: int,
    rule: str,
    resident: bool,
) -> Any:
    """What ``linear``, of `packed_linear`'s arguments but x, returns at the width that ``width`` holds."""
    bits, index = width.tolist()
    return linear(
        planes,
        scales[index],
        zeros,
        bias,
        in_features=in_features,
        out_features=out_features,
        bits=bits,
        group_size=group_size,
        rule=rule,
        resident=resident,
    )


def _packed_linear_at(x: Tensor, *layer: Any) -> Tensor:
    return linear_at(partial(packed_linear, x), *layer)


def packed_linear_at_fake(
    x: Tensor,
    planes: Tensor,
    scales: list[Tensor],
    zeros: Tensor | None,
    bias: Tensor | None,
    width: Tensor,
    in_features: int,
    out_features: int,
    *rest: int | str | bool,
) -> Tensor:
    """``(..., out_features)``."""
    return x.new_empty(*x.shape[:-1], out_features)


def linears_at(
    linear: Callable[..., Tensor],
    planes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    biases: list[Tensor],
    widths: list[Tensor],
    in_features: int,
    out_features: list[int],
    group_size: int,
    rule: str,
    resident: bool,
    gated: bool = False,
) -> Tensor:
    """`linear_at` of several layers: ``(..., sum(out_features))``, one after another.

    Neighbours that lie one after another in memory and are served at one width are one call of the kernel. ``scales``
    are as many of each layer, layer by layer; ``zeros`` and ``biases`` are one of each layer, or none.

    Where ``gated``, the layers are two of one size, and the result is ``silu(first) * second``.
    """
    calls = _calls_of(planes, scales, zeros, biases, widths, out_features, gated)
    kind: dict[str, Any] = {"in_features": in_features, "group_size": group_size, "rule": rule, "resident": resident}
    outputs = [linear(*operands, **kind, **own) for operands, own in calls]
    if gated and not calls[0][1]["gated"]:
        return silu_and_mul(torch.cat(outputs, -1))  # a width each
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _packed_linears_at(x: Tensor, *layers: Any) -> Tensor:
    return linears_at(partial(packed_linear, x), *layers)


def _calls_of(
    planes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    biases: list[Tensor],
    widths: list[Tensor],
    out_features: list[int],
    gated: bool,
) -> list[tuple[list[Any], dict[str, Any]]]:
    """Operands of the calls that `linears_at` makes, and what is each's own; a gated call is of all layers."""
    served = [width.tolist() for width in widths]
    each = len(scales) // len(planes)
    chosen = [scales[i * each + index] for i, (_, index) in enumerate(served)]
    operands = [planes, chosen, zeros, biases]

    def is_next(i: int) -> bool:
        return (
            served[i] == served[i - 1]
            and out_features[i - 1] % TILE == 0
            and all(follows(tensors[i - 1], tensors[i]) for tensors in operands if tensors)
        )

    starts = [i for i in range(len(planes)) if i == 0 or not is_next(i)]
    as_one = gated and len(starts) == 1
    calls = []
    for start, stop in itertools.pairwise([*starts, len(planes)]):
        outputs = out_features[0] if as_one else sum(out_features[start:stop])
        parts = [joined(tensors[start:stop]) if tensors else None for tensors in operands]
        calls.append((parts, {"out_features": outputs, "bits": served[start][0], "gated": as_one}))
    return calls


def silu_and_mul(y: Tensor) -> Tensor:
    """``silu(y[..., :N]) * y[..., N:]`` of ``(..., 2 N)``."""
    gate, up = y.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def packed_linears_at_fake(
    x: Tensor,
    planes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    biases: list[Tensor],
    widths: list[Tensor],
    in_features: int,
    out_features: list[int],
    group_size: int,
    rule: str,
    resident: bool,
    gated: bool = False,
) -> Tensor:
    """``(..., out_features)`` of all layers, or of one where ``gated``."""
    return x.new_empty(*x.shape[:-1], out_features[0] if gated else sum(out_features))


def _packed_linear_cpu(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group_size: int,
    rule: str,
    resident: bool,
    gated: bool = False,
) -> Tensor:
    """By way of the stored layout: for tests, and for a packed model on a machine without a GPU."""
    rows = 2 * out_features if gated else out_features
    codes = unpack(planes, rows, in_features)
    if not resident:
        codes <<= MAX_BITS - bits
    unit_zeros = None if zeros is None else unpack_scales(zeros, rows)
    y = linear_by_pieces(x, codes, unpack_scales(scales, rows), unit_zeros, bias, bits, group_size, rule)
    return silu_and_mul(y) if gated else y


def _packed_linear_cuda(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    group_size: int,
    rule: str,
    resident: bool,
    gated: bool = False,
) -> Tensor:
    return bind(bits, group_size, in_features, out_features, rule, resident, gated)(x, planes, scales, zeros, bias)


def _packed_linear_fake(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    *rest: int | str | bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


library.impl("packed_linear", _packed_linear_cpu, "CPU")
library.impl("packed_linear", _packed_linear_cuda, "CUDA")
torch.library.register_fake("matgptq::packed_linear", _packed_linear_fake, lib=library)
library.impl("packed_linear_at", _packed_linear_at, "CompositeExplicitAutograd")
torch.library.register_fake("matgptq::packed_linear_at", packed_linear_at_fake, lib=library)
library.impl("packed_linears_at", _packed_linears_at, "CompositeExplicitAutograd")
torch.library.register_fake("matgptq::packed_linears_at", packed_linears_at_fake, lib=library)
