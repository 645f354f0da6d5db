"""Calls around RMSNorm of a sum (arXiv 1910.07467), which share its work on a GPU (norm.cuh).

A transformer's layer adds what attention or the MLP returns to its residual, and normalises the sum before the next
layer. In compiled code (`matgptq.inductor.norm_linears`) the linear layer before is `summed_linear`, and the one after
`scaled_linear`:

    total = x W^T + bias + residual
    z     = total * norm                    not normalised yet
    means                                   float32, their sum is mean(total^2) + eps
    y     = z V^T / sqrt(sum of means) + bias

So they do for one or two tokens of bfloat16 on a GPU. Else z is normalised already, by norm.cu there, and means sum to
1: with more tokens that is faster, and float16 has not the range for sums that are not normalised.
``summed_linear_at`` and ``scaled_linears_at`` are the same ops at widths that are read when they run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import library
from .matmul import bind, means_of
from .op import linear_at, linears_at, packed_linear, packed_linear_at_fake, packed_linears_at_fake

library.define(
    "summed_linear_at(Tensor x, Tensor residual, Tensor norm, float eps, Tensor planes, Tensor[] scales, "
    "Tensor? zeros, Tensor? bias, Tensor width, int in_features, int out_features, int group_size, str rule, "
    "bool resident) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "scaled_linears_at(Tensor z, Tensor means, Tensor[] planes, Tensor[] scales, Tensor[] zeros, Tensor[] biases, "
    "Tensor[] widths, int in_features, int[] out_features, int group_size, str rule, bool resident, "
    "bool gated=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_BOUND = ("bits", "group_size", "in_features", "out_features", "rule", "resident", "gated")  # in the order of `bind`


def summed_linear(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, *operands: Tensor | None, **layer: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """z, total and means (above): what `scaled_linear` takes, and the sum in x's type.

    Args:
        x: ``(..., in_features)``.
        residual: ``(..., out_features)``; out_features is a multiple of 16.
        norm: ``(out_features,)``; no kernel that may still run may write it.
        eps: what is added to the mean of squares.
        operands: planes, scales, zeros and bias of `packed_linear`.
        layer: all its other arguments; it is not gated.

    Returns:
        z and total ``(..., out_features)``, means float32 ``(..., out_features / 16)``.

    Raises:
        ValueError: an argument does not fit.
    """
    if x.is_cuda:
        return bind(*(layer[name] for name in _BOUND)).summed(x, residual, norm, eps, *operands)  # type: ignore[arg-type]
    return normalised_sum(packed_linear(x, *operands, **layer), residual, norm, eps)  # type: ignore[arg-type]


def scaled_linear(z: Tensor, means: Tensor, *operands: Tensor | None, **layer: Any) -> Tensor:
    """`packed_linear` of the normalised sum, by what `summed_linear` returned.

    Args:
        z, means: of as many tokens as there were then.
        operands, layer: all arguments of `packed_linear` but the first.

    Raises:
        ValueError: an argument does not fit.
    """
    if z.is_cuda:
        return bind(*(layer[name] for name in _BOUND)).scaled(z, means, *operands)  # type: ignore[arg-type]
    return packed_linear(normalised(z, means), *operands, **layer)  # type: ignore[arg-type]


def normalised_sum(y: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `summed_linear` returns where the layer returns ``y``, normalised: ``h / sqrt(mean(h^2) + eps) * norm``.

    Types are those of Transformers' layers: the mean is float32, what is multiplied by ``norm`` rounded to y's type.
    """
    total = y + residual
    h = total.float()
    z = norm * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(y.dtype)
    means = means_of(y).zero_()
    means[..., 0] = 1
    return z, total, means


def normalised(z: Tensor, means: Tensor) -> Tensor:
    """``z / sqrt(sum of means)`` in z's type: what `scaled_linear` multiplies by."""
    return (z * torch.rsqrt(means.sum(-1, keepdim=True))).to(z.dtype)


def summed_fake(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `summed_linear` returns where the layer would return ``y``, but for the values."""
    return y, torch.empty_like(y), means_of(y)


def _summed_linear_at(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, *layer: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return linear_at(partial(summed_linear, x, residual, norm, eps, gated=False), *layer)


def _summed_linear_at_fake(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, *layer: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return summed_fake(packed_linear_at_fake(x, *layer))


def _scaled_linears_at(z: Tensor, means: Tensor, *layers: Any) -> Tensor:
    return linears_at(partial(scaled_linear, z, means), *layers)


def _scaled_linears_at_fake(z: Tensor, means: Tensor, *layers: Any) -> Tensor:
    return packed_linears_at_fake(z, *layers)


library.impl("summed_linear_at", _summed_linear_at, "CompositeExplicitAutograd")
torch.library.register_fake("matgptq::summed_linear_at", _summed_linear_at_fake, lib=library)
library.impl("scaled_linears_at", _scaled_linears_at, "CompositeExplicitAutograd")
torch.library.register_fake("matgptq::scaled_linears_at", _scaled_linears_at_fake, lib=library)
