"""What Inductor, torch.compile's compiler, is told about a decoding step (`matgptq.decode`).

Layers that share an input become one call (`join_linears`): q, k and v; gate and up. So does what follows gate and up,
``silu(gate) * up`` (`gate_linears`). From compute capability 9 on, generated kernels overlap with ours
(`matgptq.overlap`). That is right because every kernel waits for the end of the one before it, which has waited too,
before it lets the next one start:

- ours before they read x or write; earlier they read weights, which no kernel writes;
- generated ones before they touch anything (`overlap.WaitFirst`);
- kernels of libraries (attention, the output layer) start when all before them has ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import (
    Match,
    PatternExpr,
    PatternMatcherPass,
    fwd_only,
    gen_pattern,
    register_graph_pattern,
)

from . import overlap
from .kernels.packing import TILE, follows

_ONE, _SEVERAL = torch.ops.matgptq.packed_linear_at.default, torch.ops.matgptq.packed_linears_at.default
_aten = torch.ops.aten

PASS_OPTION = "post_grad_custom_pre_pass"  # of torch._inductor.config: what rewrites the graph of ATen ops


def step_options(device: torch.device) -> dict[str, Any]:
    """``options`` of ``torch.compile`` for a decoding step on ``device``."""
    options: dict[str, Any] = {PASS_OPTION: JoinLinears()}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        options |= {overlap.OPTION: True, overlap.SCHEDULER_OPTION: overlap.WaitFirst()}
    return options


class JoinLinears(CustomGraphPass):
    """`join_linears` and `gate_linears` for Inductor, whose graph of ATen ops has no mutation: a node is one value."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` before it is lowered."""
        join_linears(graph)
        gate_linears(graph, gated_call)

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
    if isinstance(x, fx.Node) and x.target is _aten.index.Tensor:  # each layer orders x by itself
        x = x.args[0], *x.args[1]  # type: ignore[assignment,misc]
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


Gated = Callable[[fx.Node, int], tuple[Any, ...] | None]


def gate_linears(graph: fx.Graph, gated: Gated) -> None:
    """Make ``silu(y[..., :N]) * y[..., N:]`` one call of the op that computes y, which has to offer that.

    Args:
        gated: the arguments that make the op of a node return this, for its y of 2 N values; None if it cannot.
    """
    patterns = PatternMatcherPass()

    def parts(match: Match) -> tuple[fx.Node, int] | None:
        gate, up = match.kwargs["gate"], match.kwargs["up"]
        (y, start, middle), (other, begin, end) = _part(gate), _part(up)
        if y is None or y is not other or (start, middle) != (0, begin) or 2 * middle != y.meta["val"].shape[-1]:
            return None
        if len(y.users) > 2 or not {*gate.users, *up.users} <= set(match.nodes):
            return None  # they are asked for themselves too
        if any(node.args[1] != 1 for node in match.nodes if node.target is _aten.add.Tensor):
            return None  # the pattern does not compare numbers, and this one makes it silu
        return (y, middle) if end >= 2 * middle and gated(y, middle) is not None else None

    @register_graph_pattern(_gate_pattern(), extra_check=lambda match: parts(match) is not None, pass_dict=patterns)
    def replace(match: Match, **operands: fx.Node) -> None:
        found = parts(match)
        assert found
        y, output = found[0], match.output_node()
        with graph.inserting_before(output):
            call = graph.call_function(y.target, gated(*found))  # type: ignore[arg-type]
        call.meta = output.meta
        output.replace_all_uses_with(call)
        match.erase_nodes()

    if patterns.apply(graph):
        graph.eliminate_dead_code()


def gated_call(node: fx.Node, size: int) -> tuple[Any, ...] | None:
    """`gate_linears`' argument for the calls that `join_linears` makes."""
    if node.target is not _SEVERAL or node.args[7] != [size, size] or size % TILE:
        return None
    return *node.args, True


def _part(node: Any) -> tuple[fx.Node | None, int, int]:
    """The tensor that a node is some of the last dimension of, and from where to where."""
    if isinstance(node, fx.Node) and node.target is _aten.clone.default:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not _aten.slice.Tensor or len(node.args) != 4:
        return None, 0, 0
    y, dim, start, end = node.args
    assert isinstance(y, fx.Node)
    return (y, start, end) if dim == y.meta["val"].dim() - 1 else (None, 0, 0)  # type: ignore[return-value]


@cache
def _gate_pattern() -> PatternExpr:
    """``silu(gate) * up`` as ATen ops, as Inductor has them; numbers and types are not compared."""

    def search(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up

    halves = [torch.empty(2, TILE, dtype=torch.bfloat16) for _ in range(2)]
    return gen_pattern(search, halves, fwd_only)
