"""The scripts at the root run as they stand, on the CPU, on a tiny model."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import matgptq
from matgptq.quantizer.pipeline import quantize

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def nested(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts") / "nested"
    quantize(tiny_folder, folder, matgptq.Method(group_size=16, feedback=False), progress=False)
    return folder


def run(script, model, *options):
    environment = {**os.environ, "MODEL_ID": str(model), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts" / script), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout


def test_the_transformers_demo_answers_at_each_width(nested):
    output = run("run_inference_transformers.sh", nested, "--bits", "8", "3", "--max-new-tokens", "5")
    assert output.count("[5 tokens,") == 2
    assert "8 bits, ready after" in output
    assert "3 bits, ready after" in output


def test_the_transformers_benchmark_measures_all_loops(nested, tmp_path):
    options = [
        "--bits",
        "4",
        "2",
        "--batch-sizes",
        "1",
        "2",
        "--prompt-tokens",
        "5",
        "--new-tokens",
        "6",
        "--repeats",
        "1",
    ]
    run("run_bench_e2e.sh", nested, *options, "--loops", "decoder", "generate", "--out", str(tmp_path / "r.json"))
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(r["bits"], r["loop"]) for r in report["results"]] == [
        (4, "decoder"), (2, "decoder"), (4, "generate"), (16, "decoder"), (16, "generate")
    ]  # fmt: skip
    assert all(r["seconds"].keys() == {"1", "2"} and min(r["seconds"].values()) > 0 for r in report["results"])
    assert [c["bits"] for c in report["width_changes"]] == [4, 2, 4, 2]
    assert all(c["same_tokens"] for c in report["width_changes"])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("inference_demo_transformers", ["nowhere", "--bits", "9"], "argument --bits: invalid choice: 9"),
        (
            "inference_demo_transformers",
            ["nowhere", "--max-new-tokens", "0"],
            "--max-new-tokens must be positive, got 0",
        ),
        ("inference_demo_transformers", ["nowhere", "--device", "meta"], "device must be there, got meta"),
        ("bench_transformers_e2e", ["nowhere", "--device", "nope"], "--device must be one of torch's"),
        ("bench_transformers_e2e", ["nowhere", "--new-tokens", "0"], "--new-tokens and --repeats must be positive"),
        ("bench_matgptq_matmul", ["--n_out_features", "8", "--n_in_features", "100"], "in_features must be a positive"),
    ],
)
def test_bad_arguments_are_told_as_such(script, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert message in capsys.readouterr().err
