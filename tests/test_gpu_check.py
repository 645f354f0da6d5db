"""The runner of ``make gpu-check`` and the script that compares answers, as far as they go without a GPU."""

import ctypes
import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import matgptq
from matgptq.kernels.hopper import HopperConfig
from matgptq.kernels.many import ManyConfig
from matgptq.kernels.stream import Config
from matgptq.kernels.tiles import Norm, Problem, can_implement, choose, defines, kernels, supports
from matgptq.quantizer.pipeline import quantize

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    """The module, on a machine that says it has a GPU."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check as module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "no GPU")
    return module


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
    return module.main()


def test_a_part_that_fails_does_not_stop_the_others(gpu_check, monkeypatch, tmp_path, capsys):
    def fails(options):
        raise gpu_check.Failed("3 of 9 failed")

    monkeypatch.setitem(gpu_check.PARTS, "checks", fails)
    monkeypatch.setitem(gpu_check.PARTS, "call", lambda options: "layer 4.0 us of CPU")
    assert run(gpu_check, monkeypatch, "--only", "checks", "call", "--results", tmp_path / "out") == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].split()[:2] == ["checks", "FAILED"]
    assert shown[-2].endswith("Failed: 3 of 9 failed")
    assert shown[-1].split()[:2] == ["call", "ok"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["device"] == "no GPU"
    assert {name: part["passed"] for name, part in summary["parts"].items()} == {"checks": False, "call": True}
    assert run(gpu_check, monkeypatch, "--only", "call", "--results", tmp_path / "out") == 0


def test_the_part_bench_says_how_the_points_compare(gpu_check, monkeypatch, tmp_path, capsys):
    shapes = ["--shapes", "96x64", "--group-sizes", "32", "--bits", "2", "3", "--batch-sizes", "1", "--device", "cpu"]
    arguments = ["--only", "bench", "--results", tmp_path, "--bench-options", *shapes]
    assert run(gpu_check, monkeypatch, *arguments) == 0
    assert "of 2 points" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "linear.json").read_text())["results"]) == 2


def test_ratios_are_to_the_same_point(gpu_check, monkeypatch, tmp_path, capsys):
    def measure(cases, device, progress):
        rows = [{**asdict(case), "us": case.bits * (1.5 if case.mode == "resident" else 1)} for case in cases]
        return {"results": rows}

    monkeypatch.setattr(gpu_check, "measure", measure)
    assert run(gpu_check, monkeypatch, "--only", "ratios", "--results", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "bfloat16, to 16 tokens, 1.00 (worst 1.00); bfloat16, more, 1.00 (worst 1.00); resident, to" in shown
    assert (
        "to 16 tokens, 1.50 (worst 1.50); resident, more, 1.50 (worst 1.50); groups of 64, to 16 tokens, 1.00" in shown
    )


def test_what_is_not_there_is_said(gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert run(gpu_check, monkeypatch, "--only", "sanitizer", "generate", "--results", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "NOT RUN: no compute-sanitizer on PATH" in shown
    assert "NOT RUN: no --model" in shown


def test_a_command_that_fails_is_a_part_that_fails(gpu_check):
    assert gpu_check.last_line(gpu_check.command(sys.executable, "-c", "print(1); print(2); print()")) == "2"
    with pytest.raises(gpu_check.Failed, match="exit status 3"):
        gpu_check.command(sys.executable, "-c", "raise SystemExit(3)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
@pytest.mark.parametrize(
    "script", ["gpu_check.py", "sanitize.py", "generate_check.py", "sweep_tiles.py", "gated_tiles.py", "chain_tiles.py"]
)
def test_without_a_gpu_it_says_so(script):
    arguments = {
        "generate_check.py": ["model"],
        "sweep_tiles.py": ["--shapes", "64x64"],
        "gated_tiles.py": ["--shapes", "64x64"],
    }.get(script, [])
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"{script} needs a CUDA GPU, and torch finds none" in done.stderr


def test_answers_are_compared_by_their_tokens(tiny_folder, tmp_path, monkeypatch, capsys):
    quantize(tiny_folder, tmp_path / "nested", matgptq.Method(group_size=16, feedback=False), progress=False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import generate_check

    arguments = [str(tmp_path / "nested"), "--device", "cpu", "--new-tokens", "4", "--bits", "8", "4", "3"]
    monkeypatch.setattr(sys, "argv", ["generate_check.py", *arguments])
    assert generate_check.main() == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {bits: row["same_as_cpu"] for bits, row in said["widths"].items()} == {"8": True, "4": True, "3": None}
    answers = generate_check.answers

    def differs(model, inputs, widths, new_tokens):
        found = answers(model, inputs, widths, new_tokens)
        return found if 3 in widths else {**found, 4: [1, 2, 3]}

    monkeypatch.setattr(generate_check, "answers", differs)
    assert generate_check.main() == 1


@pytest.mark.parametrize("sm", [86, 90])
@pytest.mark.parametrize("M", [1, 40])
def test_a_sweep_times_the_chosen_tile_and_others(monkeypatch, M, sm):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sweep_tiles import every_tile

    problem = Problem(M, 8192, 4096, 4, sm=sm)
    found = list(every_tile(problem))
    assert found[0] == choose(problem)
    assert len(set(found)) == len(found) > 8
    assert all(supports(config, problem) for config in found)
    kernels = {defines(problem, config)["KERNEL"] for config in found}
    assert kernels == {
        "linear",
        "few" if M == 1 else "many" if sm == 86 else "linear",
        "hopper" if sm == 90 else "linear",
    }


def test_a_sweep_compares_the_results_of_tiles(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sweep_tiles

    case, problem = sweep_tiles.Case(2, 64, 128, 4), Problem(2, 64, 128, 4)
    answer = torch.randn(2, 64, dtype=torch.float16)
    wrong = {"tile 2": answer + 1}

    def make_launcher(problem, config, device):
        def launch(stream, M, x, planes, scales, zeros, bias, y):
            ctypes.memmove(y, wrong.get(config, answer).data_ptr(), answer.nbytes)

        return launch

    monkeypatch.setattr(sweep_tiles, "make_launcher", make_launcher)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    cpu = torch.device("cpu")
    times = sweep_tiles.sweep(case, problem, ["tile 0", "tile 1"], cpu)
    assert len(times) == 2
    assert min(times) > 0
    with pytest.raises(ArithmeticError, match=r"results of tiles must agree to 0.001, got .* of tile 2"):
        sweep_tiles.sweep(case, problem, ["tile 0", "tile 1", "tile 2"], cpu)


def test_ways_to_gate_are_compared(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gated_tiles

    layers = torch.randn(2, 128).bfloat16()
    gated = torch.nn.functional.silu(layers[:, :64]) * layers[:, 64:]

    def make_launcher(problem, config, device):
        answer = gated if problem.gated else layers

        def launch(stream, M, x, planes, scales, zeros, bias, y):
            ctypes.memmove(y, answer.data_ptr(), answer.nbytes)

        return launch

    monkeypatch.setattr(gated_tiles, "make_launcher", make_launcher)
    monkeypatch.setattr(gated_tiles, "compile_tiles", lambda tiles: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    problem, cpu = Problem(2, 64, 128, 4, "bfloat16", gated=True), torch.device("cpu")
    assert list(gated_tiles.time_ways(problem, cpu)) == ["layers", "gate.cu after them", "gated"]
    gated += 1
    with pytest.raises(ArithmeticError, match=r"results must agree to 0.008, got"):
        gated_tiles.time_ways(problem, cpu)


def test_every_kind_of_gated_tile_is_checked(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernel_checks

    def kinds(problems):
        tiles = [tile for tile in map(choose, problems) if tile.gated]
        return {tile if isinstance(tile, HopperConfig) else tile.few for tile in tiles}

    checked = kinds(
        Problem(M, gated=True, **{name: value for name, value in options.items() if name != "bias"})
        for options, M in kernel_checks.gated_cases()
    )
    layers = [(3072, 1024), (8192, 2048), (9728, 2560), (14336, 4096), (12288, 4096), (17408, 5120), (28672, 8192)]
    batches = (1, 4, 8, 9, 16, 24, 32, 40, 64, 96, 128, 192, 256, 300, 384, 512, 700, 1024, 2048, 4096, 8192)
    asked = kinds(
        Problem(M, N, K, bits, "bfloat16", gated=True)
        for (N, K), M, bits in itertools.product(layers, batches, (2, 4, 8))
    )
    assert len(asked) > 20
    assert asked <= checked


def test_the_sanitizers_cases_can_be_computed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sanitize

    def problem(case, gated, sm=90, dtype="float16", **norm):
        bits, M, N, K, group_size, zeros, resident = case
        return Problem(M, N, K, bits, dtype, group_size, resident, zeros=zeros, sm=sm, gated=gated, **norm)

    tiles = [(case, tile.gated, tile) for case, tile in sanitize.TILES]
    chosen = [(case, gated, None) for gated, cases in enumerate((sanitize.CASES, sanitize.GATED)) for case in cases]
    for case, gated, tile in (*tiles, *chosen):
        asked = problem(case, bool(gated), 80 if isinstance(tile, ManyConfig) else 90)
        assert can_implement(asked) == (True, ""), case
        assert supports(tile or choose(asked), asked if tile is None or tile.gated else asked.layer), (case, tile)
    kinds = {}
    for place, cases in (
        ({"summed": True}, sanitize.BEFORE_NORM),
        ({"scaled": True}, sanitize.AFTER_NORM),
        ({"scaled": True}, sanitize.GATED_AFTER_NORM),
    ):
        gated = cases is sanitize.GATED_AFTER_NORM
        for asked in (problem(case, gated, dtype="bfloat16", **place) for case in cases):
            assert can_implement(asked) == (True, "")
            tile, *others = kernels(asked, choose(asked))
            kinds.setdefault((asked.summed, gated), []).append((tile, others))
    few = {(place, t.splits > 1) for place, all in kinds.items() for t, _ in all if isinstance(t, Config) and t.few}
    assert few >= {((True, False), False), ((True, False), True), ((False, False), True), ((False, True), True)}
    assert any(not tile.few for tile, others in kinds[True, False] if isinstance(tile, Config) and not others)
    assert sum(others == [Norm()] for _, others in kinds[True, False]) == 2


def test_every_kind_of_tile_around_a_norm_is_checked(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import chain_tiles
    import kernel_checks

    def kinds(problems):
        asked = {p: choose(p) for p in problems}
        return {(p.summed, p.scaled, replace(c, chunk_tiles=0)) for p, c in asked.items() if p.shares_norm}

    checked = kinds(
        Problem(M, **place, **{name: value for name, value in options.items() if name != "bias"})
        for gated, first, second, M in kernel_checks.norm_pairs()
        for options, place in ((first, {"summed": True}), (second, {"scaled": True, "gated": gated}))
    )
    models = itertools.product(chain_tiles.MODELS, (1, 2), (2, 3, 4, 6, 8))
    asked = kinds(p for model in models for p in chain_tiles.problems_of(*model).values())
    assert len(asked) > 20
    assert asked <= checked, asked - checked
