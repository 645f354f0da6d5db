"""The benchmark runs without a GPU, goes on after an engine that fails, and says so."""

import json
import subprocess
import sys
from pathlib import Path

import engines  # noqa: F401 - sets the environment before vLLM is imported

SCRIPT = Path(__file__).parents[1] / "bench_vllm_e2e.py"


def test_results_are_written_though_an_engine_fails(tmp_path):
    sizes = {"hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 5}
    # no whole groups of 128, which the GPTQ of the benchmark has
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, SCRIPT, "--arch", tmp_path, "--engines", "marlin", "resident", "--bits", "8", "3"]
    command += ["--group-size", "32", "--batch-sizes", "1", "2", "--output-len", "4", "--runs", "1", "--enforce-eager"]
    command += ["--kv-cache-gib", "0.1", "--out", tmp_path / "vllm.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "marlin failed: " in done.stderr
    report = json.loads((tmp_path / "vllm.json").read_text())
    assert report["device"] == "CPU"
    assert [(row["linear"], row["bits"]) for row in report["results"]] == [
        ("matgptq 8 bit, resident", 8),
        ("matgptq 3 bit, resident", 3),
    ]
    assert all(seconds > 0 for row in report["results"] for seconds in row["seconds"].values())
