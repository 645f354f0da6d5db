"""The column loop against a slow GPTQ written straight from its equations, and its promises one by one."""

import pytest
import torch

from matgptq.quantizer import Method, quantize_weight
from matgptq.slicing import code_levels, dequantize


def problem(out_features=24, in_features=128, seed=0, tokens=400):
    """A weight and the Hessian of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    mix = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    x = torch.randn(tokens, in_features, generator=generator) @ (mix + torch.eye(in_features))
    x[:, ::17] *= 8
    return weight, 2 / tokens * x.T @ x


def decode(result, bits, method):
    scales = result.own_scales.get(bits, result.scales)
    weight = dequantize(
        result.codes,
        scales,
        result.zeros,
        bits=bits,
        group_size=method.group_size,
        rule=method.rule,
        master_bits=method.master_bits,
    )
    if result.perm is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, result.perm.long(), weight)


def output_error(weight, quantized, hessian):
    error = (weight - quantized).double()
    return ((error @ hessian.double()) * error).sum().item()


def slow_gptq(weight, hessian, method):
    """Codes by GPTQ's equations in float64: one column at a time over the whole matrix, all codes tried."""
    rows, columns = weight.shape
    group = columns if method.group_size == -1 else method.group_size
    damped = hessian.double() + method.damping * hessian.double().diagonal().mean() * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    levels = torch.stack([code_levels(b, method.rule, method.master_bits) for b in method.widths])
    lambdas = torch.tensor(method.weights, dtype=torch.float64)
    mean = (lambdas[:, None] * levels).sum(0) / lambdas.sum()
    work = weight.double().clone()
    ranges = weight.double() if method.static_groups else work
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    steps = 2**method.master_bits - 1
    for k in range(columns):
        if k % group == 0:
            part = ranges[:, k : k + group]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            if method.sym:
                high = torch.maximum(high, -low)
                low = -high
            scale = ((high - low) / steps).to(method.scale_dtype).double()
            zero = torch.full_like(scale, (steps + 1) / 2) if method.sym else (-low / scale).round().clamp(0, steps)
        u = work[:, k] / scale + zero
        cost = (lambdas[:, None, None] * (u[None, :, None] - levels[:, None, :]) ** 2).sum(0)
        codes[:, k] = cost.argmin(1).to(torch.uint8)
        error = (work[:, k] - scale * (mean[codes[:, k].long()] - zero)) / factor[k, k]
        work[:, k + 1 :] -= error[:, None] * factor[k, k + 1 :]
    return codes


@pytest.mark.parametrize(
    "method",
    [
        Method(group_size=32),
        Method(group_size=32, static_groups=False),
        Method(group_size=-1, widths=(2, 4, 8), lambdas=(1.0, 2.0, 5.0)),
        Method(group_size=64, rule="prefix", sym=False, static_groups=False, damping=0.01),
        Method(group_size=128, widths=(4,), master_bits=4),
    ],
    ids=["static", "dynamic", "weighted-rows", "prefix-asym", "plain-gptq"],
)
def test_codes_are_those_of_the_equations(method):
    weight, hessian = problem()
    result = quantize_weight(weight, hessian, method)
    want = slow_gptq(weight, hessian, method)
    # float32 against float64: a weight on the edge between two codes may fall on either side
    assert (result.codes != want).float().mean() < 0.01
    levels = code_levels(method.widths[0], method.rule, method.master_bits)
    assert torch.equal(levels[result.codes.long()[:, 0]], levels[want.long()[:, 0]])


@pytest.mark.parametrize("group_size", [16, 48, 64, 96, 192, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_feedback_beats_round_to_nearest(group_size, sym):
    weight, hessian = problem(in_features=192)
    gptq = Method(widths=(3,), master_bits=3, group_size=group_size, sym=sym)
    nearest = Method(widths=(3,), master_bits=3, group_size=group_size, sym=sym, feedback=False)
    better = decode(quantize_weight(weight, hessian, gptq), 3, gptq)
    worse = decode(quantize_weight(weight, None, nearest), 3, nearest)
    assert output_error(weight, better, hessian) < 0.8 * output_error(weight, worse, hessian)


def test_round_to_nearest_is_within_half_a_step():
    weight, _ = problem()
    method = Method(group_size=32, feedback=False, sym=False)
    result = quantize_weight(weight, None, method)
    grouped = weight.view(24, 4, 32)
    steps = (decode(result, 8, method).view(24, 4, 32) - grouped).abs() / result.scales.float().unsqueeze(-1)
    ends = (grouped == grouped.amin(-1, keepdim=True)) | (grouped == grouped.amax(-1, keepdim=True))
    assert (steps[~ends] <= 0.5 + 1e-3).all()
    assert (steps[ends] <= 1).all()  # the zero is rounded and the scale is float16: the range may be a step short


def test_reported_error_is_the_error_of_the_output():
    weight, hessian = problem()
    method = Method(group_size=64, own_scales=(3, 4))
    result = quantize_weight(weight, hessian, method, report_widths=(8, 4, 3, 2))
    for bits in (8, 4, 3, 2):
        want = output_error(weight, decode(result, bits, method), hessian) / output_error(weight, 0 * weight, hessian)
        assert result.errors[bits] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("static_groups", [True, False])
def test_act_order_helps_and_stores_its_permutation_where_groups_follow_it(static_groups):
    weight, hessian = problem()
    options = {"group_size": 32, "widths": (3,), "master_bits": 3, "static_groups": static_groups}
    plain, ordered = Method(**options), Method(**options, act_order=True)
    result = quantize_weight(weight, hessian, ordered)
    if static_groups:
        assert result.perm is None
    else:
        assert torch.equal(result.perm.long(), hessian.diagonal().argsort(descending=True, stable=True))
    without = output_error(weight, decode(quantize_weight(weight, hessian, plain), 3, plain), hessian)
    assert output_error(weight, decode(result, 3, ordered), hessian) < without


def test_static_groups_keep_the_range_of_the_weights():
    weight, hessian = problem()
    scales = [quantize_weight(weight, hessian, Method(group_size=32, act_order=a)).scales for a in (True, False)]
    nearest = quantize_weight(weight, None, Method(group_size=32, feedback=False)).scales
    assert torch.equal(scales[0], nearest)
    assert torch.equal(scales[1], nearest)


def test_own_scales_are_the_least_squares_ones():
    weight, hessian = problem()
    method = Method(group_size=32, own_scales=(3, 2))
    result = quantize_weight(weight, hessian, method)
    shared = Method(group_size=32, own_scales=())
    for bits in (3, 2):
        fitted = output_error(weight, decode(result, bits, method), hessian)
        assert fitted < output_error(weight, decode(quantize_weight(weight, hessian, shared), bits, shared), hessian)
        for factor in (0.9, 1.1):  # other scales are worse, up to what the ridge allows
            moved = decode(result, bits, method)
            moved[:, :32] *= factor
            assert output_error(weight, moved, hessian) > fitted


def test_dead_columns_are_kept_and_disturb_nothing():
    weight, hessian = problem()
    hessian[[3, 70]] = 0
    hessian[:, [3, 70]] = 0
    method = Method(group_size=64)
    result = quantize_weight(weight, hessian, method)
    assert result.damping == method.damping
    # no calibration token reached them: they are rounded as they are, not thrown away
    step = result.scales.float()[:, [0, 1]] * 16
    assert ((decode(result, 8, method) - weight)[:, [3, 70]].abs() <= step).all()


def test_singular_hessian_is_damped_until_it_works():
    weight, _ = problem(in_features=64)
    x = torch.ones(2, 64) * 3e4
    hessian = x.T @ x
    result = quantize_weight(weight, hessian, Method(group_size=32, damping=1e-12))
    assert result.damping > 1e-12
    assert torch.isfinite(result.scales).all()


def test_a_hessian_that_no_damping_saves_is_an_error():
    weight, hessian = problem(in_features=64)
    with pytest.raises(ValueError, match=r"hessian must be positive definite .* \(layer 7\)"):
        quantize_weight(weight, hessian - 1e9 * (1 - torch.eye(64)), Method(group_size=32), where="layer 7")


def test_zero_weights_and_tiny_weights_survive():
    weight, hessian = problem(in_features=64)
    weight[:, :32] = 0
    weight[0, 32:] = 1e-9
    method = Method(group_size=32, own_scales=(4, 3, 2))
    result = quantize_weight(weight, hessian, method)
    for bits in (8, 4, 3, 2):
        decoded = decode(result, bits, method)
        assert torch.isfinite(decoded).all()
        assert (decoded[1:, :32].abs() < 0.05).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": ()}, "widths must name at least one width"),
        ({"widths": (3, 3)}, "widths must differ"),
        ({"widths": (9,)}, "widths must be an integer from 2 to 8, got 9"),
        ({"widths": (8,), "master_bits": 4}, "widths must be an integer from 2 to 4, got 8"),
        ({"lambdas": (1.0,)}, "lambdas must have one value for each of the 3 widths, got 1"),
        ({"lambdas": (1.0, 0.0, 1.0)}, "lambdas must be positive and finite, got 0.0"),
        ({"damping": 0.0}, "damping must be positive, got 0.0"),
        ({"rule": "floor"}, "rule must be one of round, prefix, got 'floor'"),
        ({"own_scales": (9,)}, "own_scales must be an integer from 2 to 8, got 9"),
    ],
)
def test_bad_methods_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Method(**change)


@pytest.mark.parametrize(
    ("weight", "hessian", "message"),
    [
        (torch.ones(4), torch.eye(4), "weight must have two dimensions"),
        (torch.ones(4, 100), torch.eye(100), "group_size must divide in_features = 100, got 32"),
        (torch.ones(4, 64), torch.eye(32), r"hessian must have shape \(64, 64\), got \(32, 32\)"),
        (torch.ones(4, 64), None, "hessian must be given"),
        (torch.full((4, 64), float("nan")), torch.eye(64), "weight must be finite"),
        (torch.ones(4, 64), torch.full((64, 64), float("inf")), "hessian must be finite"),
        (torch.full((4, 64), 1e9), torch.eye(64), "scales must fit torch.float16, got 7.84e"),
    ],
)
def test_bad_input_is_refused(weight, hessian, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(weight, hessian, Method(group_size=32), where="some layer")
