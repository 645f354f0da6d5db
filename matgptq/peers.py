"""Times of other people's kernels, by the method of `matgptq.bench`: rotating weights, CUDA graph, verified first.

Humming (PyPI humming-kernels) needs a CUDA toolkit's headers besides its wheel, and compiles for seconds a shape, width
and range of batch sizes.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .bench import Case, check, copies, time_calls, tokens

TOLERANCE = 1e-2  # it rounds scaled weights to the type of the activations


def humming_times(
    cases: Iterable[Case], device: torch.device, *, seconds: float = 60, cuda_graph: bool = True
) -> dict[Case, dict[str, float]]:
    """``{case: {"humming": microseconds}}`` of the cases that Humming supports, as many as ``seconds`` allow.

    Nothing where it is not installed, or on a CPU. Layers are compiled in parallel, for half of the time at most; what
    is there by then is timed one by one.
    """
    if device.type != "cuda" or seconds <= 0 or importlib.util.find_spec("humming") is None:
        return {}
    deadline = time.monotonic() + seconds
    layers: dict[Case, list[Case]] = {}
    for case in cases:
        layers.setdefault(replace(case, M=0, mode="packed"), []).append(case)
    pool = ThreadPoolExecutor()
    made = {layer: pool.submit(_compiled, layer, [c.M for c in group], device) for layer, group in layers.items()}
    try:
        wait(made.values(), timeout=seconds / 2)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    times: dict[Case, dict[str, float]] = {}
    for layer, group in layers.items():
        if not made[layer].done() or made[layer].cancelled() or time.monotonic() > deadline:
            print(f"humming: no time left for {layer}", file=sys.stderr)
            continue
        try:
            times.update(_timed(made[layer], group, device, cuda_graph))
        except Exception as error:  # whatever it raises for what it does not support
            print(f"humming: {layer}: {type(error).__name__}: {error}", file=sys.stderr)
    torch.cuda.empty_cache()
    return times


def _compiled(layer: Case, batches: list[int], device: torch.device) -> tuple[Any, torch.Tensor, str]:
    """A layer with its kernels for ``batches``, its dequantised weight, and the choice of those kernels."""
    from humming.kernel.humming import HummingKernel
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    group_size = max(layer.group_size, 0)
    with torch.cuda.device(device), torch.no_grad():
        made = HummingLayer(
            shape_n=layer.N,
            shape_k=layer.K,
            weight_config={"dtype": f"int{layer.bits}", "group_size": group_size},
            torch_dtype=layer.torch_dtype,
        ).to(device)
        made.load_from_unquantized(torch.randn(layer.N, layer.K, device=device, dtype=layer.torch_dtype))
        tensors = {name: getattr(made, name).detach() for name in ("weight", "weight_scale")}
        weight = made.weight_schema.dequant_tensors(tensors).to(layer.torch_dtype)
        made.transform()
        ranges = get_heuristics_config(made.humming_config, device=device)
        wanted = json.dumps([r for r in ranges if any(r[0] <= m <= r[1] for m in batches)])
        HummingKernel.prepare_kernels(made.humming_config.to_str(), None, wanted, device)
        torch.cuda.synchronize(device)
    return made, weight, wanted


def _timed(
    made: Future[tuple[Any, torch.Tensor, str]], cases: list[Case], device: torch.device, cuda_graph: bool
) -> dict[Case, dict[str, float]]:
    layer, weight, tuning = made.result()
    turns = [layer]
    for _ in range(1, copies(layer.weight.nbytes, device)):
        turn = copy.copy(layer)
        turn._parameters, turn._buffers = dict(layer._parameters), dict(layer._buffers)
        random = torch.randint_like(layer.weight.data, -(2**31), 2**31 - 1)
        turn.weight = torch.nn.Parameter(random, requires_grad=False)
        turn.locks = layer.locks.clone()
        turns.append(turn)
    times = {}
    with torch.no_grad():
        for case in cases:
            x = tokens(case, device)
            check(case, partial(layer, tuning_config=tuning), x, x.double() @ weight.double().t(), TOLERANCE)
            calls = [partial(turn, x, tuning_config=tuning) for turn in turns]
            times[case] = {"humming": time_calls(calls, device, cuda_graph)["us"]}
    return times
