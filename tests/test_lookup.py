"""The lower envelope against trying every code."""

import functools
import math
import re

import pytest
import torch

from matgptq import code_levels
from matgptq.quantizer.lookup import build_lookup

CASES = [
    ((8,), (1.0,)),
    ((4,), (1.0,)),
    ((2,), (0.3,)),
    ((2, 8), (1.0, 1.0)),
    ((8, 2), (0.01, 10.0)),
    ((3, 4, 8), (1.0, 1.0, 1.0)),
    ((8, 4, 3), (0.1, 0.7, 1.3)),
    ((3, 4), (1.0, 2.0)),
    ((2, 3, 4, 6, 8), (1.0, 1.0, 1.0, 1.0, 1.0)),
    ((2, 3, 4, 6, 8), (0.05, 0.5, 1.0, 3.0, 100.0)),
    ((2, 3, 4, 5, 6, 7, 8), (1.0, 1e-6, 1.0, 1e6, 1.0, 1.0, 1.0)),
]
SMALLER = [
    ((4,), (1.0,), 4),
    ((2, 4), (1.0, 1.0), 4),
    ((3, 5), (2.0, 0.5), 5),
    ((2, 3, 6), (1.0, 1.0, 1.0), 6),
    ((3, 4, 7), (1.0, 0.2, 1.0), 7),
    ((2,), (1.0,), 7),
]
EVERY = [(*case, 8) for case in CASES] + SMALLER

build_once = functools.cache(build_lookup)


def points(master_bits):
    """Random u within the codes' range, around it and far out of it, and every integer and half."""
    random = torch.Generator().manual_seed(master_bits)
    top = 2.0**master_bits
    inside = torch.rand(3000, generator=random) * (1.2 * top) - 0.1 * top
    outside = torch.randn(500, generator=random) * 20 * top
    halves = torch.arange(-8, 2 * 2**master_bits + 8) / 2
    extremes = torch.tensor([-1e30, -1e6, 0.0, -0.0, top - 1, top, 1e6, 1e30])
    return torch.cat([inside, outside, halves, extremes])


def costs(u, widths, lambdas, rule, master_bits):
    """float64 ``(len(u), 2**master_bits)``: cost of every code for every u, and how far rounding can move it.

    The term u**2, which all codes share, is left out: far out of range it would drown their differences.
    """
    u = u.double().unsqueeze(1)
    total = torch.zeros(len(u), 2**master_bits, dtype=torch.float64)
    for width, value in zip(widths, lambdas, strict=True):
        level = code_levels(width, rule, master_bits)
        total += value * (level * level - 2 * u * level)
    top = 2.0**master_bits
    return total, 1e-14 * sum(lambdas) * (top * top + 2 * u.squeeze(1).abs() * top)


@pytest.mark.parametrize("rule", ["round", "prefix"])
@pytest.mark.parametrize(("widths", "lambdas", "master_bits"), EVERY)
def test_the_chosen_code_costs_what_the_best_of_all_codes_costs(widths, lambdas, master_bits, rule):
    lookup = build_once(widths, lambdas, rule, master_bits)
    u = points(master_bits)
    every, rounding = costs(u, widths, lambdas, rule, master_bits)
    chosen = lookup.codes[lookup.segment(u)].long()
    excess = every.gather(1, chosen.unsqueeze(1)).squeeze(1) - every.min(dim=1).values
    # a u that IS a breakpoint may belong to either side: the true one lies within half a float32 spacing
    slack = 2 * sum(lambdas) * 2.0**master_bits * u.double().abs() * torch.finfo(torch.float32).eps
    at_breakpoint = torch.isin(u, lookup.breakpoints)
    assert (excess <= rounding + torch.where(at_breakpoint, slack, 0.0)).all()


@pytest.mark.parametrize("rule", ["round", "prefix"])
@pytest.mark.parametrize(("widths", "lambdas", "master_bits"), EVERY)
def test_where_one_code_is_best_it_is_chosen(widths, lambdas, master_bits, rule):
    lookup = build_once(widths, lambdas, rule, master_bits)
    u = points(master_bits)
    every, rounding = costs(u, widths, lambdas, rule, master_bits)
    two = every.topk(2, dim=1, largest=False)
    unique = (two.values[:, 1] > two.values[:, 0] + rounding) & ~torch.isin(u, lookup.breakpoints)
    reads_every_bit = max(widths) + (rule == "round") >= master_bits
    if reads_every_bit:
        assert unique.float().mean() > 0.5  # the comparison below is about most points
    chosen = lookup.codes[lookup.segment(u)].long()
    assert torch.equal(chosen[unique], two.indices[unique, 0])


@pytest.mark.parametrize("rule", ["round", "prefix"])
@pytest.mark.parametrize(("widths", "lambdas", "master_bits"), EVERY)
def test_the_mean_level_is_the_lambda_weighted_mean_over_widths(widths, lambdas, master_bits, rule):
    lookup = build_once(widths, lambdas, rule, master_bits)
    for code, got in zip(lookup.codes.tolist(), lookup.mean_levels.tolist(), strict=True):
        levels = [code_levels(width, rule, master_bits)[code].item() for width in widths]
        want = sum(v * level for v, level in zip(lambdas, levels, strict=True)) / sum(lambdas)
        assert math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-6)


@pytest.mark.parametrize("master_bits", [4, 8])
def test_one_full_width_is_round_to_nearest(master_bits):
    lookup = build_lookup((master_bits,), (1.0,), "round", master_bits)
    assert lookup.codes.tolist() == list(range(2**master_bits))
    assert lookup.breakpoints.tolist() == [code + 0.5 for code in range(2**master_bits - 1)]


@pytest.mark.parametrize("rule", ["round", "prefix"])
def test_of_codes_that_no_trained_width_tells_apart_the_one_nearest_its_level_is_taken(rule):
    lookup = build_lookup((4,), (1.0,), rule)
    assert len(lookup.codes) == 16
    levels = code_levels(4, rule)
    for code, level in zip(lookup.codes.tolist(), lookup.mean_levels.tolist(), strict=True):
        alike = (levels == level).nonzero().flatten()
        assert abs(code - level) == (alike - level).abs().min().item()


def test_scaling_every_lambda_changes_nothing():
    one, other = build_lookup((3, 4, 8), (1.0, 1.0, 1.0)), build_lookup((3, 4, 8), (8.0, 8.0, 8.0))
    assert torch.equal(one.breakpoints, other.breakpoints)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.mean_levels, other.mean_levels)


def test_the_order_of_widths_changes_nothing():
    one, other = build_lookup((3, 4, 8), (1.0, 2.0, 3.0)), build_lookup((8, 3, 4), (3.0, 1.0, 2.0))
    assert torch.equal(one.breakpoints, other.breakpoints)
    assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), ()), "widths must name at least one width, got none"),
        (((9,), (1.0,)), "widths must be an integer from 2 to 8, got 9"),
        (((1, 8), (1.0, 1.0)), "widths must be an integer from 2 to 8, got 1"),
        (((6,), (1.0,), "round", 4), "widths must be an integer from 2 to 4, got 6"),
        (((4, 4), (1.0, 1.0)), "widths must differ from one another, got (4, 4)"),
        (((4, 8), (1.0,)), "lambdas must have one value for each of the 2 widths, got 1"),
        (((4, 8), (1.0, 0.0)), "lambdas must be positive and finite, got 0.0"),
        (((4, 8), (1.0, -2.0)), "lambdas must be positive and finite, got -2.0"),
        (((4, 8), (math.nan, 1.0)), "lambdas must be positive and finite, got nan"),
        (((4, 8), (math.inf, 1.0)), "lambdas must be positive and finite, got inf"),
        (((4,), (1.0,), "nearest"), "rule must be one of round, prefix, got 'nearest'"),
        (((4,), (1.0,), "round", 9), "master_bits must be an integer from 2 to 8, got 9"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_lookup(*arguments)
