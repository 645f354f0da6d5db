"""vLLM serves MatGPTQ folders: installing this distribution is enough, the entry point `register` does the rest.

    from vllm import LLM
    llm = LLM(model="folder-or-hub-name")                                        # at the width of its config.json
    llm = LLM(model="folder-or-hub-name", **vllm_matgptq.engine_args(bits=3))    # at 3 bits
    llm = LLM(model="folder-or-hub-name", **vllm_matgptq.engine_args(resident=True))
    vllm_matgptq.set_bits(llm, 2)                                                # the engine runs on, at 2 bits

``docs/vllm.md`` has the rest.
"""

from .config import MatGPTQConfig, register
from .widths import WidthExtension, engine_args, set_bits

__all__ = ["MatGPTQConfig", "WidthExtension", "engine_args", "register", "set_bits"]

register()
