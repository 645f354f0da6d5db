"""Serve one nested-quantised checkpoint at 2 to 8 bits.

    import matgptq
    model = matgptq.load("folder-or-hub-name", bits=4)
    matgptq.set_bits(model, 3)

Importing the package registers it with Transformers, where that is installed, so that
``AutoModelForCausalLM.from_pretrained`` reads MatGPTQ folders.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .checkpoint import CheckpointError
from .config import QuantConfig
from .folder import slice_folder
from .linear import MatGPTQLinear, quantized_layers, set_bits
from .ops import linear
from .packed import PackedLinear, pack, warmup
from .slicing import code_levels, dequantize, slice_codes

if TYPE_CHECKING:
    from .export import convert
    from .hf import MatGPTQConfig, load
    from .quantizer.gptq import Method
    from .quantizer.pipeline import quantize

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "MatGPTQConfig",
    "MatGPTQLinear",
    "Method",
    "PackedLinear",
    "QuantConfig",
    "code_levels",
    "convert",
    "dequantize",
    "linear",
    "load",
    "pack",
    "quantize",
    "quantized_layers",
    "set_bits",
    "slice_codes",
    "slice_folder",
    "warmup",
]

_NEEDS_TRANSFORMERS = {
    "MatGPTQConfig": "hf",
    "load": "hf",
    "convert": "export",
    "quantize": "quantizer.pipeline",
}

if importlib.util.find_spec("transformers") is not None:
    from . import hf  # noqa: F401 - registers the quantiser


def __getattr__(name: str) -> Any:
    if name == "Method":
        return importlib.import_module(".quantizer.gptq", __name__).Method
    if name not in _NEEDS_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(f"matgptq.{name} needs Transformers: pip install 'matgptq[transformers]'")
    return getattr(importlib.import_module(f".{_NEEDS_TRANSFORMERS[name]}", __name__), name)
