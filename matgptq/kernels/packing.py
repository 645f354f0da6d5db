"""Codes to bit planes in tensor-core order, and back.

A plane tensor is int32, ``(row_tiles, k_tiles, bits, 32, 4)``: for every tile of 64 rows x 64 k and every plane, four
words for each of a warp's 32 lanes. The first ``b`` planes of a tile of 8-bit weights are the planes of their ``b``-bit
prefixes, so one 8-bit copy serves every width. Rows and columns beyond the matrix are code 0.

With ``row = 64 R + 16 r + 8 h + g`` and ``k = 64 C + 32 j + 16 l + 8 u + 2 t + v``, a weight lies in tile ``[R, C]``,
lane ``4 g + t``, word ``r``, at

    planes 0 and 1:  plane j holds the code's two top bits at bits 16 v + 8 u + 4 h + 2 - 2 l and the one above
    plane i > 1:     bit (bits - 1 - i) of the code, at bit 16 v + 8 u + 4 h + 3 - 2 l - j

(planes 0 and 1 split k, not the two bits: low widths then need no merging). Scales and zeros are laid out alike, the
64 rows of a tile together: ``(row_tiles, groups, 64)``, a row at ``8 g + 2 r + h``. ``linear.cu`` and ``decode.cuh``
read what this writes.
"""

from collections.abc import Sequence

import torch

TILE = 64
_CHUNK = 1 << 25  # weights packed at a time: bounds the temporary memory


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes below ``2 ** bits``, uint8 (out_features, in_features), to planes.

    These are int32 (ceil(N/64), ceil(K/64), bits, 32, 4).

    >>> planes = pack_codes(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), bits=2)
    >>> tuple(planes.shape)
    (1, 1, 2, 32, 4)

    Raises TypeError for codes that are not uint8, ValueError for a width outside 2..8 or codes that are not a matrix.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be torch.uint8, got {codes.dtype}")
    if codes.dim() != 2 or codes.numel() == 0:
        raise ValueError(f"codes must be a matrix (out_features, in_features), got shape {tuple(codes.shape)}")
    rows, columns = codes.shape
    row_tiles, k_tiles = -(-rows // TILE), -(-columns // TILE)
    planes = torch.empty((row_tiles, k_tiles, bits, 32, 4), dtype=torch.int32, device=codes.device)
    step = max(1, _CHUNK // (k_tiles * TILE * TILE))
    for first in range(0, row_tiles, step):
        part = codes[first * TILE : (first + step) * TILE]
        tiles = -(-part.shape[0] // TILE)
        part = torch.nn.functional.pad(part, (0, k_tiles * TILE - columns, 0, tiles * TILE - part.shape[0]))
        planes[first : first + tiles] = _pack_tiles(part, bits, tiles, k_tiles)
    return planes


def unpack(planes: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """The codes, uint8 (out_features, in_features), that planes hold; with fewer planes than packed, their prefixes.

    Raises TypeError or ValueError for planes that ``pack_codes`` cannot have made for these sizes.
    """
    if planes.dtype != torch.int32:
        raise TypeError(f"planes must be torch.int32, got {planes.dtype}")
    row_tiles, k_tiles = -(-out_features // TILE), -(-in_features // TILE)
    bits = planes.shape[2] if planes.dim() == 5 else 0
    if tuple(planes.shape) != (row_tiles, k_tiles, bits, 32, 4) or not 2 <= bits <= 8:
        raise ValueError(
            f"planes of {out_features} x {in_features} weights must have shape ({row_tiles}, {k_tiles}, 2..8, 32, 4), "
            f"got {tuple(planes.shape)}"
        )
    shift = _bit_positions(planes.device)
    words = planes.reshape(row_tiles, k_tiles, bits, 8, 4, 4).permute(2, 0, 5, 3, 1, 4)  # R, r, g, C, t
    words = words[..., None, None, None, None, None]
    codes = torch.zeros(
        (row_tiles, 4, 8, k_tiles, 4, 2, 2, 2, 2, 2), dtype=torch.int32, device=planes.device
    )  # .. j, l, u, v, h
    for j in range(2):
        codes[..., j, :, :, :, :] = ((words[j] >> (shift[j : j + 1] - 1 + j)) & 3)[..., 0, :, :, :, :]
    for plane in range(2, bits):
        codes = (codes << 1) | ((words[plane] >> shift) & 1)
    # R, r, g, C, t, j, l, u, v, h -> R, r, h, g, C, j, l, u, t, v
    codes = codes.permute(0, 1, 9, 2, 3, 5, 6, 7, 4, 8).reshape(row_tiles * TILE, k_tiles * TILE)
    return codes[:out_features, :in_features].to(torch.uint8)


def pack_scales(values: torch.Tensor) -> torch.Tensor:
    """Lays out scales, or zeros, (out_features, groups) for the kernels: (ceil(N/64), groups, 64), rows of padding 0.

    The kernels take scales in the dtype of the activations and zeros in float32.
    """
    if values.dim() != 2:
        raise ValueError(f"values must be (out_features, groups), got shape {tuple(values.shape)}")
    rows, groups = values.shape
    tiles = -(-rows // TILE)
    values = torch.nn.functional.pad(values, (0, 0, 0, tiles * TILE - rows))
    # R, r, h, g, group -> R, group, g, r, h
    return values.view(tiles, 4, 2, 8, groups).permute(0, 4, 3, 1, 2).reshape(tiles, groups, TILE)


def unpack_scales(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """What ``pack_scales`` was given."""
    tiles, groups, _ = packed.shape
    return packed.view(tiles, groups, 8, 4, 2).permute(0, 3, 4, 2, 1).reshape(tiles * TILE, groups)[:out_features]


def follows(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether ``b`` starts in memory where ``a`` ends, so that both are rows of one tensor (`joined`)."""
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.dtype == b.dtype
        and a.shape[1:] == b.shape[1:]
        and a.is_contiguous()
        and b.is_contiguous()
        and b.storage_offset() == a.storage_offset() + a.numel()
    )


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor that ``parts`` are the rows of, in their memory; each must `follows` the one before."""
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2..8, got {bits}")


def _bit_positions(device: torch.device) -> torch.Tensor:
    """Where a weight's bit lies in its word in the planes of one bit, (j, l, u, v, h)."""
    j, half, u, v, h = torch.meshgrid(*[torch.arange(2, dtype=torch.int32, device=device)] * 5, indexing="ij")
    return 16 * v + 8 * u + 4 * h + 3 - 2 * half - j


def _pack_tiles(codes: torch.Tensor, bits: int, row_tiles: int, k_tiles: int) -> torch.Tensor:
    # R, r, h, g, C, j, l, u, t, v -> R, C, g, t, r, (j, l, u, v, h)
    codes = codes.view(row_tiles, 4, 2, 8, k_tiles, 2, 2, 2, 4, 2).permute(0, 4, 3, 8, 1, 5, 6, 7, 9, 2)
    shift = _bit_positions(codes.device)
    planes = torch.empty((row_tiles, k_tiles, bits, 8, 4, 4), dtype=torch.int32, device=codes.device)
    top = (codes >> (bits - 2)).to(torch.int32)
    for j in range(2):
        planes[:, :, j] = (top[..., j, :, :, :, :] << (shift[j] - 1 + j)).sum((-4, -3, -2, -1), dtype=torch.int32)
    for plane in range(2, bits):
        bit = ((codes >> (bits - 1 - plane)) & 1).to(torch.int32)
        planes[:, :, plane] = (bit << shift).sum((-5, -4, -3, -2, -1), dtype=torch.int32)
    return planes.view(row_tiles, k_tiles, bits, 32, 4)
