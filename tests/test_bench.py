"""``matgptq bench linear`` on the CPU op, and what is made of its results. The shapes are tiny: no time is checked."""

import importlib.util
import json
from itertools import product
from pathlib import Path

import pytest
import torch

from matgptq import bench, bench_linear
from matgptq.bench import Case, target_us
from matgptq.cli import main
from matgptq.dummy import ARCHITECTURES
from matgptq.peers import humming_times

KEYS = {"kernel", "mode", "M", "N", "K", "bits", "dtype", "group_size"}
KEYS |= {"us", "us_min", "us_max", "floor_us", "torch_us", "peers_us"}
TINY = ["bench", "linear", "--shapes", "96x64", "40x128", "--group-sizes", "32", "--quiet", "--device", "cpu"]


def report_module():
    path = Path(__file__).parents[1] / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_writes_every_case(tmp_path, capsys):
    out = tmp_path / "deep" / "linear.json"
    options = ["--bits", "2", "5", "--batch-sizes", "1", "3", "--dtypes", "float16", "bfloat16"]
    assert main([*TINY, *options, "--modes", "packed", "resident", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"out": str(out), "device": "CPU", "cases": 32}
    report = json.loads(out.read_text())
    assert {"device", "torch", "commit", "date", "results"} <= report.keys()
    assert report["torch"] == torch.__version__
    rows = report["results"]
    assert all(row.keys() >= KEYS for row in rows)
    found = {(r["N"], r["K"], r["bits"], r["M"], r["dtype"], r["mode"]) for r in rows}
    shapes = ((96, 64), (40, 128))
    every = product(shapes, (2, 5), (1, 3), ("float16", "bfloat16"), ("packed", "resident"))
    assert found == {(*shape, *rest) for shape, *rest in every}
    for row in rows:
        assert row["us_min"] <= row["us"] <= row["us_max"]
        assert row["peers_us"] == {}
        assert row["floor_us"] is None  # no floor is known for a CPU
        assert row["relative_error"] <= bench.TOLERANCE[getattr(torch, row["dtype"])]


def test_the_table_is_shown_unless_quiet(tmp_path, capsys):
    loud = [option for option in TINY if option != "--quiet"]
    assert main([*loud, "--bits", "4", "--batch-sizes", "2", "--out", str(tmp_path / "linear.json")]) == 0
    shown = capsys.readouterr()
    assert "96 x 64    4  float16" in shown.out
    assert "no GPU here" in shown.err
    assert "2/2" in shown.err  # the bar


def test_what_was_measured_is_there_when_a_run_breaks(tmp_path, monkeypatch, capsys):
    out = tmp_path / "linear.json"
    check = bench.check

    def breaks(case, *rest):
        if case.bits == 5:
            raise ArithmeticError("relative error must be at most 0.001, got 0.5")
        return check(case, *rest)

    monkeypatch.setattr(bench, "check", breaks)
    assert main([*TINY, "--bits", "2", "5", "--batch-sizes", "1", "3", "--out", str(out)]) == 1
    assert "relative error must be at most" in capsys.readouterr().err
    rows = json.loads(out.read_text())["results"]
    assert [(r["N"], r["bits"], r["M"]) for r in rows] == [(96, 2, 1), (96, 2, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["linear.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "100"], "a shape must be out_features x in_features, such as 8192x8192, got '100'"),
        (["--models", "gpt-5"], "invalid choice: 'gpt-5'"),
        (["--modes", "both"], "invalid choice: 'both'"),
        (["--shapes", "64x100"], "in_features must be a positive multiple of 16, got 100"),
        (["--bits", "9"], "bits must be 2..8, got 9"),
        (["--group-sizes", "24"], "group_size must be -1 or a multiple of 16 that divides in_features 64, got 24"),
        (["--batch-sizes", "0"], "batch sizes must be positive, got 0"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(options, message, tmp_path, capsys):
    out = tmp_path / "linear.json"
    try:
        status = main([*TINY, *options, "--out", str(out)])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def cases_of(monkeypatch, *options):
    found = []

    def measure(cases, device, **rest):
        found.extend(cases)
        return {"device": "CPU", "results": []}

    monkeypatch.setattr(bench_linear, "measure", measure)
    assert main(["bench", "linear", "--quiet", "--device", "cpu", *options]) == 0
    return found


def test_what_is_measured_by_default(monkeypatch):
    found = cases_of(monkeypatch)
    assert len(found) == len(set(found))
    packed = {(c.N, c.K, c.bits, c.M) for c in found if c.mode == "packed"}
    assert packed == {(*s, b, m) for s, b, m in product(bench_linear.SHAPES, range(2, 9), (1, 2, 4, 8, 16, 32, 64))}
    assert {c.M for c in found if c.mode == "resident"} == {1, 2, 4, 8, 16}
    assert {(c.N, c.K) for c in found if c.mode == "resident"} == set(bench_linear.SQUARES)
    assert {(c.dtype, c.group_size) for c in found} == {("float16", 128)}


def test_models_and_large_batches(monkeypatch):
    found = cases_of(monkeypatch, "--models", "llama-3.1-8b", "qwen3-8b", "--large", "--bits", "4")
    shapes = {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (24576, 4096), (4096, 12288)}
    assert {(c.N, c.K) for c in found} == shapes
    assert max(c.M for c in found) == 8192
    for model in bench_linear.MODELS:  # every layer can be timed
        assert cases_of(monkeypatch, "--models", model, "--bits", "4", "--batch-sizes", "1")


def test_weights_are_made_once_for_all_batch_sizes(monkeypatch):
    made = []
    random_layer = bench.random_layer
    monkeypatch.setattr(bench, "random_layer", lambda case, *rest: made.append(case) or random_layer(case, *rest))
    cases = [Case(m, 48, 64, bits, group_size=32) for m, bits in product((1, 2, 5), (3, 4))]
    peers = {cases[0]: {"humming": 12.5}}
    report = bench.measure([*cases, cases[0]], torch.device("cpu"), progress=False, peers_us=peers)
    assert [case.bits for case in made] == [3, 4]
    assert len(report["results"]) == 6
    assert [r["peers_us"] for r in report["results"]] == [{"humming": 12.5}, *[{}] * 5]


def test_a_wrong_result_is_not_timed():
    case = Case(2, 48, 64, 4, group_size=32)
    stored, packed = bench.random_layer(case, torch.device("cpu"))
    packed.scales.mul_(1.01)
    with pytest.raises(ArithmeticError, match="relative error must be at most"):
        bench.verify(case, stored, packed)


def test_a_report_is_written_whole_whatever_it_has(tmp_path):
    for results in ([], [{"us": 1.5}], [{"us": 1.5}, {"us": 2.5}]):
        report = {"device": "CPU", "results": results, "call_us": {"layer": 7.5}}
        bench.write(report, tmp_path / "report.json")
        assert json.loads((tmp_path / "report.json").read_text()) == report


def test_humming_is_left_out_where_it_cannot_run():
    assert humming_times([Case(1, 64, 64, 4)], torch.device("cpu")) == {}


def made_up(shapes, batches, widths):
    """A report of no machine: every time follows from the shape."""
    rows = []
    for (N, K), bits, M, mode in product(shapes, widths, batches, ("packed", "resident")):
        row = {"kernel": "matgptq", "M": M, "N": N, "K": K, "bits": bits, "dtype": "float16", "group_size": 128}
        times = {"us": bits * N / 1024 + M, "floor_us": bits * N / 2048, "torch_us": N / 64.0 + M}
        row |= {"mode": mode, **times, "peers_us": {}}
        rows.append(row)
    return {"device": "no GPU", "results": rows}


PAGE = "before\n<!-- {0} -->\nold\n<!-- /{0} -->\nafter\n"


def test_the_report_fills_the_pages_and_draws_the_plots(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(PAGE.format("headline") + PAGE.format("gpu"))
    (tmp_path / "docs" / "kernels.md").write_text(PAGE.format("linear") + PAGE.format("many") + PAGE.format("counts"))
    squares = [(size, size) for size in (2048, 4096, 8192, 16384)]
    report = made_up([*squares, (6144, 4096)], (1, 8, 16, 64), (2, 4, 8))
    peers = {"kernel": "humming-kernels", "N": 16384, "K": 16384, "bits": 4, "us_by_M": {"1": 66.0, "64": 192.0}}
    peers = report_module().read_peers({"results": [peers, {**peers, "kernel": "another"}]})
    report_module().write_linear(report, peers, tmp_path)
    names = {path.name for path in (tmp_path / "assets").iterdir()}
    assert names == {f"gpu_benchmark_{k}k.svg" for k in (2, 4, 8, 16)}
    readme = (tmp_path / "README.md").read_text()
    assert "**3.9 times as fast as `torch.matmul` in float16**" in readme
    assert "| 8192 x 8192, microseconds (times torch.matmul's speed) | M = 1 | M = 8 | M = 16 | M = 64 |" in readme
    assert "| 4 bits | 33.0 (3.91) | 40.0 (3.40) | 48.0 (3.00) | 96.0 (2.00) |" in readme
    page = (tmp_path / "docs" / "kernels.md").read_text()
    assert "old" not in page
    assert page.startswith("before\n")
    few, many = page.split("<!-- /linear -->")
    assert "| 16384 x 16384 | M = 1 | M = 8 | M = 16 |\n" in few
    assert "| 2 bits | 17.0 (9.9) | 24.0 (9.9) | 32.0 (9.9) |\n" in few
    assert "| Humming, 2 / 3 / 4 / 6 / 8 bits | 66.0 |  |  |\n" in few
    assert "| cuBLAS | 129.0 | 136.0 | 144.0 |\n" in few
    assert "| speed-up over Humming | 1.02 / 1.02 / 1.02 |  |  |\n" in few
    assert "| 16384 x 16384 | M = 64 |\n" in many
    assert "| 4 bits | 128.0 (50.0) |\n" in many
    assert "| speed-up over Humming | 1.50 / 1.50 / 1.50 |\n" in many
    assert "| timed | 15 | 15 | 15 | 15 |\n" in many
    assert "| within the target | 0 | 0 | 0 | 0 |\n" in many
    assert "\nFrom M = 32 on 15 of 15 points are no slower than cuBLAS (2 %).\n" in many
    once = [path.read_bytes() for path in sorted((tmp_path / "assets").iterdir())]
    report_module().write_linear(report, peers, tmp_path)
    assert once == [path.read_bytes() for path in sorted((tmp_path / "assets").iterdir())]
    assert page == (tmp_path / "docs" / "kernels.md").read_text()


def test_the_target_is_the_floor_and_a_little():
    assert target_us({"M": 16, "floor_us": 10.0}) == 12.0
    assert target_us({"M": 17, "floor_us": 10.0}) == 17.0


def test_the_gpu_report_that_is_kept_has_what_the_pages_show():
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "h200"
    report = json.loads((folder / "linear.json").read_text())
    assert all(row.keys() >= KEYS for row in report["results"])
    assert {row["M"] for row in report["results"]} >= {1, 16, 32, 8192}
    assert report_module().headline(report) in (folder.parents[2] / "README.md").read_text()


def test_the_models_have_the_shapes_of_their_geometries():
    known = {"llama-3.1-8b": "llama-3.1-8b", "llama-70b": "llama-3.1-70b", "qwen3-8b": "qwen3-8b"}
    known["qwen3-32b"] = "qwen3-32b"
    for name, arch in known.items():
        config = ARCHITECTURES[arch]
        hidden, inner, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
        size = config.get("head_dim", hidden // heads)
        qkv = (heads + 2 * config["num_key_value_heads"]) * size
        want = ((qkv, hidden), (hidden, heads * size), (2 * inner, hidden), (hidden, inner))
        assert bench_linear.MODELS[name] == want
