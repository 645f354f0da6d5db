"""The benchmark runs without a GPU, and goes on after an engine that fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import engines  # noqa: F401 - sets the environment before vLLM is imported
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def geometry(tmp_path):
    """A folder with the config.json of a tiny dense model, and nothing else."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_one_engine_is_measured_at_each_width(geometry):
    command = [sys.executable, ROOT / "bench_vllm_e2e.py", "--arch", geometry, "--engines", "bf16", "resident"]
    command += ["--bits", "8", "3", "--group-size", "32", "--batch-sizes", "1", "2", "--output-len", "4", "--runs", "1"]
    command += ["--enforce-eager", "--kv-cache-gib", "0.1", "--out", geometry / "vllm.json"]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    report = json.loads((geometry / "vllm.json").read_text())
    assert report["device"] == "CPU"
    assert [(row["linear"], row["bits"], row["computed_by"]) for row in report["results"]] == [
        ("bf16", 16, ["UnquantizedLinearMethod"]),
        ("matgptq 8 bit, resident", 8, ["MatGPTQLinearMethod"]),
        ("matgptq 3 bit, resident", 3, ["MatGPTQLinearMethod"]),
    ]
    assert all(seconds > 0 for row in report["results"] for seconds in row["seconds"].values())


def test_results_are_written_though_an_engine_fails(geometry, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    import bench_vllm_e2e

    def run_engine(engine, folder, options, results):
        os.setsid()
        if engine == "8":
            os._exit(1)
        if engine == "4":
            results.send({"error": "ValueError: no GPU"})
        else:
            results.send({"device": "NVIDIA H200", "row": {"linear": engine, "seconds": {"1": 0.5}}})
            results.send(None)

    monkeypatch.setattr(bench_vllm_e2e, "run_engine", run_engine)
    out = geometry / "vllm.json"
    arguments = ["--arch", str(geometry), "--engines", "8", "4", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_vllm_e2e.py", *arguments])
    assert bench_vllm_e2e.main() == 1
    assert [row["linear"] for row in json.loads(out.read_text())["results"]] == ["3"]
    error = capsys.readouterr().err
    assert "8 failed: the engine's process ended" in error
    assert "4 failed: ValueError: no GPU" in error
