"""What the kernels compute, on a machine without a GPU: their PTX, interpreted. test_gpu.py has a GPU's tests."""

import itertools
from dataclasses import replace

import emulated
import ptx
import pytest
import torch
from emulated import Gpu, Layer, tokens

from matgptq.kernels import nvrtc
from matgptq.kernels.hopper import HopperConfig
from matgptq.kernels.many import ManyConfig
from matgptq.kernels.problem import Problem
from matgptq.kernels.stream import Config, linear_choice
from matgptq.kernels.tiles import supports

TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}
HOLDS = [(False, "round"), (True, "round"), (True, "prefix")]


@pytest.fixture
def gpu(monkeypatch):
    try:
        nvrtc._nvrtc()
    except nvrtc.CompileError as error:
        pytest.skip(str(error))
    return Gpu(monkeypatch)


def check(gpu, problem, config=None, bias=False):
    """The result is near float64's; returns the names of the kernels that made it."""
    assert config is None or supports(config, problem), (config, problem)
    gpu.races, gpu.launched = problem.sm < 90, []
    layer, x = Layer(problem, bias), tokens(problem) * 0.3
    y, want = layer.run(gpu, x, config).double(), layer.reference(x)
    error = float((y - want).norm() / want.norm())
    assert error <= TOLERANCE[problem.dtype], (problem, config, error)
    return gpu.launched


FEW = Config(1, 1, 1, 1, 4, 2, 1, 1, 8, few=True)
OLDER = [  # M, K, group_size and, if not for linear.cu, a tile
    (2, 576, 64, FEW),
    (3, 576, 16, None),
    (40, 576, -1, None),
    (70, 576, 16, ManyConfig(96, 2, 1)),
    (150, 576, 64, ManyConfig(64, 3, 2)),
]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_kernels_of_older_gpus(gpu, bits):
    sm, ways = (80, 86)[bits % 2], itertools.cycle(itertools.product(TOLERANCE, (False, True), HOLDS))
    for _ in range(5 * bits):  # each width begins elsewhere
        next(ways)
    launched = set()
    for M, K, group_size, tile in OLDER:
        dtype, zeros, (resident, rule) = next(ways)
        problem = Problem(M, 98, K, bits, dtype, group_size, resident, rule, zeros, sm)
        launched |= set(check(gpu, problem, tile, bias=M % 2 == 0))
        if bits % 2 == 0 and tile != FEW:
            launched |= set(check(gpu, replace(problem, N=128, gated=True), tile, bias=M % 2 == 1))
    assert launched == ({"few", "linear", "many"} | ({"gate"} if bits % 2 == 0 else set()))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_kernels_of_hopper(gpu, bits):
    ways = itertools.cycle(itertools.product(TOLERANCE, (False, True), HOLDS, (-1, 64, 16)))
    for _ in range(5 * bits):
        next(ways)
    launched = set()
    for M in (1, 4, 12, 24, 50, 130):
        dtype, zeros, (resident, rule), group_size = next(ways)
        problem = Problem(M, 320, 1088, bits, dtype, group_size, resident, rule, zeros)
        launched |= set(check(gpu, problem, bias=M % 4 == 0))
        if bits % 2 * 4 == M % 8:
            launched |= set(check(gpu, replace(problem, gated=True), bias=True))
    assert launched >= {"linear", "hopper"}


@pytest.mark.parametrize("bits", range(2, 9))
def test_layers_around_a_norm(gpu, bits):
    ways = itertools.cycle(itertools.product((False, True), HOLDS, (-1, 64, 128)))
    for _ in range(5 * bits):
        next(ways)
    for M, N, sm, gated, dtype in [
        (1, 208, 90, False, "bfloat16"),
        (2, 128, 90, True, "bfloat16"),
        (2, 128, 80, False, "bfloat16"),
        (2, 112, 90, False, "float16"),
        (5, 128, 90, True, "bfloat16"),
        (20, 112, 90, False, "bfloat16"),
    ]:
        zeros, (resident, rule), group_size = next(ways)
        problem = Problem(M, N, 1152, bits, dtype, group_size, resident, rule, zeros, sm)
        first = Layer(replace(problem, summed=True), bias=bits % 2 == 0)
        x, residual, norm = (tokens(replace(problem, K=size), seed) for size, seed in ((1152, 1), (N, 2), (N, 3)))
        x[-1] *= 1e-3  # a token that is small beside the others
        residual[-1] *= 1e-3
        norm = norm[0].clone()
        total, means = torch.full_like(residual, float("nan")), torch.full((M, N // 16), float("nan"))
        gpu.launched = []
        z = first.run(gpu, x, rest=(means, residual, norm, total, 1e-5))
        want = first.reference(x) + residual
        assert float((total.double() - want).norm() / want.norm()) <= TOLERANCE[dtype], problem
        mean = total.double().pow(2).mean(-1, keepdim=True) + 1e-5
        shared = M <= 2 and dtype == "bfloat16"
        assert gpu.launched[1:] == ([] if shared else ["norm"]), problem
        if shared:
            assert torch.equal(z, total * norm)
            torch.testing.assert_close(means.double().sum(-1, keepdim=True), mean, rtol=1e-5, atol=0)
        else:
            want = total.double() / mean.sqrt() * norm
            assert float((z.double() - want).norm() / want.norm()) <= TOLERANCE[dtype], problem
            assert torch.equal(means.sum(-1), torch.ones(M))

        second = Layer(replace(problem, scaled=True, gated=gated))
        z, means = tokens(problem, 4) * 8, torch.rand(M, 72)
        given = (means, 0, 0, 0, 0.0) if shared else ()
        y = second.run(gpu, z, rest=given)
        want = second.reference(z / means.double().sum(-1, keepdim=True).sqrt() if shared else z)
        assert float((y.double() - want).norm() / want.norm()) <= TOLERANCE[dtype], problem


# Tiles that `choose` takes for large layers: row tiles, words, tokens, k groups, blocks an SM, blocks of a cluster.
HOPPER_TILES = [
    HopperConfig(1, 1, 24, 4, 1, 2),
    HopperConfig(1, 1, 48, 2, 2, 2),
    HopperConfig(2, 1, 96, 1, 1, 3),
    HopperConfig(2, 1, 32, 1, 2, 1),
    HopperConfig(2, 1, 192, 1, 1, 1),
    HopperConfig(2, 1, 256, 1, 1, 1),
    HopperConfig(4, 2, 48, 1, 1, 1),
    HopperConfig(4, 2, 128, 1, 1, 1),
    HopperConfig(2, 1, 256, 1, 1, 1, pair=True),
    HopperConfig(4, 2, 128, 1, 1, 1, pair=True),
    HopperConfig(2, 1, 24, 1, 2, 1, stream_k=True),
    HopperConfig(2, 1, 192, 1, 1, 1, stream_k=True),
    HopperConfig(4, 2, 64, 1, 1, 1, stream_k=True),
    HopperConfig(1, 1, 8, 2, 2, 2, long_turns=True),
    HopperConfig(2, 1, 16, 1, 2, 1, long_turns=True),
    HopperConfig(4, 2, 64, 1, 1, 2, long_turns=True),
    HopperConfig(2, 1, 24, 1, 1, 1, stream_k=True, long_turns=True),
]


@pytest.mark.parametrize("tile", HOPPER_TILES, ids=str)
def test_tiles_of_large_layers(gpu, tile):
    check(gpu, Problem(tile.tokens + 9, 832, 640, 4, "float16", 64, resident=True), tile, bias=True)
    gated = Problem(tile.tokens + 9, 832, 640, 2, "bfloat16", 64, gated=True)
    if tile.persistent:
        check(gpu, gated, replace(tile, gated=True), bias=True)
    else:
        assert not supports(replace(tile, gated=True), gated)
    ragged = Problem(tile.tokens - 1, 300, 656, 7, "bfloat16", 16, zeros=True)
    if supports(tile, ragged):
        check(gpu, ragged, tile)


def every_kernel():
    """A problem and a tile, or None, of each kernel."""
    return [
        (Problem(2, 192, 512, 4, sm=80), None),
        (Problem(5, 192, 512, 4, sm=80), None),
        (Problem(20, 192, 512, 4, sm=80), ManyConfig(32, 3, 2)),
        (Problem(20, 192, 512, 4), None),
        (Problem(20, 192, 512, 4), HopperConfig(4, 2, 24, 1, 1, 1, stream_k=True)),
    ]


@pytest.mark.parametrize(("problem", "tile"), every_kernel())
def test_one_hot_tokens_give_the_weights_bit_for_bit(gpu, problem, tile):
    for bits in range(2, 9):
        dtype = ("float16", "bfloat16")[(bits + problem.M) % 2]
        p = replace(problem, bits=bits, dtype=dtype)
        layer, x = Layer(p), torch.zeros((p.M, p.K), dtype=emulated.DTYPES[dtype])
        columns = torch.randperm(p.K)[: p.M]
        x[torch.arange(p.M), columns] = 1
        y = layer.run(gpu, x, tile if tile is None or supports(tile, p) else linear_choice(p))
        assert torch.equal(y, layer.weight[:, columns].T.to(x.dtype)), p


@pytest.mark.parametrize(("problem", "tile"), every_kernel())
def test_a_token_does_not_depend_on_the_others(gpu, problem, tile):
    layer, x = Layer(problem), tokens(problem)
    first = layer.run(gpu, x, tile)
    others = tokens(problem, seed=5) * 50
    others[1] = x[1]
    others[0, 7] = float("nan")
    second = layer.run(gpu, others, tile)
    assert torch.equal(second[1], first[1])
    assert second[0].isnan().all()
    assert second[1:].isfinite().all()


# What a kernel must do, and what is found where it does not.
FAULTS = [
    ("many", "    __syncthreads();  // all threads' copies of this k tile", "    // ", "with no barrier between"),
    ("many", "wait_copies<STAGES - 2>();", "", "error"),
    ("many", "const int bytes = k < p.K && m + i < p.M ? 16 : 0;", "const int bytes = 16;", "global memory, outside"),
    ("many", "if (m >= p.M || n >= p.N) return;", "if (m >= p.M) return;", "error"),
    ("linear", "  __syncthreads();\n  finish(", "  finish(", "with no barrier between"),
    ("hopper", "wait(full + 8 * stage, phase);", "", "error"),
    ("hopper", "    for (int i = kLag; i > 0; --i) release(i, turns >= i);", "", "deadlock"),
]


@pytest.mark.parametrize(("name", "right", "wrong", "found"), FAULTS)
def test_faults_are_found(gpu, monkeypatch, tmp_path, name, right, wrong, found):
    folder = nvrtc._FOLDER
    source = (folder / f"{name}.cu").read_text(encoding="utf-8")
    assert source.count(right) == 1
    (tmp_path / f"{name}.cu").write_text(source.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(nvrtc, "_FOLDER", tmp_path)
    monkeypatch.setattr(emulated, "kernel", emulated.kernel.__wrapped__)
    problem, tile = {
        "many": (Problem(50, 104, 528, 4, group_size=16, sm=80), ManyConfig(32, 3, 2)),
        "linear": (Problem(5, 100, 528, 4, group_size=16, sm=80), None),
        "hopper": (Problem(300, 600, 512, 4), HopperConfig(2, 1, 64, 1, 1, 1)),
    }[name]
    with pytest.raises(AssertionError) as failure:
        check(gpu, problem, tile)
    if found != "error":
        assert isinstance(failure.value, ptx.Fault)
        failure.match(found)
