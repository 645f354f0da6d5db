"""What vLLM asks of a quantisation method: which layers are quantised, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from matgptq.checkpoint import CONFIG, INDEX, WEIGHTS, CheckpointError, folder_headers, read_config, stored_layers
from matgptq.config import PUBLISHED_METHOD, QUANT_METHOD, QuantConfig

from .linear import MatGPTQLinearMethod

METHODS = (QUANT_METHOD, PUBLISHED_METHOD)


class MatGPTQConfig(QuantizationConfig):
    """``quantization_config`` of a folder, with what ``--hf-overrides`` puts in its place.

    The override replaces the whole object, so it may name only what it changes: `maybe_update_config` reads the rest
    from the folder's config.json, and checks the folder's tensors by their headers where they are on this machine.

    Args:
        values: the ``quantization_config`` that vLLM has, with ``resident`` (default false) beside the format's keys.

    Attributes:
        stored: how the layers are stored, and at which widths they are served.
        resident: the layers hold all bits, so that their width can change while the engine runs.
        layers: names of the quantised layers, None where no headers could be read.
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if values is None:  # quantization="matgptq" for a model that is not
            raise ValueError("model must have a quantization_config in its config.json, got none")
        self._asked = dict(values)
        self.resident = self._asked.pop("resident", False)
        if not isinstance(self.resident, bool):
            raise ValueError(f"resident must be true or false, got {self.resident!r}")
        self.stored = QuantConfig().updated(self._asked)
        self.layers: frozenset[str] | None = None

    @classmethod
    def get_name(cls) -> str:
        """Name of the method."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """What the kernels compute in; the CPU op takes float32 too."""
        return [torch.float16, torch.bfloat16] + ([torch.float32] if current_platform.is_cpu() else [])

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere."""
        return 80

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatGPTQConfig:
        """Read the ``quantization_config`` that vLLM has."""
        return cls(config)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, **_: Any) -> str | None:
        """Either method name, in config.json or as ``quantization=``, means this method."""
        ours = isinstance(hf_quant_cfg, Mapping) and hf_quant_cfg.get("quant_method") in METHODS
        return QUANT_METHOD if ours and user_quant in (None, *METHODS) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Complete the config from the folder's own, and check the folder.

        Raises:
            CheckpointError: a file of the folder breaks a rule of the format, or does not serve a width asked for.
        """
        path = cached_file(model_name, CONFIG, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is None:
            return
        _, stored = read_config(Path(path).parent)
        self.stored = stored.updated(self._asked)
        folder = Path(model_name)
        if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
            self.layers = frozenset(stored_layers(folder_headers(folder), self.stored))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename layers as the vLLM model does."""
        values = self.stored.to_dict()
        values["bits_per_layer"] = hf_to_vllm_mapper.apply_dict(values["bits_per_layer"])
        values["modules_to_not_convert"] = hf_to_vllm_mapper.apply_list(values["modules_to_not_convert"])
        self.stored = QuantConfig.from_dict(values)
        if self.layers is not None:
            self.layers = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.layers)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for a layer: ours if it is quantised, vLLM's own if it stayed dense.

        Raises:
            ValueError: experts are quantised, or some but not all of the layers that vLLM fuses are.
        """
        if isinstance(layer, LinearBase | ParallelLMHead):
            names = self.stored_names(prefix)
            if self._is_quantized(prefix, names):
                return MatGPTQLinearMethod(self, prefix, names)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        kind = type(layer).__name__
        if ("MoE" in kind or "Experts" in kind) and self._has_quantized_below(prefix):
            raise ValueError(f"experts must be stored dense, mixtures of experts are not served yet, got {prefix}")
        return None  # embeddings, attention

    def stored_names(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the layers that vLLM's layer ``prefix`` holds."""
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _is_quantized(self, prefix: str, names: list[str]) -> bool:
        if self.layers is None:
            dense = [name for name in names if self.stored.skips(name)]
        else:
            dense = [name for name in names if name not in self.layers]
        if dense and len(dense) < len(names):
            quantized = ", ".join(name for name in names if name not in dense)
            raise ValueError(
                f"layers that vLLM fuses must all be quantised or all be dense, got {quantized} quantised and "
                f"{', '.join(dense)} dense ({prefix})"
            )
        return not dense and not self.stored.skips(prefix)

    def _has_quantized_below(self, prefix: str) -> bool:
        if self.layers is None:
            return not self.stored.skips(prefix)
        return any(name.startswith(f"{prefix}.") for name in self.layers)


def register() -> None:
    """Make the method known to vLLM: the entry point, called in each of its processes, as often as it likes."""
    for method in METHODS:
        register_quantization_config(method)(MatGPTQConfig)


__all__ = ["CheckpointError", "MatGPTQConfig", "register"]
