"""What vLLM's compiler is told of our layers.

Compiled, ``silu(gate) * up`` is the end of the call that computes gate and up (`matgptq.inductor.gate_linears`), and
RMSNorm of a sum is part of the calls before and after it (`matgptq.inductor.norm_linears`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from vllm.platforms import current_platform

from matgptq import inductor
from matgptq.kernels.problem import MEAN_ROWS
from matgptq.overlap import OPTION, SCHEDULER_OPTION, WaitFirst

_ops = torch.ops.vllm_matgptq
_OPS_FILE = str(Path(__file__).with_name("linear.py"))


class FuseLinears(CustomGraphPass):
    """`matgptq.inductor.gate_linears` and `norm_linears` of ``vllm_matgptq::linear``."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` before it is lowered."""
        inductor.gate_linears(graph, _gated_call)
        inductor.norm_linears(graph, _summed_call, _scaled_call)

    def uuid(self) -> Any:
        """What compiled code is cached by."""
        return get_hash_for_files((__file__, _OPS_FILE, inductor.__file__)).hex()  # vLLM writes it as JSON


def _gated_call(node: fx.Node, size: int) -> tuple[Any, ...] | None:
    return (*node.args[:2], size, True) if node.target is _ops.linear.default else None


def _summed_call(node: fx.Node) -> inductor.Call | None:
    if node.target is not _ops.linear.default or node.args[2] % MEAN_ROWS:  # type: ignore[operator]
        return None
    return _ops.summed_linear.default, node.args[1:]


def _scaled_call(node: fx.Node) -> inductor.Call | None:
    return (_ops.scaled_linear.default, node.args[1:]) if node.target is _ops.linear.default else None


def set_compile_options(vllm_config: Any) -> None:
    """Have vLLM's compiler call `FuseLinears`, and its kernels overlap with ours (`matgptq.overlap`).

    Options that the user has set stay.
    """
    options: dict[str, Any] = vllm_config.compilation_config.inductor_compile_config
    options.setdefault(inductor.PASS_OPTION, FuseLinears())
    if not current_platform.is_cuda() or torch.cuda.get_device_capability()[0] < 9:
        return
    if OPTION not in options and SCHEDULER_OPTION not in options:
        options |= {OPTION: True, SCHEDULER_OPTION: WaitFirst()}
