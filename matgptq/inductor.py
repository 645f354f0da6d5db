"""What Inductor, torch.compile's compiler, is told about a decoding step (`matgptq.decode`).

Layers that share an input become one call (`join_linears`): q, k and v; gate and up. So does what follows gate and up,
``silu(gate) * up`` (`gate_linears`). The calls around RMSNorm of a sum take part in it (`norm_linears`). From compute
capability 9 on, generated kernels overlap with ours (`matgptq.overlap`). That is right because every kernel waits for
the end of the one before it, which has waited too, before it lets the next one start:

- ours before they read x or write; earlier they read weights, which no kernel writes;
- generated ones before they touch anything (`overlap.WaitFirst`);
- kernels of libraries (attention, the output layer) start when all before them has ended.
"""

from __future__ import annotations

import itertools
import operator
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
from .kernels.matmul import means_of
from .kernels.packing import TILE, follows
from .kernels.problem import MEAN_ROWS

_ONE, _SEVERAL = torch.ops.matgptq.packed_linear_at.default, torch.ops.matgptq.packed_linears_at.default
_SUMMED, _SCALED = torch.ops.matgptq.summed_linear_at.default, torch.ops.matgptq.scaled_linears_at.default
_aten = torch.ops.aten

PASS_OPTION = "post_grad_custom_pre_pass"  # of torch._inductor.config: what rewrites the graph of ATen ops


def step_options(device: torch.device) -> dict[str, Any]:
    """``options`` of ``torch.compile`` for a decoding step on ``device``."""
    options: dict[str, Any] = {PASS_OPTION: JoinLinears()}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        options |= {overlap.OPTION: True, overlap.SCHEDULER_OPTION: overlap.WaitFirst()}
    return options


class JoinLinears(CustomGraphPass):
    """All three for Inductor, whose graph of ATen ops has no mutation: a node is one value."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` before it is lowered."""
        join_linears(graph)
        gate_linears(graph, gated_call)
        norm_linears(graph, summed_call, scaled_call)

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
        if not all(_is_given(n) for n in node.all_input_nodes if n is not node.args[0]):
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


Call = tuple[Any, tuple[Any, ...]]  # an op, and its last arguments


def norm_linears(
    graph: fx.Graph, summed: Callable[[fx.Node], Call | None], scaled: Callable[[fx.Node], Call | None]
) -> None:
    """Make RMSNorm of a sum, which lies between two linear ops, part of these (`matgptq.kernels.shared_norm`).

    Args:
        summed: of a node, the op that computes ``rms_norm(y + residual)`` in place of its y, and that one's arguments
            behind x, residual, norm and eps. It returns z, the sum and means. None if there is no such op.
        scaled: of a node whose input that is, the op that takes z and means, and that one's arguments behind them.
    """
    for after in list(graph.nodes):
        last = scaled(after)
        z = after.args[0] if last else None
        found = (_norm_of_sum(z) or _vllm_norm(z)) if isinstance(z, fx.Node) and len(z.users) == 1 else None
        if last is None or found is None:
            continue
        assert isinstance(z, fx.Node)
        place, total, pair, norm = found
        for before, residual in itertools.permutations(pair, 2):
            first = summed(before) if len(before.users) == 1 else None
            if first is None:
                continue
            with graph.inserting_before(place):
                call = graph.call_function(first[0], (before.args[0], residual, *norm, *first[1]))
                means = means_of(before.meta["val"])
                call.meta["val"] = (z.meta["val"], total.meta["val"], means)
                outputs = [graph.call_function(operator.getitem, (call, i)) for i in range(3)]
            for output, meta in zip(outputs, (z.meta, total.meta, {"val": means}), strict=True):
                output.meta = {**meta}
            with graph.inserting_before(after):
                y = graph.call_function(last[0], (outputs[0], outputs[2], *last[1]))
            y.meta["val"] = after.meta["val"]
            after.replace_all_uses_with(y)
            total.replace_all_uses_with(outputs[1])
            graph.erase_node(after)
            break
    graph.eliminate_dead_code()


def summed_call(node: fx.Node) -> Call | None:
    """`norm_linears`' argument for `packed_linear_at`."""
    return (_SUMMED, node.args[1:]) if node.target is _ONE and node.args[7] % MEAN_ROWS == 0 else None  # type: ignore[operator]


def scaled_call(node: fx.Node) -> Call | None:
    """`norm_linears`' argument for `packed_linear_at` and for the calls that `join_linears` and `gate_linears` make."""
    if node.target is _SEVERAL:
        return _SCALED, node.args[1:]
    if node.target is not _ONE:
        return None
    _, planes, scales, zeros, bias, width, in_features, out_features, *rest = node.args
    optional = ([] if v is None else [v] for v in (zeros, bias))
    return _SCALED, ([planes], scales, *optional, [width], in_features, [out_features], *rest)


# The first node of it, the sum, what is added up, norm and eps.
NormOfSum = tuple[fx.Node, fx.Node, tuple[fx.Node, fx.Node], tuple[fx.Node, float]]


def _norm_of_sum(z: fx.Node) -> NormOfSum | None:
    """RMSNorm of a sum as Transformers' layers compute it, in ATen ops."""
    for norm, rounded in itertools.permutations(_operands(z, _aten.mul.Tensor, 2), 2):
        scaled = _converted(rounded, torch.float16, torch.bfloat16)
        for h, root in itertools.permutations(_operands(scaled, _aten.mul.Tensor, 2), 2):
            (shifted,) = _operands(root, _aten.rsqrt.default, 1) or (None,)
            mean, eps = _operands(shifted, _aten.add.Tensor, 2) or (None, None)
            square, *over = _operands(mean, _aten.mean.dim, 3) or (None,)
            if _operands(square, _aten.pow.Tensor_Scalar, 2) != (h, 2) or over != [[-1], True]:
                continue
            total = _converted(h, torch.float32)
            x, residual = _operands(total, _aten.add.Tensor, 2) or (None, None)
            if _alike(x, residual, total, z) and _is_weight(norm) and isinstance(eps, float):
                return total, total, (x, residual), (norm, eps)  # type: ignore[return-value]
    return None


def _vllm_norm(z: fx.Node) -> NormOfSum | None:
    """The same by vLLM's own op for that, whose results are z and the sum."""
    both = _operands(z, operator.getitem, 2)
    if not both or both[1] != 0:
        return None
    node = both[0]
    is_norm = str(getattr(node.target, "_schema", "")).startswith("vllm_ir::fused_add_rms_norm(")
    if not is_norm or node.kwargs or len(node.args) < 4:
        return None
    x, residual, norm, eps, *size = node.args
    total = next((user for user in node.users if user.args[1] == 1), None)
    if total is None or size not in ([], [None]) or not _is_weight(norm) or not _alike(x, residual, total, z):
        return None
    return node, total, (x, residual), (norm, eps)


def _operands(node: Any, target: Any, count: int) -> tuple[Any, ...]:
    """What a node computes from, if it is a call of ``target`` with so many arguments; else nothing."""
    is_call = isinstance(node, fx.Node) and node.target is target and len(node.args) == count and not node.kwargs
    return node.args if is_call else ()


def _converted(node: Any, *dtypes: torch.dtype) -> fx.Node | None:
    """What a node of one of these types was converted from."""
    operands = _operands(node, torch.ops.prims.convert_element_type.default, 2)
    return operands[0] if operands and operands[1] in dtypes else None


def _is_weight(node: Any) -> bool:
    """Whether a node is a vector that the graph is given."""
    return isinstance(node, fx.Node) and _is_given(node) and node.meta["val"].dim() == 1


def _is_given(node: fx.Node) -> bool:
    """Whether a node is there before all that the graph computes."""
    return node.op in ("placeholder", "get_attr")


def _alike(*nodes: Any) -> bool:
    """Whether nodes are tensors of one type and shape."""
    if not all(isinstance(n, fx.Node) for n in nodes):
        return False
    values = [n.meta["val"] for n in nodes]
    return len({(v.dtype, *map(str, v.shape)) for v in values}) == 1  # a size may be a symbol


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
