"""Tile choice: pure, total, and never more than a GPU has."""

import itertools

import pytest

from matgptq.kernels.tiles import Problem, can_implement, choose, grid, inbox_offset, shared_bytes, supports

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
    for (N, K), bits, M, (resident, rule) in itertools.product(SHAPES, range(2, 9), (1, 3, 8, 16, 17, 64, 500), ways):
        for group_size, zeros in itertools.product((-1, 16, 48, 32, 64, 128), (False, True)):
            if group_size > 0 and K % group_size:
                continue
            problem = Problem(M, N, K, bits, "float16", group_size, resident, rule, zeros, sm)
            config = choose(problem)
            assert supports(config, problem), (problem, config)
            blocks = grid(problem, config)
            assert blocks[0] == config.splits
            assert blocks[1] * config.tokens >= M
            assert blocks[2] * config.rows >= N
            assert inbox_offset(problem, config) % 16 == 0
            assert shared_bytes(problem, config) <= 227 * 1024


def test_can_implement_says_why():
    assert can_implement(Problem(1, 64, 64, 4, group_size=64)) == (True, "")
    for problem, reason in [
        (Problem(1, 64, 100, 4), "in_features must be a positive multiple of 16, got 100"),
        (Problem(1, 64, 128, 9), "bits must be 2..8, got 9"),
        (
            Problem(1, 64, 128, 4, group_size=24),
            "group_size must be -1 or a multiple of 16 that divides in_features 128, got 24",
        ),
        (Problem(1, 64, 128, 4, sm=75), "the GPU must be of compute capability 8.0 or newer, got 7.5"),
        (Problem(1, 64, 128, 4, dtype="float32"), "dtype must be float16 or bfloat16, got float32"),
    ]:
        assert can_implement(problem) == (False, reason)
        with pytest.raises(ValueError, match="must be"):
            choose(problem)
