"""Programmatic dependent launch for the kernels that ``torch.compile`` generates between ours.

On GPUs of compute capability 9 and later a kernel may be launched while the one before still runs, and waits for it
where it first needs to. Our kernels do so always: they fetch weights while they wait. With Inductor's option
``triton.enable_pdl`` the kernels that it generates do so too, and let ours start early: a step of an 8B model has eight
such places a layer.

Each kernel then waits for the one before it alone, so every kernel in the chain must wait: what follows a kernel that
did not could start before the work ahead of that is done. Inductor's kernels wait before they write and before they
read what the kernel before wrote, save those that load nothing at all, which only fill a tensor with constants, and
save what the kernel before wrote in place. `WaitFirst` has all of them wait, before anything else.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._inductor import config, custom_graph_pass

logger = logging.getLogger(__name__)

OPTION, SCHEDULER_OPTION = "triton.enable_pdl", "_post_fusion_custom_pass"  # of torch._inductor.config


_Pass: Any = getattr(custom_graph_pass, "CustomSchedulerPass", object)  # torch 2.11 has none, and asks for none


class WaitFirst(_Pass):  # type: ignore[misc]
    """Has every kernel that Inductor generates wait before it touches memory at all: `SCHEDULER_OPTION`.

    By itself Inductor lets a kernel read first what the generated kernel before did not write, and overlooks what that
    wrote in place (the key and value of a token, into the cache: torch 2.11 to 2.13). After kernels that it did not
    generate it always waits first. So it is told that all are such: the scheduler of the graph that is compiled never
    knows a previous kernel.
    """

    def __call__(self, nodes: list[Any]) -> list[Any]:
        """``nodes``, as they are; Inductor calls this with the kernels of a graph."""
        for scheduler in {id(node.scheduler): node.scheduler for node in nodes}.values():
            if hasattr(scheduler, "previous_node"):
                forgets = {"previous_node": property(lambda self: None, lambda self, node: None)}
                scheduler.__class__ = type("Scheduler", (type(scheduler),), forgets)
            else:  # a torch that decides otherwise; Inductor compiles within a patch of its options
                logger.warning("torch %s: compiled kernels do not overlap", torch.__version__)
                config.triton.enable_pdl = False
        return nodes

    def uuid(self) -> str:
        """What compiled code is cached by."""
        return custom_graph_pass.get_hash_for_files((__file__,)).hex()
