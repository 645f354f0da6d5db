"""The MatGPTQ quantiser (arXiv 2602.03537): one set of codes that is good at several widths.

``matgptq.quantize`` does a whole model, `quantize_weight` one matrix.
"""

from .gptq import Method, QuantizedWeight, quantize_weight
from .lookup import CodeLookup, build_lookup

__all__ = ["CodeLookup", "Method", "QuantizedWeight", "build_lookup", "quantize_weight"]
