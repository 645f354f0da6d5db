"""Bit planes: the bytes against a loop over single bits."""

import pytest
import torch

from matgptq import slice_codes
from matgptq.planes import pack_planes, unpack_planes

WIDTHS = range(2, 9)


def random_slices(bits, rows=5, columns=48, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=random)


def plain_planes(slices, bits):
    """Plane i, row r, byte j: bit t of the byte is bit (bits - 1 - i) of slice 8 j + t."""
    rows = slices.tolist()
    planes = []
    for plane in range(bits):
        planes.append([])
        for row in rows:
            packed = [0] * (len(row) // 8)
            for column, value in enumerate(row):
                if value & (1 << (bits - 1 - plane)):
                    packed[column // 8] |= 1 << (column % 8)
            planes[-1].append(packed)
    return planes


@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_are_those_of_a_loop_over_bits(bits):
    slices = random_slices(bits)
    planes = pack_planes(slices, bits)
    assert planes.dtype == torch.uint8
    assert planes.tolist() == plain_planes(slices, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_slice_value_comes_back_from_every_place(bits):
    values = torch.arange(2**bits, dtype=torch.uint8)
    slices = torch.stack([values.roll(shift).repeat(2) for shift in range(8)])  # each value at each place of a byte
    assert torch.equal(unpack_planes(pack_planes(slices, bits)), slices)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("columns", [8, 16, 136])
def test_round_trip_of_ragged_shapes(rows, columns):
    slices = random_slices(3, rows, columns)
    planes = pack_planes(slices, 3)
    assert planes.shape == (3, rows, columns // 8)
    assert torch.equal(unpack_planes(planes), slices)


@pytest.mark.parametrize("stored_bits", WIDTHS)
def test_the_first_planes_are_the_planes_of_the_prefix(stored_bits):
    slices = random_slices(stored_bits)
    planes = pack_planes(slices, stored_bits)
    for bits in range(2, stored_bits + 1):
        prefix = slice_codes(slices, bits, "prefix", master_bits=stored_bits)
        assert torch.equal(planes[:bits], pack_planes(prefix, bits))
        assert torch.equal(unpack_planes(planes, bits), prefix)


def test_strided_tensors_are_packed_and_unpacked_as_their_values():
    slices = random_slices(4, rows=16, columns=24)
    planes = pack_planes(slices, 4)
    assert torch.equal(pack_planes(slices.t().contiguous().t(), 4), planes)
    assert torch.equal(unpack_planes(planes.transpose(1, 2).contiguous().transpose(1, 2)), slices)
    assert torch.equal(unpack_planes(planes[:, 3:9]), slices[3:9])


def test_unpacking_leaves_the_planes_alone():
    planes = pack_planes(random_slices(4), 4)
    before = planes.clone()
    unpack_planes(planes).zero_()
    unpack_planes(planes, 2)
    assert torch.equal(planes, before)


SLICES = torch.full((2, 16), 15, dtype=torch.uint8)
PLANES = torch.zeros(4, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_planes(SLICES.int(), 4), TypeError, "slices must be uint8, got torch.int32"),
        (
            lambda: pack_planes(SLICES[0], 4),
            ValueError,
            "slices must have shape (out_features, a multiple of 8), got (16,)",
        ),
        (
            lambda: pack_planes(SLICES[:, :12], 4),
            ValueError,
            "slices must have shape (out_features, a multiple of 8), got (2, 12)",
        ),
        (lambda: pack_planes(SLICES, 3), ValueError, "slices must be below 8 to fit 3 bits, got 15"),
        (lambda: pack_planes(SLICES, 9), ValueError, "bits must be an integer from 2 to 8, got 9"),
        (lambda: pack_planes(SLICES * 0, 0), ValueError, "bits must be an integer from 2 to 8, got 0"),
        (lambda: unpack_planes(PLANES.int()), TypeError, "planes must be uint8, got torch.int32"),
        (
            lambda: unpack_planes(PLANES[0]),
            ValueError,
            "planes must have shape (1 to 8, out_features, in_features / 8), got (2, 2)",
        ),
        (
            lambda: unpack_planes(PLANES.repeat(3, 1, 1)),
            ValueError,
            "planes must have shape (1 to 8, out_features, in_features / 8), got (12, 2, 2)",
        ),
        (lambda: unpack_planes(PLANES, 5), ValueError, "bits must be 1 to 4, the number of planes, got 5"),
        (lambda: unpack_planes(PLANES, 0), ValueError, "bits must be 1 to 4, the number of planes, got 0"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
