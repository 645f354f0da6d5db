"""The packed layout, bit for bit, against a plain-Python decoder."""

import pytest
import torch

from matgptq import slice_codes
from matgptq.kernels.packing import pack_codes, pack_scales, unpack, unpack_scales


def code_at(planes: list, bits: int, row: int, k: int) -> int:
    """The layout spelt out: the code of one weight from nested lists of words."""
    tile_row, row = divmod(row, 64)
    r, row = divmod(row, 16)
    h, g = divmod(row, 8)
    tile_k, k = divmod(k, 64)
    j, k = divmod(k, 32)
    half, k = divmod(k, 16)
    u, k = divmod(k, 8)
    t, v = divmod(k, 2)

    def bit(plane: int, position: int) -> int:
        return (planes[tile_row][tile_k][plane][4 * g + t][r] >> position) & 1

    base = 16 * v + 8 * u + 4 * h
    code = 2 * bit(j, base + 3 - 2 * half) + bit(j, base + 2 - 2 * half)
    for plane in range(2, bits):
        code = 2 * code + bit(plane, base + 3 - 2 * half - j)
    return code


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(64, 64), (70, 144), (1, 16), (192, 576)])
def test_planes_hold_the_codes(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    planes = pack_codes(codes, bits)
    words = planes.tolist()
    for row in {0, shape[0] // 2, shape[0] - 1}:
        assert [code_at(words, bits, row, k) for k in range(shape[1])] == codes[row].tolist()
    assert torch.equal(unpack(planes, *shape), codes)


@pytest.mark.parametrize("bits", range(2, 8))
def test_first_planes_are_the_prefix(bits):
    codes = torch.randint(0, 256, (130, 80), dtype=torch.uint8)
    prefix = slice_codes(codes, bits, "prefix")
    assert torch.equal(pack_codes(codes, 8)[:, :, :bits], pack_codes(prefix, bits))


def test_large_matrices_are_packed_in_parts(monkeypatch):
    codes = torch.randint(0, 256, (200, 100), dtype=torch.uint8)
    whole = pack_codes(codes, 8)
    monkeypatch.setattr("matgptq.kernels.packing._CHUNK", 1)
    assert torch.equal(pack_codes(codes, 8), whole)


@pytest.mark.parametrize("rows", [1, 64, 200])
def test_scales_keep_a_tile_together(rows):
    scales = torch.randn(rows, 3)
    packed = pack_scales(scales)
    assert packed.shape == (-(-rows // 64), 3, 64)
    assert torch.equal(unpack_scales(packed, rows), scales)
    row = rows - 1
    slot = row % 8 * 8 + row // 16 % 4 * 2 + row // 8 % 2
    assert torch.equal(packed[row // 64, :, slot], scales[row])


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match=r"codes must be torch\.uint8"):
        pack_codes(torch.zeros(4, 16), 4)
    with pytest.raises(ValueError, match=r"bits must be 2\.\.8, got 9"):
        pack_codes(torch.zeros(4, 16, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="must have shape"):
        unpack(torch.zeros(1, 1, 4, 32, 4, dtype=torch.int32), 65, 16)
