"""All that a GPU can show of the kernels: checks, times, and a table of what came out.

    PYTHONPATH=. python benchmarks/gpu_check.py                            # every part, as make gpu-check does
    PYTHONPATH=. python benchmarks/gpu_check.py --only checks call

The results go to build/gpu_check: summary.json, linear.json, ratios.json. Exits with 1 if a part fails, and with 2 if
there is no CUDA GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from kernel_checks import (
    Checks,
    check_decoding,
    check_determinism,
    check_gated,
    check_graph,
    check_norms,
    check_older_gpus,
    check_products,
    problem_of,
)

from matgptq.bench import Case, call_cost, measure, measured_commit, target_us, write
from matgptq.bench_linear import MODELS
from matgptq.kernels.matmul import warmup

HERE = Path(__file__).parent


class Failed(Exception):
    """A part did not come out as it must."""


def command(*words: str, **environment: str) -> str:
    """Run a command, show its output as it comes, and return it; raises Failed if it fails."""
    lines = []
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise Failed(f"exit status {process.returncode}")
    return "".join(lines)


def last_line(output: str) -> str:
    """The last line that is not blank."""
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")


def part_tests(options: argparse.Namespace) -> str:
    """Layers and models on the GPU: graphs, torch.compile(fullgraph=True), torch.export, tokens of the CPU op."""
    return last_line(command(sys.executable, "-m", "pytest", "tests/test_gpu.py", "tests/test_packed.py"))


def part_script(options: argparse.Namespace) -> str:
    """The correctness script at the root."""
    return last_line(command(sys.executable, "test_matgptq_matmul.py"))


def part_checks(options: argparse.Namespace) -> str:
    """The kernels' own checks."""
    checks = Checks()
    check_decoding(checks)
    check_products(checks, options.quick)
    check_gated(checks)
    check_norms(checks)
    check_older_gpus(checks)
    check_determinism(checks)
    check_graph(checks)
    torch.cuda.synchronize()
    worst = ", ".join(f"{error:.1e} {dtype}" for dtype, error in checks.worst.items())
    if checks.failures:
        raise Failed(f"{len(checks.failures)} of {checks.run} failed, worst relative error {worst}")
    return f"{checks.run} passed, worst relative error {worst}"


def part_sanitizer(options: argparse.Namespace) -> str:
    """compute-sanitizer's memcheck, racecheck and initcheck on a few calls."""
    if not shutil.which("compute-sanitizer"):
        return "NOT RUN: no compute-sanitizer on PATH"
    script = str(HERE / "sanitize.py")
    for tool in ("memcheck", "racecheck", "initcheck"):
        # --report-api-errors no: cuda-bindings asks the driver for entry points that it may not have
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command("compute-sanitizer", "--tool", tool, *quiet, "--error-exitcode", "1", sys.executable, script)
    return "memcheck, racecheck and initcheck clean"


def part_call(options: argparse.Namespace) -> str:
    """CPU time of an eager call."""
    return ", ".join(f"{name} {us:.1f}" for name, us in call_cost(torch.device("cuda")).items()) + " us of CPU"


def part_compile(options: argparse.Namespace) -> str:
    """Time to compile what an 8B model needs at widths 2, 3, 4, 6 and 8, from nothing and from the cache."""
    script = "from gpu_check import warm_8b; print(warm_8b())"
    with tempfile.TemporaryDirectory() as folder:
        path = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '.')}"
        cold, warm = (
            last_line(command(sys.executable, "-c", script, MATGPTQ_CACHE=folder, PYTHONPATH=path)) for _ in range(2)
        )
        count = len(list(Path(folder).glob("*.cubin")))
    return f"{count} variants of an 8B model: {cold} s from nothing, {warm} s from the cache"


def warm_8b() -> float:
    """Seconds to make the kernels of Llama-3.1-8B ready in this process."""
    torch.cuda.synchronize()
    shapes, batches = MODELS["llama-3.1-8b"], (1, 2, 4, 8, 16, 32, 64)
    start = time.perf_counter()
    for resident in (False, True):
        layers = [
            {"N": N, "K": K, "bits": bits, "resident": resident}
            for (N, K), bits in itertools.product(shapes, (2, 3, 4, 6, 8))
        ]
        warmup([problem_of(layer, M) for layer, M in itertools.product(layers, batches)])
    return round(time.perf_counter() - start, 2)


def part_bench(options: argparse.Namespace) -> str:
    """``matgptq bench linear``: times against the target, cuBLAS and Humming."""
    out = options.results / "linear.json"
    command(
        sys.executable, "-m", "matgptq.cli", "bench", "linear", "--quiet", "--out", str(out), *options.bench_options
    )
    rows = json.loads(out.read_text())["results"]
    rows = [row for row in rows if row["mode"] == "packed" and row["dtype"] == "float16"]
    beaten = [row for row in rows if "humming" in row["peers_us"]]
    counts = [f"faster than cuBLAS at {sum(r['us'] < r['torch_us'] for r in rows)} of {len(rows)} points"]
    if beaten:
        faster = sum(r["us"] < r["peers_us"]["humming"] for r in beaten)
        counts.append(f"than Humming at {faster} of {len(beaten)}")
    floors = [row for row in rows if row["floor_us"]]
    if floors:
        counts.append(f"target met at {sum(r['us'] <= target_us(r) for r in floors)} of {len(floors)}")
    return ", ".join(counts)


def part_ratios(options: argparse.Namespace) -> str:
    """Times of other kinds of problem over those of fp16, packed, groups of 128."""
    kinds: dict[str, dict[str, Any]] = {
        "bfloat16": {"dtype": "bfloat16"},
        "resident": {"mode": "resident"},
        "groups of 64": {"group_size": 64},
        "groups of 32": {"group_size": 32},
        "one group": {"group_size": -1},
    }
    points = itertools.product((8, 64), (4096, 8192), (2, 3, 4, 6, 8)) if options.quick else ()
    points = points or itertools.product((1, 8, 16, 64, 512), (4096, 8192, 16384), (2, 3, 4, 6, 8))
    plain = [Case(M, size, size, bits) for M, size, bits in points]
    every = [*plain, *(replace(case, **kind) for kind in kinds.values() for case in plain)]
    report = measure(every, torch.device("cuda"), progress=False)
    write(report, options.results / "ratios.json")
    names = [field.name for field in fields(Case)]
    us = {Case(**{name: row[name] for name in names}): row["us"] for row in report["results"]}
    said = []
    for name, kind in kinds.items():
        for tokens, cases in (
            ("to 16 tokens", [c for c in plain if c.M <= 16]),
            ("more", [c for c in plain if c.M > 16]),
        ):
            ratios = [us[replace(case, **kind)] / us[case] for case in cases]
            said.append(f"{name}, {tokens}, {statistics.median(ratios):.2f} (worst {max(ratios):.2f})")
    return "; ".join(said)


def part_generate(options: argparse.Namespace) -> str:
    """Greedy answers of a quantised model at every width, at 8 and 4 bits the tokens of the CPU op."""
    if options.model is None:
        return "NOT RUN: no --model"
    script = str(HERE / "generate_check.py")
    widths = json.loads(last_line(command(sys.executable, script, str(options.model))))["widths"]
    same = [bits for bits, row in widths.items() if row["same_as_cpu"]]
    return f"answers at {len(widths)} widths, the CPU op's tokens at {' and '.join(same)} bits"


PARTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "tests": part_tests,
    "script": part_script,
    "checks": part_checks,
    "sanitizer": part_sanitizer,
    "call": part_call,
    "compile": part_compile,
    "bench": part_bench,
    "ratios": part_ratios,
    "generate": part_generate,
}


def main() -> int:
    """Run the parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--results", type=Path, default=Path("build/gpu_check"), help="folder of what is written")
    parser.add_argument("--quick", action="store_true", help="fewer points in checks and ratios")
    parser.add_argument("--model", type=Path, help="quantised model folder for the part generate")
    parser.add_argument("--bench-options", nargs=argparse.REMAINDER, default=[], help="for matgptq bench linear; last")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA GPU, and torch finds none", file=sys.stderr)
        return 2
    options.results.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    summary |= {"commit": measured_commit(), "date": date.today().isoformat(), "parts": {}}
    for name in dict.fromkeys(options.only):
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        try:
            passed, said = True, PARTS[name](options)
        except Exception as error:  # the other parts are still worth running
            passed, said = False, f"{type(error).__name__}: {error}"
        torch.cuda.empty_cache()
        seconds = round(time.perf_counter() - start, 1)
        summary["parts"][name] = {"passed": passed, "seconds": seconds, "result": said}
        (options.results / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"\n{summary['device']}, torch {summary['torch']}, {summary['commit']}, {summary['date']}")
    for name, part in summary["parts"].items():
        print(f"{name:10} {'ok' if part['passed'] else 'FAILED':6} {part['seconds']:6.1f} s  {part['result']}")
    return 0 if all(part["passed"] for part in summary["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
