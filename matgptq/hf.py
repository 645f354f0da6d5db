"""Transformers: ``AutoModelForCausalLM.from_pretrained(folder)`` gives a quantised model once matgptq is imported.

The quantiser class hooks into Transformers' own loader: before weights are loaded it reads the headers of the
folder's files, checks them (Transformers does not compare shapes for quantised models) and puts a `MatGPTQLinear`
where each quantised layer belongs; after loading it checks the values.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import (
    CheckpointError,
    StoredLayer,
    StoredTensor,
    check_folder,
    check_values,
    read_headers,
    stored_layers,
)
from .config import PUBLISHED_METHOD, QUANT_METHOD, QuantConfig
from .linear import quantized_layers, set_bits
from .packed import check_device, pack
from .slicing import check_bits

logger = logging.getLogger(__name__)

# What from_pretrained takes that says where the config is, and whether its code may run.
_WHERE = {"cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision"}
_WHERE |= {"subfolder", "token", "trust_remote_code"}


@register_quantization_config(PUBLISHED_METHOD)
@register_quantization_config(QUANT_METHOD)
class MatGPTQConfig(QuantizationConfigMixin):
    """``quantization_config`` for Transformers.

    A folder brings its own; pass one to ``from_pretrained`` to choose the width at load:
    ``from_pretrained(folder, quantization_config=MatGPTQConfig(bits=3))``.

    Args:
        bits: one width, or a map from layer name or shell-style pattern to width; None for the folder's own.
        stored: the folder's config, filled in by Transformers.

    Raises:
        ValueError: a width is not an integer from 2 to 8.
    """

    def __init__(self, bits: int | Mapping[str, int] | None = None, stored: QuantConfig | None = None) -> None:
        for width in bits.values() if isinstance(bits, Mapping) else () if bits is None else (bits,):
            check_bits(width)
        self.quant_method = QUANT_METHOD
        self.bits = bits
        self.stored = stored

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read a folder's quantization_config, ours or the published one."""
        config = cls(stored=QuantConfig.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The quantization_config that ``save_pretrained`` writes."""
        if self.stored is None:
            return {"quant_method": QUANT_METHOD, "bits": self.bits}
        return self.stored.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`: every key is written."""
        return self.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes from a config that is passed to it."""
        return {} if self.bits is None else {"bits": self.bits}


@register_quantizer(PUBLISHED_METHOD)
@register_quantizer(QUANT_METHOD)
class MatGPTQQuantizer(HfQuantizer):
    """Builds the quantised layers of a model and checks what is loaded into them."""

    quantization_config: MatGPTQConfig
    requires_calibration = True  # a dense model is quantised by `matgptq.quantize`, not while it loads

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError("a MatGPTQ model must be loaded from safetensors files, got a state dict")
        stored = self.quantization_config.stored
        assert stored is not None, "Transformers builds the quantiser from the folder's config"
        tensors = read_headers(checkpoint_files)
        self._files = insert_layers(model, tensors, stored_layers(tensors, stored), stored)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, layer in quantized_layers(model).items():
            if layer.qweight.device.type != "meta":  # offloaded layers are loaded, and checked by shape, later
                check_values(layer, str(self._files[name]))
        if self.quantization_config.bits is not None:
            set_bits(model, self.quantization_config.bits)
            assert self.quantization_config.stored is not None
            self.quantization_config.stored = served_config(model, self.quantization_config.stored)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, Any]]:
        """Called by ``save_pretrained``: writes the widths that are served now into the config."""
        if model.dtype == torch.float64:
            raise ValueError("model must be float16, bfloat16 or float32 to be saved, got torch.float64")
        assert self.quantization_config.stored is not None
        self.quantization_config.stored = served_config(model, self.quantization_config.stored)
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The codes and scales are ordinary tensors of the state dict."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The op has no backward pass."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` sees one op a layer, with a fake, and no graph break."""
        return True


if hasattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"):
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (MatGPTQConfig,)
else:
    logger.warning(
        "this version of Transformers ignores quantization_config=MatGPTQConfig(bits=...): use matgptq.load instead"
    )


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is an `nn.Linear` that computes ``x W^T + b`` alone: some subclasses route to experts."""
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "FalconLinear"


def insert_layers(
    model: nn.Module, tensors: Mapping[str, StoredTensor], layers: Mapping[str, StoredLayer], config: QuantConfig
) -> dict[str, Path]:
    """Replace the linear layers that ``layers`` describes; returns the file of each by module name.

    Raises:
        CheckpointError: a layer has no place in the model or another shape there, or a linear layer of the model has
            neither a weight nor codes.
    """
    prefix = getattr(model, "base_model_prefix", "")
    places: dict[str, StoredLayer] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in layers.items():
        options = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        place = next((option for option in options if is_linear(linears.get(option))), None)
        file = tensors[f"{name}.qweight"].file
        if place is None:
            if "." in name and any(linear.rpartition(".")[0] == name.rpartition(".")[0] for linear in linears):
                raise CheckpointError(f"{file}: {name}.qweight must belong to a linear layer of the model, got none")
            logger.warning("%s: %s has no place in %s and is left out", file, name, type(model).__name__)
            continue
        linear = linears[place]
        want = (linear.out_features, linear.in_features)
        if (layer.out_features, layer.in_features) != want:
            got = (layer.out_features, layer.in_features)
            raise CheckpointError(f"{file}: {name}.qweight must hold {want} codes for this model, got {got}")
        if layer.bias != (linear.bias is not None):
            rule = "must be there" if linear.bias is not None else "must be absent"
            raise CheckpointError(f"{file}: {name}.bias {rule}, got {'a bias' if layer.bias else 'none'}")
        places[place] = layer
    _check_dense(model, linears, places, tensors, config)
    for place, layer in places.items():
        parent, _, child = place.rpartition(".")
        module = layer.module(config, device=linears[place].weight.device)
        module.name = place
        owner = model.get_submodule(parent)
        setattr(owner, child, module)
        if not owner._non_persistent_buffers_set:  # some models begin by filling the weights of the linear layers here
            owner._is_hf_initialized = True  # type: ignore[assignment]
    return {place: tensors[f"{layer.name}.qweight"].file for place, layer in places.items()}


def _check_dense(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    places: Mapping[str, StoredLayer],
    tensors: Mapping[str, StoredTensor],
    config: QuantConfig,
) -> None:
    """Every linear layer that stays dense needs its weight, of the right shape: Transformers would only warn."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    prefix = getattr(model, "base_model_prefix", "")
    folder = next(iter(tensors.values())).file.parent
    for name, linear in linears.items():
        if name in places or f"{name}.weight" in tied:
            continue
        options = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        found = next((tensors[f"{o}.weight"] for o in options if f"{o}.weight" in tensors), None)
        if found is None and any(config.skips(o) for o in options):
            continue  # renamed on the way in, by the model's own rules: Transformers reports it if it is missing
        if found is None:
            raise CheckpointError(f"{folder}: {name} must have a qweight or a weight, got neither")
        if found.shape != tuple(linear.weight.shape):
            want = tuple(linear.weight.shape)
            raise CheckpointError(f"{found.file}: {name}.weight must have shape {want}, got {found.shape}")


def attach_config(model: PreTrainedModel, config: QuantConfig) -> None:
    """Make ``model``, whose layers are quantised already, known to Transformers as such: ``save_pretrained`` works."""
    model.config.quantization_config = MatGPTQConfig(stored=config)
    model.hf_quantizer = MatGPTQQuantizer(model.config.quantization_config)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def served_config(model: nn.Module, config: QuantConfig) -> QuantConfig:
    """``config`` with the widths that the layers of ``model`` serve now: the commonest one, and the exceptions."""
    widths = {name: layer.bits for name, layer in quantized_layers(model).items()}
    if not widths:
        raise ValueError("model must have MatGPTQLinear layers to be saved as a quantised one, got none")
    common = max(set(widths.values()), key=lambda b: (list(widths.values()).count(b), b))
    exceptions = {name: bits for name, bits in widths.items() if bits != common}
    values = {**config.to_dict(), "bits": common, "bits_per_layer": exceptions}
    return QuantConfig.from_dict(values)


def load(
    model: str | Path,
    bits: int | Mapping[str, int] | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    resident: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a quantised causal language model, ready for inference.

    Args:
        model: a folder, or the name of a repository on the Hugging Face hub.
        bits: one width, or a map from layer name or shell-style pattern to width; None for the folder's own.
        dtype: type of activations and of what is not quantised; ``"auto"`` for the folder's own.
        device: where to put the model; the CPU where None. On a GPU its layers are packed (`matgptq.pack`).
        resident: on a GPU, hold all bits, so that `set_bits` works, or each layer's width alone.
        **kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: the model is not quantised by MatGPTQ, or cannot serve a width that is asked for; the device is not
            there, or ``dtype`` is float64.
        CheckpointError: a file breaks a rule of the format, or a tensor of the model is not stored.

    Example:
        >>> model = load("SmolLM2-135M-MatGPTQ", bits=4)                    # doctest: +SKIP
    """
    check_device(device)
    dtype = kwargs.pop("torch_dtype", dtype)  # its old name
    if str(dtype) in ("torch.float64", "float64"):
        raise ValueError("dtype must be float16, bfloat16 or float32, got float64")
    where = {name: value for name, value in kwargs.items() if name in _WHERE}
    config = kwargs.get("config") or AutoConfig.from_pretrained(model, **where)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        raise ValueError(f"model must have a quantization_config in its config.json, got none ({model})")
    QuantConfig.from_dict(stored, where=f"{model}: quantization_config")
    folder = Path(model, kwargs.get("subfolder") or "")
    if folder.is_dir() and not kwargs.get("variant"):  # whose files have other names
        check_folder(folder)  # the index too, which Transformers would follow out of the folder
    loaded, found = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, output_loading_info=True, **kwargs)
    if found["missing_keys"]:  # Transformers fills these with random numbers, and warns
        raise CheckpointError(f"{model}: {', '.join(sorted(found['missing_keys']))} must be stored, got no such tensor")
    if bits is not None:
        set_bits(loaded, bits)
    if device is not None:
        loaded.to(device)
    if loaded.device.type == "cuda":
        if loaded.dtype in (torch.float16, torch.bfloat16):
            pack(loaded, resident=resident)
        else:
            logger.warning("the kernels compute in float16 and bfloat16: with %s the plain op is used", loaded.dtype)
    return loaded.eval()
