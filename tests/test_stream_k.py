"""The order in which hopper.cu's blocks work with stream-K: its own source, compiled for the CPU, for every block."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from matgptq.kernels import hopper
from matgptq.kernels.hopper import HopperConfig
from matgptq.kernels.problem import Problem

SOURCE = Path(hopper.__file__).with_name("hopper.cu")
PROGRAM = """
#include <algorithm>
#include <cstdio>
#define __device__
#define __forceinline__ inline
using std::max; using std::min;
struct { unsigned x; } blockIdx, gridDim;
constexpr int STREAM_K = 1, SPLIT = 0, kSharers = 1, kTurnTiles = 1, kTurnsAtOnce = AT_ONCE;
struct Params { int split_turns, k_tiles, splits, shared_tiles, share, one_more, waves, tiles; };
int tiles_of(const Params& p) { return p.tiles; }
%s
int main(int, char** v) {
  auto number = [&](int i) { return atoi(v[i]); };
  Params p{number(1), 0, 1, number(2), number(3), number(4), number(5), number(6)};
  gridDim.x = number(7);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
    for (Work work(p); work.there(p); work = work.next(p))
      printf("[%%d,%%d,%%d,%%d]\\n", blockIdx.x, work.tile, work.first_turn, work.turns);
}
"""


@pytest.fixture(scope="module", params=[1, 2])
def order(request, tmp_path_factory):
    """The pieces of work of all blocks, as the kernel makes them: (block, tile, first turn, turns) in order."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    text = SOURCE.read_text(encoding="utf-8")
    first, last = "// STREAM_K: the first of the shared turns", "// What a block's producers read"
    schedule = text[text.index(first) : text.index(last)]
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "schedule.cpp").write_text("#include <cstdlib>\n" + PROGRAM % schedule, encoding="utf-8")
    command = ["g++", "-std=c++17", "-O1", f"-DAT_ONCE={request.param}", "schedule.cpp", "-o", "schedule"]
    subprocess.run(command, cwd=folder, check=True)

    def run(problem, config, tiles, blocks):
        assert config.turns_at_once == request.param
        shares = hopper.Shares.of(problem, config, tiles, blocks)
        numbers = (config.split_turns(problem), shares.shared_tiles, shares.share, shares.one_more, shares.waves, tiles)
        command = [str(folder / "schedule"), *map(str, numbers), str(blocks)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return [tuple(json.loads(line)) for line in lines]

    run.config = HopperConfig(2, 1, 64 if request.param == 1 else 256, 1, 1, 1, stream_k=True)
    return run


@pytest.mark.parametrize("tiles", [1, 5, 40, 131, 132, 133, 140, 224, 263, 264, 300, 448])
@pytest.mark.parametrize("K", [64, 320, 4096])
def test_every_turn_is_computed_once_and_every_sum_is_collected(order, K, tiles):
    config = order.config
    problem = Problem(1, 128 * tiles, K, 4)
    all_turns = config.split_turns(problem)
    for most in (1, 2, 7, 132):
        blocks = min(most, tiles * all_turns // config.turns_at_once)
        work = order(problem, config, tiles, blocks)
        computed = [(tile, turn) for _, tile, first, turns in work for turn in range(first, first + turns)]
        assert sorted(computed) == [(tile, turn) for tile in range(tiles) for turn in range(all_turns)]
        assert all(first % config.turns_at_once == turns % config.turns_at_once == 0 for _, _, first, turns in work)
        loads = [sum(turns for block, *_, turns in work if block == b) for b in range(blocks)]
        assert max(loads) - min(loads) <= config.turns_at_once
        for b in range(blocks):
            pieces = [(tile, first, turns) for block, tile, first, turns in work if block == b]
            left = [i for i, (_, first, turns) in enumerate(pieces) if first + turns < all_turns]
            added = [i for i, (_, first, turns) in enumerate(pieces) if first > 0 and first + turns == all_turns]
            # One room for sums. Others' sums come last, those of blocks with the numbers just below.
            assert len(left) <= 1
            assert added in ([], [len(pieces) - 1])
            if added:
                tile = pieces[-1][0]
                others = sorted({block for block, other, *_ in work if other == tile and block != b})
                assert others == list(range(b - len(others), b))
