"""A real model, quantised by the command line, served by vLLM: greedy tokens, and an OpenAI client over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest
from engines import engine, expected, served

ROOT = Path(__file__).parents[1]
DENSE = ROOT / "build" / "SmolLM2-135M-Instruct"  # `make test-vllm` fetches it
MIXED = {"*.q_proj": 4, "*.k_proj": 8, "*.v_proj": 6, "*.gate_proj": 4, "*": 8}
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SmolLM2, rounded to nearest, with bits 4 in its config.json."""
    out = tmp_path_factory.mktemp("smollm2") / "nested"
    command = [sys.executable, "-m", "matgptq.cli", "quantize", DENSE, "--out", out, "--method", "rtn"]
    subprocess.run([*command, "--group-size", "64"], check=True, cwd=ROOT)
    return out


@pytest.mark.parametrize("bits", [8, 4, MIXED], ids=["8", "4", "mixed"])
def test_greedy_tokens_are_those_of_transformers(folder, bits):
    overrides = {"quant_method": "matgptq", **({"bits": bits} if isinstance(bits, int) else {"bits_per_layer": bits})}
    with engine(folder, hf_overrides={"quantization_config": overrides}, kv_cache_memory_bytes=1 << 27) as llm:
        prompt = llm.get_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert served(llm, prompt) == expected(folder, bits, prompt)


def test_a_server_answers_an_openai_client(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = json.dumps({"quantization_config": {"quant_method": "matgptq", "bits": 8}})
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(folder),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--hf-overrides", overrides]
    command += ["--kv-cache-memory-bytes", str(1 << 27), "--served-model-name", "smollm2"]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    server = subprocess.Popen(command, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, seconds=300)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = client.chat.completions.create(model="smollm2", messages=MESSAGES, temperature=0, max_tokens=16)
        assert "The capital of France is Paris" in answer.choices[0].message.content
    finally:
        server.terminate()
        server.wait(60)


def test_the_demo_answers_at_each_width(folder):
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment |= {"MODEL_ID": str(folder), "PYTHON": sys.executable, "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [ROOT / "scripts" / "run_inference_vllm.sh", "--bits", "8", "6", "--max-new-tokens", "8"]
    command += ["--max-model-len", "128", "--enforce-eager"]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=400).stdout
    assert output.count("The capital of France is Paris") == 2
    assert output.count("[8 tokens, ") == 2


def wait_for(url, server, seconds):
    """Return once ``url`` answers; an error if the server ends, or does not answer in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server must run, got exit status {server.returncode}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"{url} must answer within {seconds} s")
