"""Programmatic dependent launch in what vLLM compiles, for models that our kernels serve (`matgptq.overlap`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from matgptq.overlap import OPTION, fills

logger = init_logger(__name__)


class Guard(InductorPass):
    """Leaves the option off for a graph that may have a kernel which does not wait."""

    def __call__(self, graph: fx.Graph) -> None:
        """Look at a graph before it is lowered, within the scope of its own options."""
        if inductor.triton.enable_pdl and fills(graph):
            logger.warning("A part of the model fills tensors with constants: its kernels do not overlap.")
            inductor.triton.enable_pdl = False

    def uuid(self) -> str:
        """What compiled code is cached by."""
        return str(InductorPass.hash_source(self, fills))


def overlap_launches(vllm_config: VllmConfig) -> None:
    """Ask for overlapping launches, unless the user has set the option or has a pass of their own."""
    if not current_platform.is_cuda() or torch.cuda.get_device_capability()[0] < 9:
        return
    options: dict[str, Any] = vllm_config.compilation_config.inductor_compile_config
    pass_key = current_platform.pass_key
    if OPTION not in options and pass_key not in options:
        options |= {OPTION: True, pass_key: Guard()}
