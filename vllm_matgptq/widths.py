"""Choosing the width: at launch, and of a running engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode, set_current_vllm_config

from matgptq.config import QUANT_METHOD
from matgptq.linear import match_bits

from .linear import FusedLinear, token_counts

EXTENSION = "vllm_matgptq.WidthExtension"


def engine_args(bits: int | Mapping[str, int] | None = None, *, resident: bool = False) -> dict[str, Any]:
    """Arguments for ``vllm.LLM`` or ``AsyncEngineArgs`` that choose the width.

    Args:
        bits: one width for all layers, or a map from layer name or shell-style pattern to width, in place of
            the folder's ``bits_per_layer``: the others get its ``bits``; None for the folder's widths.
        resident: hold all bits of the weights, so that `set_bits` works.

    Example:
        >>> engine_args(3)
        {'hf_overrides': {'quantization_config': {'quant_method': 'matgptq', 'bits': 3}}}
    """
    values: dict[str, Any] = {"quant_method": QUANT_METHOD}
    if bits is not None:
        values |= {"bits_per_layer": dict(bits)} if isinstance(bits, Mapping) else {"bits": bits}
    if resident:
        values["resident"] = True
    args: dict[str, Any] = {"hf_overrides": {"quantization_config": values}}
    return {**args, "worker_extension_cls": EXTENSION} if resident else args


def set_bits(llm: Any, bits: int | Mapping[str, int]) -> float:
    """Change the width of a running engine: the weights stay, CUDA graphs are captured again.

    Args:
        llm: a ``vllm.LLM`` started with ``engine_args(resident=True)``, without requests under way.
        bits: one width, or a map from layer name or shell-style pattern to width; others keep theirs.

    Returns:
        Seconds that it took, the slowest rank's.

    Raises:
        ValueError: the weights are not resident, a layer cannot serve its width, or an entry matches no layer; nothing
            is changed then. From a worker in another process vLLM raises its own error with this one's text.
        RuntimeError: there are requests under way, whose keys and values would be of both widths; nothing is changed.
    """
    if llm.reset_prefix_cache() is False:  # keys and values of the old width
        raise RuntimeError("llm must have no requests under way when its width is changed, got some")
    return max(llm.collective_rpc("matgptq_set_bits", args=(bits if isinstance(bits, int) else dict(bits),)))


class WidthExtension:
    """What ``worker_extension_cls`` adds to vLLM's workers."""

    model_runner: Any
    vllm_config: Any

    def matgptq_set_bits(self, bits: int | Mapping[str, int]) -> float:
        """`set_bits` on one rank; returns the seconds that it took."""
        start = time.perf_counter()
        stages = self.vllm_config.parallel_config.pipeline_parallel_size
        if stages > 1 and not isinstance(bits, int):  # a stage cannot tell which entries match layers of the others
            raise ValueError(f"bits must be one width for all layers in {stages} pipeline stages, got {bits}")
        model = self.model_runner.get_model()
        layers = [module for module in model.modules() if isinstance(module, FusedLinear)]
        chosen = choose_widths(layers, bits)
        changed = [(layer, new) for layer, new in zip(layers, chosen, strict=True) if new != layer.bits]
        for layer, widths in changed:
            layer.set_bits(widths)
        for layer, _ in changed:
            layer.warm_up(token_counts(self.vllm_config))
        if changed:
            capture_again(self.model_runner, self.vllm_config)
        return time.perf_counter() - start


def choose_widths(layers: list[FusedLinear], bits: int | Mapping[str, int]) -> list[list[int]]:
    """The width of every layer of the checkpoint that each of ``layers`` holds, checked.

    Raises:
        ValueError: as `set_bits`.
    """
    names = [name for layer in layers for name in layer.names]
    if not names:
        raise ValueError("model must have MatGPTQ layers, got none")
    wanted: Mapping[str, int] = bits if isinstance(bits, Mapping) else {"*": bits}
    for key in wanted:
        if not any(match_bits(name, {key: 1}) for name in names):
            raise ValueError(f"bits must name quantised layers of the model, got {key!r} which matches none")
    chosen = []
    for layer in layers:
        if not layer.resident:
            raise ValueError(
                f"resident must be true to change the width of a running engine, got false ({layer.names[0]})"
            )
        widths = []
        for name, old, able in zip(layer.names, layer.bits, layer.widths, strict=True):
            new = match_bits(name, wanted)
            if new is not None and (isinstance(new, bool) or new not in able):
                raise ValueError(f"bits must be one of {', '.join(map(str, able))} for {name}, got {new!r}")
            widths.append(old if new is None else new)
        chosen.append(widths)
    return chosen


def capture_again(runner: Any, vllm_config: Any) -> None:
    """Drop the CUDA graphs, which hold the old width, and capture them at the new one.

    vLLM has two model runners. The older holds its graphs in wrappers, the newer in a manager too.
    """
    if runner.device.type != "cuda" or vllm_config.model_config.enforce_eager:
        return
    if vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
        return
    manager = getattr(runner, "cudagraph_manager", None)
    graphs = {} if manager is None else manager.graphs
    # torch refuses to capture into a pool whose last graph is gone: one old graph stays until there are new ones
    kept = list(graphs.values())[:1]
    for wrapper in CUDAGraphWrapper._all_instances:
        kept += [entry.cudagraph for entry in wrapper.concrete_cudagraph_entries.values()][:1]
    CUDAGraphWrapper.clear_all_graphs()
    if manager is not None and hasattr(manager, "release_graphs"):
        manager.release_graphs()
    elif manager is not None:
        graphs.clear()
        manager._graphs_captured = False
    with set_current_vllm_config(vllm_config):
        runner.capture_model()
    del kept
