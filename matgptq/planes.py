"""Bit planes: how a folder cut to ``b`` bits stores ``b`` bits a weight.

Plane ``i`` holds bit ``b - 1 - i`` of every slice, so the most significant bit comes first and the first planes of a
wider slice are the planes of its prefix. Bit ``t`` of byte ``j`` of a row belongs to weight ``8 * j + t``.
``docs/format.md`` works an example.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .slicing import MAX_BITS, check_bits, slice_codes


def pack_planes(slices: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``(out_features, in_features)`` slices into ``(bits, out_features, in_features / 8)``.

    Raises:
        TypeError: ``slices`` is not uint8.
        ValueError: not two dimensions, in_features not a multiple of 8, a width out of range, or a value of
            ``2**bits`` or more.
    """
    check_bits(bits)
    if slices.dtype != torch.uint8:
        raise TypeError(f"slices must be uint8, got {slices.dtype}")
    if slices.dim() != 2 or slices.shape[1] % 8:
        raise ValueError(f"slices must have shape (out_features, a multiple of 8), got {tuple(slices.shape)}")
    if slices.numel() and int(slices.max()) >= 2**bits:
        raise ValueError(f"slices must be below {2**bits} to fit {bits} bits, got {int(slices.max())}")
    grouped = slices.reshape(slices.shape[0], slices.shape[1] // 8, 8)
    place = 1 << torch.arange(8, dtype=torch.uint8, device=slices.device)
    return torch.stack([(((grouped >> bit) & 1) * place).sum(-1, dtype=torch.uint8) for bit in reversed(range(bits))])


def unpack_planes(planes: Tensor, bits: int | None = None) -> Tensor:
    """The first ``bits`` planes (all of them where None) as uint8 slices ``(out_features, in_features)``.

    Raises:
        TypeError: ``planes`` is not uint8.
        ValueError: not three dimensions, or fewer planes than ``bits``.
    """
    if planes.dtype != torch.uint8:
        raise TypeError(f"planes must be uint8, got {planes.dtype}")
    if planes.dim() != 3 or not 1 <= planes.shape[0] <= MAX_BITS:
        raise ValueError(f"planes must have shape (1 to 8, out_features, in_features / 8), got {tuple(planes.shape)}")
    bits = planes.shape[0] if bits is None else bits
    if not 1 <= bits <= planes.shape[0]:
        raise ValueError(f"bits must be 1 to {planes.shape[0]}, the number of planes, got {bits}")
    spread = _spread_table(str(planes.device))
    words = spread[planes[0].int()].contiguous()
    for plane in planes[1:bits]:
        words.mul_(2).add_(spread[plane.int()])  # eight slices side by side in a word: no carry leaves its byte
    return words.view(torch.uint8)


def read_slices(qweight: Tensor, bits: int, rule: str, master_bits: int) -> Tensor:
    """The ``bits``-wide slices, uint8 ``(out_features, in_features)``, of codes or of bit planes.

    ``round`` needs one plane more than it keeps, unless the planes are the slice itself.
    """
    if qweight.dim() == 2:
        return slice_codes(qweight, bits, rule, master_bits=master_bits)
    if rule == "round" and bits < qweight.shape[0]:
        return slice_codes(unpack_planes(qweight, bits + 1), bits, rule, master_bits=bits + 1)
    return unpack_planes(qweight, bits)


@functools.lru_cache(maxsize=16)
def _spread_table(device: str) -> Tensor:
    """int64 ``(256,)``: byte ``t`` of entry ``n`` is bit ``t`` of ``n`` (little endian, as all our targets are)."""
    byte = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1)
    bit = torch.arange(8, dtype=torch.uint8, device=device)
    return ((byte >> bit) & 1).contiguous().view(torch.int64).squeeze(1)
