"""What a model folder holds, and what it would weigh at each width: ``matgptq info``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .checkpoint import check_folder
from .ops import servable
from .slicing import MAX_BITS, MIN_BITS


def info_of(folder: str | Path) -> dict[str, Any]:
    """What ``matgptq info`` tells of a folder; nothing but headers is read."""
    config, layers, tensors = check_folder(folder)
    owned = {f"{name}.{suffix}" for name in layers for suffix in ("qweight", "scales", "zeros", "perm", "bias")}
    owned |= {f"{name}.scales_{bits}" for name in layers for bits in range(MIN_BITS, MAX_BITS + 1)}
    dense = sum(t.nbytes for name, t in tensors.items() if name not in owned)
    stored = {name: layer.stored_bits or config.master_bits for name, layer in layers.items()}
    by_width = {}
    for bits in range(MAX_BITS, MIN_BITS - 1, -1):
        if all(servable(bits, stored[name], config.slicing, config.master_bits) for name in layers):
            by_width[str(bits)] = dense + sum(layer.nbytes_at(bits, config, tensors) for layer in layers.values())
    return {
        "quantized_layers": len(layers),
        "quantized_weights": sum(layer.out_features * layer.in_features for layer in layers.values()),
        "group_size": config.group_size,
        "sym": config.sym,
        "slicing": config.slicing,
        "master_bits": config.master_bits,
        "stored_bits": _counted(stored.values()),
        "bits": _counted(config.bits_for(name) for name in layers),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "dense_bytes": dense,
        "bytes_by_width": by_width,
        "layers": {
            name: {
                "out_features": layer.out_features,
                "in_features": layer.in_features,
                "stored_bits": stored[name],
                "bits": config.bits_for(name),
            }
            for name, layer in layers.items()
        },
    }


def _counted(values: Any) -> dict[str, int]:
    return {str(bits): count for bits, count in sorted(Counter(values).items(), reverse=True)}
