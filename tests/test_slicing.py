"""The definition: slices and weights against plain Python integers and floats."""

import pytest
import torch

from matgptq import code_levels, dequantize, slice_codes
from matgptq.slicing import group_count

RULES = ("round", "prefix")
MASTER_BITS = (4, 5, 6, 7, 8)
WIDTH_PAIRS = [(master, bits) for master in MASTER_BITS for bits in range(2, master + 1)]


def plain_slice(code, bits, rule, master_bits):
    """The design's equations in Python integers."""
    dropped = master_bits - bits
    if dropped == 0:
        return code
    if rule == "prefix":
        return code // 2**dropped
    half = code // 2 ** (dropped - 1) % 2
    return min(code // 2**dropped + half, 2**bits - 1)


def plain_level(code, bits, rule, master_bits):
    """The value, in code units, that a code stands for at a width."""
    step = 2 ** (master_bits - bits)
    sliced = plain_slice(code, bits, rule, master_bits)
    return (sliced + 0.5) * step - 0.5 if rule == "prefix" else float(sliced * step)


def all_codes(master_bits):
    return torch.arange(2**master_bits, dtype=torch.uint8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("master_bits", "bits"), WIDTH_PAIRS)
def test_every_code_has_the_slice_of_the_integer_definition(master_bits, bits, rule):
    got = slice_codes(all_codes(master_bits), bits, rule, master_bits=master_bits)
    assert got.dtype == torch.uint8
    assert got.tolist() == [plain_slice(c, bits, rule, master_bits) for c in range(2**master_bits)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("master_bits", "bits"), WIDTH_PAIRS)
def test_every_code_has_the_level_of_the_definition(master_bits, bits, rule):
    got = code_levels(bits, rule, master_bits)
    assert got.dtype == torch.float64
    assert got.tolist() == [plain_level(c, bits, rule, master_bits) for c in range(2**master_bits)]


def test_slices_of_the_design_differ_from_the_top_nibble_for_47_percent_of_codes():
    codes = all_codes(8)
    differ = (slice_codes(codes, 4) != codes >> 4).sum().item()
    assert differ == 120  # of 256


@pytest.mark.parametrize(("master_bits", "bits"), WIDTH_PAIRS)
def test_a_prefix_of_a_prefix_is_the_prefix(master_bits, bits):
    codes = all_codes(master_bits)
    wide = slice_codes(codes, bits, "prefix", master_bits=master_bits)
    for narrower in range(2, bits + 1):
        twice = slice_codes(wide, narrower, "prefix", master_bits=bits)
        assert torch.equal(twice, slice_codes(codes, narrower, "prefix", master_bits=master_bits))


def test_a_slice_of_a_rounded_slice_is_another_slice():
    codes = all_codes(8)
    twice = slice_codes(slice_codes(codes, 4), 2, master_bits=4)
    assert not torch.equal(twice, slice_codes(codes, 2))


@pytest.mark.parametrize(("master_bits", "bits"), WIDTH_PAIRS)
def test_a_prefix_level_is_the_mean_of_the_codes_that_share_the_slice(master_bits, bits):
    slices = slice_codes(all_codes(master_bits), bits, "prefix", master_bits=master_bits).tolist()
    levels = code_levels(bits, "prefix", master_bits).tolist()
    for code, sliced in enumerate(slices):
        sharing = [other for other, s in enumerate(slices) if s == sliced]
        assert levels[code] == sum(sharing) / len(sharing)


def test_slicing_keeps_the_shape_and_leaves_the_codes_alone():
    codes = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    before = codes.clone()
    for bits in range(2, 9):
        sliced = slice_codes(codes, bits)
        assert sliced.shape == codes.shape
        sliced.zero_()
        assert torch.equal(codes, before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["sym", "uint8 zeros", "float zeros"])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 48, 64, 128])
def test_weights_are_those_of_a_float64_loop(group_size, kind, rule):
    rows, columns = 3, 384
    random = torch.Generator().manual_seed(group_size)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=random)
    width = columns if group_size == -1 else group_size
    scales = torch.rand(rows, columns // width, generator=random).half()
    zeros = torch.randint(0, 256, scales.shape, dtype=torch.uint8, generator=random)
    if kind == "float zeros":
        zeros = zeros.half() + 0.125
    for bits in range(2, 9):
        chosen = None if kind == "sym" else zeros
        got = dequantize(codes, scales, chosen, bits=bits, group_size=group_size, rule=rule)
        want = []
        for row in range(rows):
            for column in range(columns):
                zero = 128.0 if chosen is None else chosen[row, column // width].item()
                level = plain_level(codes[row, column].item(), bits, rule, 8)
                want.append(scales[row, column // width].item() * (level - zero))
        assert got.dtype == torch.float32
        # the difference is exact and the product is rounded once: the nearest float32, nothing less
        assert torch.equal(got, torch.tensor(want, dtype=torch.float64).float().view(rows, columns))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("master_bits", [4, 5, 6, 7])
def test_zero_is_the_middle_code_of_a_smaller_master_width(master_bits, rule):
    codes = all_codes(master_bits).view(1, -1)
    got = dequantize(codes, torch.ones(1, 1), bits=master_bits, group_size=-1, rule=rule, master_bits=master_bits)
    assert got[0].tolist() == [code - 2.0 ** (master_bits - 1) for code in range(2**master_bits)]


def test_group_count_counts_groups():
    assert [group_count(384, size) for size in (-1, 16, 48, 384)] == [1, 24, 8, 1]


CODES = torch.zeros(2, 64, dtype=torch.uint8)
SCALES = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: slice_codes(CODES.int(), 4), TypeError, "codes must be uint8, got torch.int32"),
        (lambda: slice_codes(CODES, 1), ValueError, "bits must be an integer from 2 to 8, got 1"),
        (lambda: slice_codes(CODES, 9), ValueError, "bits must be an integer from 2 to 8, got 9"),
        (lambda: slice_codes(CODES, 4.0), ValueError, "bits must be an integer from 2 to 8, got 4.0"),
        (lambda: slice_codes(CODES, True), ValueError, "bits must be an integer from 2 to 8, got True"),
        (lambda: slice_codes(CODES, 6, master_bits=5), ValueError, "bits must be an integer from 2 to 5, got 6"),
        (lambda: slice_codes(CODES, 4, master_bits=9), ValueError, "master_bits must be an integer from 2 to 8, got 9"),
        (lambda: slice_codes(CODES, 4, "floor"), ValueError, "rule must be one of round, prefix, got 'floor'"),
        (
            lambda: dequantize(CODES[0], SCALES, bits=4, group_size=32),
            ValueError,
            "codes must have shape (out_features, in_features), neither 0, got (64,)",
        ),
        (
            lambda: dequantize(CODES[:0], SCALES[:0], bits=4, group_size=32),
            ValueError,
            "codes must have shape (out_features, in_features), neither 0, got (0, 64)",
        ),
        (
            lambda: dequantize(CODES, SCALES.t()[:1], bits=4, group_size=32),
            ValueError,
            "scales must have shape (2, 2), got (1, 2)",
        ),
        (
            lambda: dequantize(CODES, SCALES, SCALES[:, :1], bits=4, group_size=32),
            ValueError,
            "zeros must have shape (2, 2), got (2, 1)",
        ),
        (
            lambda: dequantize(CODES, SCALES, bits=4, group_size=48),
            ValueError,
            "group_size must divide in_features = 64, got 48",
        ),
        *(
            (
                lambda size=size: dequantize(CODES, SCALES, bits=4, group_size=size),
                ValueError,
                f"group_size must be -1 or a positive multiple of 16, got {size!r}",
            )
            for size in (0, 24, -2, 32.0, -1.0, True)
        ),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
