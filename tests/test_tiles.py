"""Tile choice: pure, total, and never more than a GPU has."""

import itertools
import json
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from matgptq.kernels import hopper
from matgptq.kernels.hopper import HopperConfig
from matgptq.kernels.many import ManyConfig
from matgptq.kernels.matmul import bucket, buckets
from matgptq.kernels.problem import Problem, can_implement
from matgptq.kernels.stream import Config, few_choice, fits, grid, inbox_offset, linear_choice, shared_bytes, with_chunk
from matgptq.kernels.tiles import Gate, Norm, architecture, choose, defines, gate_follows, kernels, supports

SHAPES = [
    (1, 16),
    (192, 576),
    (576, 1536),
    (4096, 4096),
    (6144, 4096),
    (8192, 8192),
    (28672, 4096),
    (4096, 14336),
    (130, 33024),
]


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120])
def test_choose_covers_every_problem(sm):
    ways = [(False, "round"), (True, "round"), (True, "prefix")]
    for (N, K), bits, M, (resident, rule) in itertools.product(
        SHAPES, range(2, 9), (1, 2, 3, 8, 16, 17, 64, 500), ways
    ):
        for group_size, zeros in itertools.product((-1, 16, 48, 32, 64, 128), (False, True)):
            if group_size > 0 and K % group_size:
                continue
            problem = Problem(M, N, K, bits, "float16", group_size, resident, rule, zeros, sm)
            few = few_choice(problem)
            assert few is None or (M <= 2 and few.few)
            if M <= 4 or (sm != 90 and M <= 32):
                assert choose(problem) == (few or linear_choice(problem))
            for config in filter(None, (few, linear_choice(problem))):
                assert supports(config, problem), (problem, config)
                blocks = grid(problem, config)
                assert blocks[0] == config.splits
                assert blocks[1] * config.tokens >= M
                assert blocks[2] * config.rows >= N
                assert inbox_offset(problem, config) % 16 == 0
                assert shared_bytes(problem, config) <= 227 * 1024


@pytest.mark.parametrize("sm", [80, 86, 90, 120])
def test_gated_problems_are_covered(sm):
    follows = 0
    shapes = [(64, 16), (192, 576), (1536, 576), (9728, 2560), (14336, 4096), (28672, 8192)]
    for (N, K), bits, M, (group_size, zeros) in itertools.product(
        shapes, range(2, 9), (1, 2, 3, 8, 16, 17, 300), ((-1, False), (16, True))
    ):
        problem = Problem(M, N, K, bits, "bfloat16", group_size, zeros=zeros, sm=sm, gated=True)
        config = choose(problem)
        if gate_follows(problem, config):
            follows += 1
            assert config == choose(problem.layer)
            assert supports(config, problem.layer)
            continue
        assert config.gated
        assert config.rows == 2 * config.outputs
        assert config.rows % 128 == 0
        assert defines(problem, config)["GATED"] == "1"
        if isinstance(config, HopperConfig):
            assert supports(config, problem)
            assert config.persistent
        else:
            assert fits(config, problem)
            assert grid(problem, config)[2] * config.outputs >= N
    assert follows < 200  # of 588
    tiles = [choose(Problem(M, 14336, 4096, 4, gated=True)) for M in (16, 64, 200, 2048)]
    assert all(tile.gated for tile in tiles)
    assert [tile.stream_k for tile in tiles] == [False, False, True, False]
    assert gate_follows(Problem(1, 12288, 4096, 8, gated=True), choose(Problem(1, 12288, 4096, 8, gated=True)))
    assert defines(Problem(1, 64, 64, 4, "bfloat16", gated=True), Gate()) == {"KERNEL": "gate", "FORMAT": "BFloat"}


@pytest.mark.parametrize("sm", [80, 90])
def test_layers_around_a_norm_are_covered(sm):
    shapes = [(1536, 576), (7168, 5120), (28672, 8192), (4096, 14336), (112, 16)]
    for (N, K), bits, M, (group_size, zeros), dtype, place in itertools.product(
        shapes,
        range(2, 9),
        (1, 2, 3, 40),
        ((-1, False), (16, True)),
        ("bfloat16", "float16"),
        ("summed", "scaled", "gated"),
    ):
        if place == "gated" and N % 64:
            continue
        where = {"summed": place == "summed", "scaled": place != "summed", "gated": place == "gated"}
        problem = Problem(M, N, K, bits, dtype, group_size, zeros=zeros, sm=sm, **where)
        config = choose(problem)
        shared = M <= 2 and dtype == "bfloat16"
        assert [type(kernel) for kernel in kernels(problem, config)] == [
            type(config),
            *([Gate] if place == "gated" and not config.gated else []),
            *([Norm] if place == "summed" and not shared else []),
        ]
        macros = defines(problem, config)
        marks = [macros.get("SUMMED", "0"), macros.get("SCALED", "0")]
        assert marks == [str(int(shared and place == "summed")), str(int(shared and place != "summed"))]
        if shared:
            assert isinstance(config, Config)
            assert fits(config, problem)
    assert defines(Problem(1, 64, 64, 4, "bfloat16", summed=True), Norm()) == {"KERNEL": "norm", "FORMAT": "BFloat"}


def test_blocks_of_a_cluster_finish_whole_means():
    problem = Problem(1, 64, 8192, 4, "bfloat16", summed=True)
    tile = with_chunk(problem, Config(1, 1, 1, 1, 8, 2, 1, 4, 0, True))
    assert fits(tile, problem)
    assert not fits(replace(tile, splits=8), problem)
    assert fits(replace(tile, splits=8), replace(problem, summed=False))


def test_what_cannot_be_before_a_norm():
    assert can_implement(Problem(1, 72, 64, 4, summed=True)) == (
        False,
        "out_features must be a multiple of 16, and not gated, before a norm, got 72",
    )


@pytest.mark.parametrize("sm", [80, 86, 89, 100, 120])
def test_many_tokens_without_wgmma(sm):
    chosen = []
    ways = [(False, "round"), (True, "round"), (True, "prefix")]
    for (N, K), bits, M, (resident, rule) in itertools.product(SHAPES, range(2, 9), (65, 128, 200, 640, 8192), ways):
        for group_size, zeros in ((-1, False), (16, True)):
            problem = Problem(M, N, K, bits, "bfloat16", group_size, resident, rule, zeros, sm)
            config = choose(problem)
            if not isinstance(config, ManyConfig):
                assert config == linear_choice(problem)
                continue
            chosen.append(config)
            assert supports(config, problem), (problem, config)
            assert config.tokens <= 96 or not (problem.rounds or (zeros and group_size == 16))
            assert architecture(problem, config) == f"sm_{sm}"
            assert defines(problem, config)["KERNEL"] == "many"
            assert gate_follows(replace(problem, N=64 * N, gated=True), config)
    assert {config.tokens for config in chosen} == {64, 96, 128}
    assert len(chosen) > 500  # of 1890
    assert not supports(replace(chosen[0], stages=20), problem)
    assert isinstance(
        choose(Problem(200, 192, 576, 4, group_size=64, sm=sm)), Config
    )  # too few rows to keep many.cu busy


def test_hopper_covers_every_problem_of_many_tokens():
    ways = [(False, "round"), (True, "round"), (True, "prefix")]
    for (N, K), bits, M, (resident, rule) in itertools.product(
        SHAPES, range(2, 9), (9, 17, 40, 64, 65, 128, 190, 256, 384, 500, 1000, 8192), ways
    ):
        for group_size, zeros in itertools.product((-1, 16, 48, 128), (False, True)):
            if group_size > 0 and K % group_size:
                continue
            problem = Problem(M, N, K, bits, "bfloat16", group_size, resident, rule, zeros)
            config = choose(problem)
            if M <= 16 and (problem.shift or group_size in (16, 48)):
                assert config == linear_choice(problem)
                continue
            assert isinstance(config, HopperConfig), problem
            assert supports(config, problem), (problem, config)
            assert hopper.shared_bytes(problem, config) <= 227 * 1024
            assert hopper.barriers_offset(problem, config) % 1024 == 0
            assert config.splits * config.split_turns(problem) * config.turn_tiles >= problem.k_tiles
            assert architecture(problem, config) == "sm_90a"
            assert defines(problem, config)["KERNEL"] == "hopper"


def test_pairs_share_x_from_4096_tokens_on():
    alone, pair = (choose(Problem(M, 8192, 8192, 4)) for M in (512, 4096))
    assert alone == replace(pair, pair=False)
    assert (alone.cluster, alone.box_tokens) == (1, 256)
    assert (pair.cluster, pair.box_tokens) == (2, 128)
    problem = Problem(4096, 8192, 8192, 4)
    of_a_stage = (hopper.shared_bytes(problem, pair) - hopper.shared_bytes(problem, alone)) // 8 + 1
    assert of_a_stage == hopper.stages(problem, pair)  # a barrier each, where a block alone has one
    for other in (
        replace(pair, splits=2),
        replace(pair, row_tiles=1, tokens=128, k_groups=2),
        replace(pair, tokens=48),
    ):
        assert not supports(other, problem)


def test_blocks_share_tiles_where_many_would_wait():
    # 544 row tiles: 272 blocks of two for 264 places, 136 of four for 132
    for M, rows in ((16, 2), (64, 4), (128, 4), (256, 2)):
        config = choose(Problem(M, 34816, 5120, 4))
        assert (config.stream_k, config.row_tiles) == (True, rows)
        assert not choose(Problem(M, 8192, 8192, 4)).stream_k
    problem = Problem(64, 34816, 5120, 4)
    config = choose(problem)
    for other in (replace(config, splits=2), replace(config, pair=True), replace(config, words=1, k_groups=2)):
        assert not supports(other, problem)


@pytest.mark.parametrize("tokens", [16, 64, 128, 256])
def test_shares_are_even_and_whole(tokens):
    config = HopperConfig(2, 1, tokens, 1, 1, 1, stream_k=True)
    for K, tiles, blocks in itertools.product((64, 192, 4096), (1, 40, 131, 132, 133, 448, 1000), (7, 132, 264)):
        problem = Problem(tokens, 128 * tiles, K, 4)
        turns = config.split_turns(problem)
        assert turns % config.turns_at_once == 0
        blocks = min(blocks, tiles * turns // config.turns_at_once)
        shares = hopper.Shares.of(problem, config, tiles, blocks)
        shared = shares.share * blocks + shares.one_more
        assert shared * config.turns_at_once == shares.shared_tiles * turns
        assert shares.share >= 1
        assert 0 <= shares.one_more < blocks
        assert shares.shared_tiles + shares.waves * blocks == tiles
        assert shares.shared_tiles < 2 * blocks or shares.waves == 0
        assert shares.left_bytes == blocks * (128 * tokens * 4 + 8)


def test_turns_are_long_where_three_fit_the_ring():
    long = set()
    for (N, K), M, bits in itertools.product(SHAPES[3:8], (8, 16, 24, 32, 64, 128, 1024), range(2, 9)):
        problem = Problem(M, N, K, bits)
        tile = choose(problem)
        if isinstance(tile, HopperConfig) and tile.long_turns:
            assert tile.turn_tiles == 2 * replace(tile, long_turns=False).turn_tiles
            assert hopper.stages(problem, tile) >= 3, (problem, tile)
            long.add((M, bits))
    assert {(16, 2), (16, 4), (32, 4), (64, 2)} <= long
    assert not {M for M, _ in long} & {128, 1024}


def test_tokens_choose_the_kernel():
    assert [few_choice(Problem(M, 8192, 8192, 4)) is not None for M in (1, 2, 3)] == [True, True, False]
    assert few_choice(Problem(1, 8192, 8192, 4, group_size=32)) is None
    assert defines(Problem(1, 8192, 8192, 4), choose(Problem(1, 8192, 8192, 4)))["KERNEL"] == "few"
    assert isinstance(choose(Problem(8, 8192, 8192, 4)), Config)
    assert isinstance(choose(Problem(4, 8192, 8192, 8)), Config)
    assert isinstance(choose(Problem(5, 8192, 8192, 8)), HopperConfig)
    assert isinstance(choose(Problem(8, 8192, 8192, 8, zeros=True)), Config)
    assert isinstance(choose(Problem(9, 8192, 8192, 4)), HopperConfig)
    assert isinstance(choose(Problem(16, 8192, 8192, 4, zeros=True)), Config)
    assert isinstance(choose(Problem(17, 8192, 8192, 4, zeros=True)), HopperConfig)
    for M, N, kernel in [(32, 28672, Config), (64, 28672, ManyConfig), (64, 4096, Config), (256, 4096, ManyConfig)]:
        assert isinstance(choose(Problem(M, N, 4096, 4, sm=80)), kernel)
    assert isinstance(choose(Problem(1000, 8192, 8192, 4, sm=80)), ManyConfig)
    assert isinstance(choose(Problem(1000, 8192, 8192, 4, sm=100)), ManyConfig)
    # three blocks that share k took 27.4 us, stream-K 20.8
    assert choose(Problem(128, 2560, 9728, 4)).stream_k
    # 80 blocks of 128 rows and tokens took 29.5 us, their k shared by 132 SMs 25.4; of 256 tokens shared 29.0
    assert choose(Problem(256, 5120, 5120, 4)) == HopperConfig(2, 1, 128, 1, 1, 1, stream_k=True)


def test_chosen_tiles_are_near_the_fastest_that_were_timed():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "h200" / "hopper_tiles.json"
    timed = defaultdict(dict)
    for run, M, N, K, bits, tile, us in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if run >= 6 and tile not in ("linear", "cublas"):
            numbers, *kinds = tile.split()
            names = {"pair": "pair", "stream-k": "stream_k", "long": "long_turns"}
            config = HopperConfig(*map(int, numbers.split(".")), **{names[kind]: True for kind in kinds})
            timed[run, Problem(M, N, K, bits)][config] = us
    of_fastest = defaultdict(list)
    for (run, problem), times in timed.items():
        chosen = choose(problem)
        if chosen in times:
            of_fastest[run].append(times[chosen] / min(times.values()))
    assert {run: len(found) > 10 for run, found in of_fastest.items()} == {6: True, 7: True, 8: True}
    for found in of_fastest.values():
        assert statistics.mean(found) < 1.02
        assert max(found) < 1.15


def test_buckets_hold_their_tokens():
    found = [bucket(M) for M in range(8193)]
    assert found[:65] == list(range(65))
    assert all(M <= held <= max(M * 1.125, M + 1) for M, held in enumerate(found))
    assert found == sorted(found)
    assert bucket(100_000) == 8192
    assert buckets(8192) == found[1:65] + [step for step in sorted(set(found)) if step > 64]
    assert len(buckets(8192)) == 64 + 8 * 7


def test_can_implement_says_why():
    assert can_implement(Problem(1, 64, 64, 4, group_size=64)) == (True, "")
    for problem, reason in [
        (Problem(1, 64, 100, 4), "in_features must be a positive multiple of 16, got 100"),
        (Problem(1, 64, 128, 9), "bits must be 2..8, got 9"),
        (
            Problem(1, 64, 128, 4, group_size=24),
            "group_size must be -1 or a multiple of 16 that divides in_features 128, got 24",
        ),
        (Problem(1, 96, 128, 4, gated=True), "out_features must be a multiple of 64 in a gated layer, got 96"),
        (Problem(1, 64, 128, 4, sm=75), "the GPU must be of compute capability 8.0 or newer, got 7.5"),
        (Problem(1, 64, 128, 4, dtype="float32"), "dtype must be float16 or bfloat16, got float32"),
    ]:
        assert can_implement(problem) == (False, reason)
        with pytest.raises(ValueError, match="must be"):
            choose(problem)
