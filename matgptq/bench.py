"""Time of one quantised linear layer against ``torch.nn.functional.linear``, verified first.

Weights rotate: as many layers as fill `ROTATION_BYTES` take turns, so that they come from memory and not from a cache.
On a GPU the calls are replayed from a CUDA graph and timed by events; elsewhere they are timed one by one.

The floor is what no kernel can beat: the bytes that must move at the card's copy rate, or the products at the rate its
library reaches, whichever takes longer:

    floor = max((N K (planes / 8 + 2 / g) + 2 M (N + K)) / bandwidth,  2 M N K / rate)
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .kernels.matmul import bind
from .kernels.matmul import warmup as compile_and_load
from .kernels.op import packed_linear
from .kernels.tiles import Problem
from .linear import MatGPTQLinear
from .packed import PackedLinear
from .plots import new_axes, save
from .slicing import dequantize

ROTATION_BYTES = 240 << 20
FEW = 64  # tokens of a call that does not heat a GPU
REPLAYS = 7
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
# bytes a second of a large copy, and operations a second of cuBLAS on random data, both measured 2026-11-22
CEILINGS = {"NVIDIA H200": (4.27e12, 6.6e14)}


@dataclass(frozen=True)
class Case:
    """One point: ``M`` tokens, ``N`` out_features, ``K`` in_features, served at ``bits``."""

    M: int
    N: int
    K: int
    bits: int
    dtype: str = "float16"
    group_size: int = 128
    mode: str = "packed"

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        return getattr(torch, self.dtype)


def prepare(cases: Iterable[Case], device: torch.device) -> None:
    """Compile and load, in parallel, the kernels that ``cases`` need. Nothing to do on a CPU."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    problems = {
        Problem(c.M, c.N, c.K, c.bits, c.dtype, c.group_size, c.mode == "resident", sm=10 * major + minor)
        for c in cases
    }
    compile_and_load(problems, device)


def random_layer(case: Case, device: torch.device, seed: int = 0) -> tuple[MatGPTQLinear, PackedLinear]:
    """A layer with random codes and scales, as it is stored and as the kernels read it."""
    generator = torch.Generator(device).manual_seed(seed)
    stored = MatGPTQLinear(
        case.K, case.N, bits=case.bits, group_size=case.group_size, dtype=case.torch_dtype, device=device
    )
    stored.qweight.random_(generator=generator)
    stored.scales.uniform_(0.002, 0.012, generator=generator)
    return stored, PackedLinear(stored, dtype=case.torch_dtype, resident=case.mode == "resident")


def reference(case: Case, stored: MatGPTQLinear, x: Tensor) -> Tensor:
    """The product in float64 over the dequantised weights, a piece of them at a time."""
    want = x.new_empty((x.shape[0], case.N), dtype=torch.float64)
    rows = max(1, (1 << 24) // case.K)
    for start in range(0, case.N, rows):
        piece = slice(start, start + rows)
        codes, scales = stored.qweight[piece], stored.scales[piece]
        weight = dequantize(codes, scales, bits=case.bits, group_size=case.group_size)
        want[:, piece] = x.double() @ weight.double().t()
    return want


def check(case: Case, call: Callable[[Tensor], Tensor], x: Tensor, want: Tensor, tolerance: float = 0) -> float:
    """Relative error of ``call(x)`` against ``want``.

    Raises:
        ArithmeticError: it is more than ``tolerance``, or than `TOLERANCE` where 0: what is wrong is not worth timing.
    """
    poison = torch.full(want.shape, float("nan"), device=x.device, dtype=x.dtype)
    del poison  # the memory that the output is likely to be given
    error = ((call(x).double() - want).norm() / want.norm()).item()
    tolerance = tolerance or TOLERANCE[case.torch_dtype]
    if not error <= tolerance:
        raise ArithmeticError(f"relative error must be at most {tolerance}, got {error:.2e} ({case})")
    return error


def tokens(case: Case, device: torch.device) -> Tensor:
    """Normal random activations."""
    return torch.randn(case.M, case.K, device=device, dtype=case.torch_dtype)


def verify(case: Case, stored: MatGPTQLinear, packed: PackedLinear) -> float:
    """Relative error of ``packed`` against `reference`; raises as `check`."""
    x = tokens(case, packed.planes.device)
    return check(case, packed, x, reference(case, stored, x))


def floor_us(case: Case, device_name: str) -> float | None:
    """The floor at the top of this module in microseconds; None for a GPU whose ceilings were not measured."""
    if device_name not in CEILINGS:
        return None
    bandwidth, rate = CEILINGS[device_name]
    planes = case.bits + (case.mode == "resident" and case.bits < 8)  # the rule `round` reads the next bit too
    group = case.K if case.group_size == -1 else case.group_size
    moved = case.N * case.K * (planes / 8 + 2 / group) + 2 * case.M * (case.N + case.K)
    return max(moved / bandwidth, 2 * case.M * case.N * case.K / rate) * 1e6


def target_us(row: Mapping[str, Any]) -> float:
    """What the project asks of a result that has a floor."""
    return 1.05 * row["floor_us"] + 1.5 if row["M"] <= 16 else 1.5 * row["floor_us"] + 2


Calls = Sequence[Callable[[], Tensor]]


def time_calls(calls: Calls, device: torch.device, cuda_graph: bool = True) -> dict[str, float]:
    """Microseconds a call where ``calls`` run one after the other: median, least and most of `REPLAYS` rounds."""

    def run() -> None:
        for call in calls:
            call()

    run()
    if device.type == "cuda":
        with torch.cuda.device(device):  # graphs and events are of the current device
            times = _time_on_gpu(run, device, cuda_graph)
    else:
        times = []
        for _ in range(REPLAYS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    each = [seconds * 1e6 / len(calls) for seconds in times]
    return {"us": statistics.median(each), "us_min": min(each), "us_max": max(each)}


_stream = cache(torch.cuda.Stream)  # to capture on; torch's own is of one GPU, whichever comes first


def _time_on_gpu(run: Callable[[], None], device: torch.device, cuda_graph: bool) -> list[float]:
    torch.cuda.synchronize(device)
    if cuda_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_stream(device)):
            run()
        run = graph.replay
        run()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def measure(
    cases: Iterable[Case],
    device: torch.device,
    *,
    cuda_graph: bool = True,
    progress: bool = True,
    peers_us: Mapping[Case, Mapping[str, float]] | None = None,
    done: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Verify and time every case; returns what the results files hold.

    Args:
        cases: what to time. Weights are made once for all batch sizes of a layer.
        device: where.
        cuda_graph: replay calls from a CUDA graph, or launch each from Python.
        progress: show a bar.
        peers_us: times of other kernels, measured just before, to be put beside ours.
        done: called with the report after every layer, so that a run that is cut off leaves what it has.

    Raises:
        ArithmeticError: a result was wrong.
    """
    # Few or many tokens, dense weight -> layer (M = 0) -> its cases.
    weights: dict[tuple[bool, int, int, str], dict[Case, list[Case]]] = {}
    # Few tokens first, of all layers: the clock of a GPU falls under many, and stays low for a while.
    for case in sorted(dict.fromkeys(cases), key=lambda case: case.M > FEW):
        layers = weights.setdefault((case.M > FEW, case.N, case.K, case.dtype), {})
        layers.setdefault(replace(case, M=0), []).append(case)
    every = [case for layers in weights.values() for group in layers.values() for case in group]
    report = new_report(device, cuda_graph)
    prepare(every, device)
    with torch.inference_mode(), tqdm(total=len(every), unit="case", disable=not progress) as bar:
        for (_, N, K, dtype), layers in weights.items():
            bar.set_postfix_str(f"{N} x {K}, torch")
            batches = sorted({case.M for group in layers.values() for case in group})
            torch_us = _torch_times([Case(m, N, K, 16, dtype) for m in batches], device, cuda_graph)
            for layer, group in layers.items():
                bar.set_postfix_str(f"{N} x {K}, {layer.bits} bits")
                for case, row in _measure_layer(layer, group, device, cuda_graph):
                    row |= {"floor_us": floor_us(case, report["device"]), "torch_us": torch_us[case.M]}
                    row["peers_us"] = dict((peers_us or {}).get(case, {}))
                    report["results"].append({"kernel": "matgptq", **asdict(case), **row})
                    bar.update()
                done(report)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return report


def new_report(device: torch.device, cuda_graph: bool = True) -> dict[str, Any]:
    """A report without results: what was measured, where and when."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "torch": torch.__version__,
        "commit": measured_commit(),
        "date": date.today().isoformat(),
        "cuda_graph": cuda_graph and gpu,
        "rotation_bytes": ROTATION_BYTES if gpu else 0,
        "results": [],
    }


def copies(nbytes: int, device: torch.device) -> int:
    """How many weights take turns: enough to leave every cache of a GPU, one on a CPU."""
    return max(2, -(-ROTATION_BYTES // nbytes)) if device.type == "cuda" else 1


def other_planes(packed: PackedLinear, device: torch.device) -> Iterator[Tensor]:
    """Random planes that take turns with those of ``packed``."""
    read = packed.planes.nbytes * packed.bits // packed.planes.shape[2]
    for _ in range(1, copies(read, device)):
        yield torch.randint_like(packed.planes, -(2**31), 2**31 - 1)


def _measure_layer(
    layer: Case, cases: Sequence[Case], device: torch.device, cuda_graph: bool
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case of a layer with its times and error: one set of weights, one reference for all tokens."""
    stored, packed = random_layer(layer, device)
    xs = [tokens(case, device) for case in cases]
    wants = reference(layer, stored, torch.cat(xs)).split([case.M for case in cases])
    del stored
    errors = [check(case, packed, x, want) for case, x, want in zip(cases, xs, wants, strict=True)]
    del wants
    turns = [packed]
    for planes in other_planes(packed, device):
        turn = copy.copy(packed)
        turn._buffers = dict(packed._buffers)
        turn.planes = planes
        turns.append(turn)
    for case, x, error in zip(cases, xs, errors, strict=True):
        times = time_calls([partial(turn, x) for turn in turns], device, cuda_graph)
        yield case, {**times, "relative_error": error}


def _torch_times(cases: Sequence[Case], device: torch.device, cuda_graph: bool) -> dict[int, float]:
    """Microseconds of `torch.nn.functional.linear` by tokens, for one shape and type."""
    first = cases[0]
    weights = [
        torch.randn(first.N, first.K, device=device, dtype=first.torch_dtype)
        for _ in range(copies(first.N * first.K * 2, device))
    ]
    times = {}
    for case in cases:
        x = tokens(case, device)
        calls = [partial(torch.nn.functional.linear, x, weight) for weight in weights]
        times[case.M] = time_calls(calls, device, cuda_graph)["us"]
    return times


def call_cost(device: torch.device, calls: int = 300) -> dict[str, float]:
    """CPU microseconds of an eager call for one token on a GPU: the fastest of some rounds of ``calls`` calls.

    ``layer`` is a `PackedLinear`, ``function`` is `kernels.op.packed_linear`, ``op`` the same by the dispatcher (as a
    compiled model calls it), ``launch`` the launch alone; ``torch`` is `torch.nn.functional.linear`, to tell how fast
    the machine is. ``calls`` must be so few that the GPU's queue takes them all.
    """
    case = Case(1, 256, 256, 4)
    _, layer = random_layer(case, device)
    x = torch.randn(1, case.K, device=device, dtype=case.torch_dtype)
    y = torch.empty(1, case.N, device=device, dtype=case.torch_dtype)
    dense = torch.randn(case.N, case.K, device=device, dtype=case.torch_dtype)
    operands = (layer.planes, layer.scales, None, None)
    options = {"in_features": case.K, "out_features": case.N, "bits": case.bits, "group_size": case.group_size}
    call = bind(case.bits, case.group_size, case.K, case.N)
    launcher = call.load(1, case.torch_dtype, False, x.get_device())
    stream = torch.cuda.current_stream(device).cuda_stream
    addresses = (x.data_ptr(), layer.planes.data_ptr(), layer.scales.data_ptr(), 0, 0, y.data_ptr())
    ways: dict[str, Callable[[], Any]] = {
        "layer": lambda: layer(x),
        "function": lambda: packed_linear(x, *operands, **options),  # type: ignore[arg-type]
        "op": lambda: torch.ops.matgptq.packed_linear(x, *operands, *options.values(), "round", False),
        "launch": lambda: launcher(stream, 1, *addresses),
        "torch": lambda: torch.nn.functional.linear(x, dense),
    }
    costs = {}
    with torch.inference_mode(), torch.cuda.device(device):
        for name, way in ways.items():
            times = []
            for _ in range(5 * REPLAYS):
                torch.cuda.synchronize(device)
                start = time.perf_counter()
                for _ in range(calls):
                    way()
                times.append((time.perf_counter() - start) / calls * 1e6)
            costs[name] = min(times)  # the others tell of the machine's other work
    torch.cuda.synchronize(device)
    return costs


def measured_commit() -> str:
    """What is measured: ``GIT_COMMIT`` where the code was copied without its history, else git's word for it."""
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(report: dict[str, Any]) -> str:
    """The report as text: microseconds and speed-up over torch, a row a layer and width, a column a batch size."""
    rows: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for r in report["results"]:
        key = (f"{r['N']} x {r['K']}", r["bits"], r["dtype"], r["group_size"], r["mode"])
        rows.setdefault(key, {})[r["M"]] = r
    batches = sorted({r["M"] for r in report["results"]})
    lines = [f"{report['device']}, microseconds (speed-up over torch)"]
    lines.append(f"{'N x K':>14} bits {'type':>8} group {'mode':>8}" + "".join(f"{f'M={m}':>16}" for m in batches))
    for (shape, bits, dtype, group_size, mode), by_batch in rows.items():
        cells = [by_batch.get(m) for m in batches]
        shown = [f"{c['us']:.1f} ({c['torch_us'] / c['us']:.2f}x)" if c else "" for c in cells]
        lines.append(f"{shape:>14} {bits:>4} {dtype:>8} {group_size:>5} {mode:>8}" + "".join(f"{s:>16}" for s in shown))
    return "\n".join(lines)


def plot(report: dict[str, Any], paths: Iterable[Path], title: str) -> None:
    """Draw speed-up over torch by batch size, a line a width; the suffix of each path chooses its type.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes = new_axes(xlabel="tokens", ylabel="speed-up over torch.matmul", title=title, xscale="log")
    for bits in sorted({r["bits"] for r in report["results"]}):
        points = sorted((r["M"], r["torch_us"] / r["us"]) for r in report["results"] if r["bits"] == bits)
        axes.plot(*zip(*points, strict=True), "o-", label=f"{bits} bits")
    axes.axhline(1, color="black", linewidth=1, linestyle=":")
    batches = sorted({r["M"] for r in report["results"]})
    axes.set_xticks(batches, [str(m) for m in batches])
    axes.minorticks_off()
    save(axes, paths)


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, a result a line; a reader sees the file before or after, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**{key: value for key, value in report.items() if key != "results"}, "results": []})[:-2]
    rows = ",\n".join(json.dumps(row) for row in report["results"])
    whole = path.with_suffix(".part")
    whole.write_text(f"{head}\n{rows}\n]}}\n", encoding="utf-8")
    whole.replace(path)
