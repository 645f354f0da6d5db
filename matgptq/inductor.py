"""What Inductor, torch.compile's compiler, is told about a decoding step (`matgptq.decode`).

Layers that share an input become one call (`join_linears`): q, k and v; gate and up. From compute capability 9 on,
generated kernels overlap with ours (`matgptq.overlap`). That is right because every kernel waits for the end of the one
before it, which has waited too, before it lets the next one start:

- ours before they read x or write; earlier they read weights, which no kernel writes;
- generated ones before they touch anything (`overlap.WaitFirst`);
- kernels of libraries (attention, the output layer) start when all before them has ended.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from . import overlap
from .kernels.packing import follows

_ONE, _SEVERAL = torch.ops.matgptq.packed_linear_at.default, torch.ops.matgptq.packed_linears_at.default
_aten = torch.ops.aten


def step_options(device: torch.device) -> dict[str, Any]:
    """``options`` of ``torch.compile`` for a decoding step on ``device``."""
    options: dict[str, Any] = {"post_grad_custom_pre_pass": JoinLinears()}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        options |= {overlap.OPTION: True, overlap.SCHEDULER_OPTION: overlap.WaitFirst()}
    return options


class JoinLinears(CustomGraphPass):
    """`join_linears` for Inductor, whose graph of ATen ops has no mutation: one node is one value."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` before it is lowered."""
        join_linears(graph)

    def uuid(self) -> Any:
        """What compiled code is cached by; torch 2.11 does not ask `overlap.WaitFirst`."""
        return get_hash_for_files((__file__, overlap.__file__))


def join_linears(graph: fx.Graph) -> None:
    """Make one ``packed_linears_at`` of ``packed_linear_at`` that share an input and lie one after another in memory.

    That they do is read off the graph's inputs, and again from the tensors when the op runs: if they were moved since,
    it makes a call of each.
    """
    latest: dict[Any, list[fx.Node]] = {}
    runs = []
    for node in graph.find_nodes(op="call_function", target=_ONE):
        if any(n.op not in ("placeholder", "get_attr") for n in node.all_input_nodes if n is not node.args[0]):
            continue  # it may not be there yet where the first of the run is
        run = latest.get(_kind(node))
        if run and follows(_planes(run[-1]), _planes(node)):
            run.append(node)
        else:
            latest[_kind(node)] = run = [node]
            runs.append(run)
    for run in runs:
        if len(run) > 1:
            _join(graph, run)


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """What is equal in layers that can be one."""
    x, _, scales, zeros, bias, _, in_features, _, *rest = node.args
    if isinstance(x, fx.Node) and x.target is _aten.index_select.default:
        x = x.args  # type: ignore[assignment]  # each layer orders x by itself
    return x, len(scales), zeros is None, bias is None, in_features, *rest  # type: ignore[arg-type]


def _planes(node: fx.Node) -> torch.Tensor:
    planes = node.args[1]
    assert isinstance(planes, fx.Node)
    return planes.meta["val"]


def _join(graph: fx.Graph, run: list[fx.Node]) -> None:
    columns: list[Any] = list(zip(*(node.args for node in run), strict=True))
    x, planes, scales, zeros, biases, widths, in_features, out_features, *rest = columns
    lists = [
        [tensor for tensor in tensors if tensor is not None]
        for tensors in (planes, itertools.chain.from_iterable(scales), zeros, biases)
    ]
    with graph.inserting_before(run[0]):
        y = graph.call_function(
            _SEVERAL, (x[0], *lists, list(widths), in_features[0], list(out_features), *(c[0] for c in rest))
        )
        like = run[0].meta["val"]
        y.meta["val"] = like.new_empty(*like.shape[:-1], sum(out_features))
        start = 0
        for node, size in zip(run, out_features, strict=True):
            piece = graph.call_function(_aten.slice.Tensor, (y, like.dim() - 1, start, start + size))
            piece.meta["val"] = y.meta["val"][..., start : start + size]
            # What follows may count on the strides; as an elementwise op it becomes part of the kernel that reads it.
            output = graph.call_function(_aten.clone.default, (piece,), {"memory_format": torch.contiguous_format})
            output.meta = node.meta
            node.replace_all_uses_with(output)
            start += size
    for node in run:
        graph.erase_node(node)
