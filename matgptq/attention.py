"""Attention of one new token to a static cache, without a copy of keys and values for every query head.

Where several query heads share a key head (grouped-query attention), Transformers repeats keys and values for its
`sdpa` attention under `torch.compile`: all of the cache is read, written and read again at every step. But the queries
that share a key head may as well be the queries of several positions. With ``G`` query heads a key head,

    y[b, h, i] = softmax_j(scale * q[b, h, i] . k[b, h, j] + mask[b, j]) v[b, h, j],   i = 0 .. G - 1

is attention of ``G`` queries, all under one mask, to the cache as it is.

Under ``torch.compile`` and for few key heads the equation is left to the compiler, as sums of products: it makes a few
kernels that fill the GPU and overlap with ours (`matgptq.overlap`), where the library's has a block a key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "matgptq"  # in Transformers' register
# An 8B model on an H200, 4 bits, 2026-11-23, tokens a second: with 8 key heads 409 to 422, with 128 5019 to 4075.
_MANY_HEADS = 16
_OTHERS = ("softcap", "position_bias", "s_aux", "cache")  # options that change the equation, or are refused: not ours


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as Transformers calls it: what ``sdpa`` computes, to rounding.

    Args:
        module: the attention layer.
        query: ``(batch, heads, length, dim)``.
        key: ``(batch, key heads, cache length, dim)``.
        value: likewise.
        attention_mask: ``(batch or 1, heads or 1, length, cache length)``: True, or 0, where a query attends.
        options: ``scaling`` and what else ``sdpa`` takes.

    Returns:
        The output ``(batch, length, heads, dim)``, and None for the weights.
    """
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    plain = not options.get("dropout") and all(options.get(name) is None for name in _OTHERS)
    if length != 1 or groups == 1 or attention_mask is None or attention_mask.shape[1] != 1 or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    shared = query.reshape(batch, heads // groups, groups, dim)
    scale = options.get("scaling")
    if torch.compiler.is_compiling() and batch * key.shape[1] < _MANY_HEADS:
        output = _sums_of_products(shared, key, value, attention_mask, dim**-0.5 if scale is None else scale)
    else:
        output = torch.nn.functional.scaled_dot_product_attention(
            shared, key, value, attn_mask=attention_mask, scale=scale
        )
    return output.reshape(batch, 1, heads, output.shape[-1]), None


def _sums_of_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The equation above in float32: queries ``(batch, key heads, G, dim)``, the rest as in `attend`."""
    scores = (query.float().unsqueeze(3) * key.float().unsqueeze(2)).sum(-1) * scale
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    return (weights.unsqueeze(-1) * value.float().unsqueeze(2)).sum(3).to(value.dtype)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def attending(config: PretrainedConfig) -> Iterator[None]:
    """Has a model whose attention is ``sdpa`` use `attend` meanwhile."""
    before = config._attn_implementation
    if before != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
