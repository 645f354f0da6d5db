"""``torch.ops.matgptq.linear``: schema, checks, fake and the implementation in plain torch.

    y = x W^T + bias,        W = scales * (level(codes, bits) - zeros)        (`matgptq.slicing`)

The plain implementation decodes a few rows of ``W`` at a time, so that the decoded piece stays in the cache and no
float copy of the weights ever exists. It multiplies and accumulates in float32 whatever the type of ``x``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .planes import read_slices
from .slicing import MIN_BITS, check_bits, check_rule, group_count, level_terms

PIECE = 1 << 18  # weights decoded at a time: 1 MiB of float32, within a core's L2
ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)

library = torch.library.Library("matgptq", "DEF")
library.define(
    "linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, "
    'str rule="round", int master_bits=8) -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    rule: str = "round",
    master_bits: int = 8,
) -> Tensor:
    """Linear layer with a nested quantised weight, ``y = x W^T + bias`` at the width ``bits``.

    Args:
        x: float16, bfloat16 or float32 ``(..., in_features)``; any leading dimensions, none and empty ones too.
        qweight: uint8; codes ``(out_features, in_features)``, or the bit planes of one slice
            ``(stored_bits, out_features, in_features / 8)`` (`matgptq.planes`).
        scales: floating point ``(out_features, in_features / group_size)``.
        zeros: uint8 or floating point, same shape, in code units; None for ``2**(master_bits - 1)``.
        bias: floating point ``(out_features,)``.
        bits: served width. From planes: ``stored_bits``, and with ``prefix`` any smaller width too.
        group_size: weights along in_features that share a scale, -1 for one group a row.
        rule: slicing rule, ``"round"`` or ``"prefix"``.
        master_bits: width of the codes before slicing.

    Returns:
        ``(..., out_features)`` in the type of ``x``; products and sums are float32.

    Raises:
        TypeError: a tensor has a type that is not listed here.
        ValueError: a shape, width, group size or rule does not fit.
    """
    return torch.ops.matgptq.linear(x, qweight, scales, zeros, bias, bits, group_size, rule, master_bits)


def _check(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    rule: str,
    master_bits: int,
) -> int:
    """Raise unless the arguments of `linear` fit together; return out_features."""
    check_rule(rule)
    check_bits(master_bits, name="master_bits")
    check_bits(bits, most=master_bits)
    if x.dtype not in ACTIVATIONS:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if qweight.dtype != torch.uint8:
        raise TypeError(f"qweight must be uint8, got {qweight.dtype}")
    if qweight.dim() == 2:
        out_features, in_features = qweight.shape
    elif qweight.dim() == 3:
        stored_bits, out_features, in_features = qweight.shape[0], qweight.shape[1], qweight.shape[2] * 8
        if not MIN_BITS <= stored_bits <= master_bits:  # no check_bits: this may be a symbolic size
            raise ValueError(f"qweight must have {MIN_BITS} to {master_bits} bit planes, got {stored_bits}")
        if not servable(bits, stored_bits, rule, master_bits):
            raise ValueError(unservable(bits, stored_bits, rule))
    else:
        raise ValueError(f"qweight must be codes (2 dimensions) or bit planes (3), got {tuple(qweight.shape)}")
    if in_features == 0:
        raise ValueError(f"qweight must have columns, got {tuple(qweight.shape)}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape (..., {in_features}), got {tuple(x.shape)}")
    shape = (out_features, group_count(in_features, group_size))
    for name, tensor, want in (("scales", scales, shape), ("zeros", zeros, shape), ("bias", bias, shape[:1])):
        if tensor is None:
            continue
        if not (tensor.is_floating_point() or (name == "zeros" and tensor.dtype == torch.uint8)):
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tuple(tensor.shape) != want:
            raise ValueError(f"{name} must have shape {want}, got {tuple(tensor.shape)}")
    return out_features


def servable(bits: int, stored_bits: int, rule: str, master_bits: int) -> bool:
    """Whether ``stored_bits`` leading bits of the codes hold a ``bits``-wide slice.

    Whole codes hold every slice. A slice cut by ``prefix`` holds the narrower ones; one cut by ``round`` was
    rounded once already and is only itself.
    """
    return bits == stored_bits or (bits < stored_bits and (rule == "prefix" or stored_bits == master_bits))


def unservable(bits: int, stored_bits: int, rule: str) -> str:
    """The message for a width that `servable` refuses."""
    if bits > stored_bits:
        return f"bits must be at most {stored_bits}, the stored width, got {bits}"
    return f"bits must be {stored_bits}: a slice cut by the rule {rule!r} serves its own width only, got {bits}"


@torch.no_grad()
def linear_by_pieces(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    rule: str = "round",
    master_bits: int = 8,
) -> Tensor:
    """`linear` in plain torch, a piece of the rows at a time."""
    out_features = _check(x, qweight, scales, zeros, bias, bits, group_size, rule, master_bits)
    in_features = x.shape[-1]
    tokens = x.reshape(-1, in_features).float()
    y = tokens.new_empty(*x.shape[:-1], out_features)  # no view of it is returned: autograd would refuse y += 1
    flat = y.view(tokens.shape[0], out_features)
    step, offset = level_terms(bits, rule, master_bits)
    # scale * (step * S + offset - zero) = (scale * step) * (S - centre): step is a power of two, so this is exact.
    factors = scales.float() * step
    centre: float | Tensor = (2.0 ** (master_bits - 1) - offset) / step
    if zeros is not None:
        centre = ((zeros.float() - offset) / step).unsqueeze(-1)
    rows = max(1, PIECE // in_features)
    for start in range(0, out_features, rows):
        piece = slice(start, min(start + rows, out_features))
        slices = read_slices(qweight[..., piece, :], bits, rule, master_bits)
        weights = slices.float().view(slices.shape[0], factors.shape[1], -1)
        weights.sub_(centre[piece] if isinstance(centre, Tensor) else centre).mul_(factors[piece].unsqueeze(-1))
        torch.mm(tokens, weights.view(-1, in_features).t(), out=flat[:, piece])
    if bias is not None:
        y.add_(bias.float())
    return y.to(x.dtype)


def _linear_fake(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    rule: str = "round",
    master_bits: int = 8,
) -> Tensor:
    out_features = _check(x, qweight, scales, zeros, bias, bits, group_size, rule, master_bits)
    return x.new_empty(*x.shape[:-1], out_features)


def inference_only(name: str) -> None:
    """Has a backward pass through an op of ours fail: torch would leave its gradients out, with a warning."""
    torch.library.register_autograd(f"matgptq::{name}", _backward, setup_context=_keep, lib=library)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Fails when it runs, not before: compiled code may hold it as long as nothing asks for gradients."""
    others = ([None] * len(needs) if isinstance(needs, list) else None for needs in ctx.needs_input_grad[1:])
    return torch.ops.matgptq.no_gradient(grad, ctx.shape), *others


def _no_gradient(grad: Tensor, shape: list[int]) -> Tensor:
    raise RuntimeError("a MatGPTQ layer has no backward pass, it is for inference only: compute under torch.no_grad()")


def _no_gradient_fake(grad: Tensor, shape: list[int]) -> Tensor:
    return grad.new_empty(shape)


library.impl("linear", linear_by_pieces, "CompositeExplicitAutograd")
torch.library.register_fake("matgptq::linear", _linear_fake, lib=library)


library.define("no_gradient(Tensor grad, SymInt[] shape) -> Tensor")
library.impl("no_gradient", _no_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("matgptq::no_gradient", _no_gradient_fake, lib=library)
inference_only("linear")
