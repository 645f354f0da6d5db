"""Model folders of a known geometry with random contents: speed and memory can be measured without a download.

Codes are normal about the middle of their range, as those of trained weights, and scales such that dequantised weights
have the standard deviation that training starts with. So activations stay finite, and the weights of no width have a
mean: of uniform codes, those that are rounded up at the top of the range would lend all outputs of a layer a common
part, whose sign a rounding can turn. The text that such a model writes means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from .checkpoint import CONFIG, INDEX
from .config import QuantConfig
from .folder import new_folder, write_json
from .hf import is_linear
from .planes import pack_planes
from .slicing import check_bits, group_count, slice_codes

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA3,
        **_sizes(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True),
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
    },
    "llama-3.1-8b": {
        **_LLAMA3,
        **_sizes(4096, 14336, 32, 32),
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    "llama-3.1-70b": {
        **_LLAMA3,
        **_sizes(8192, 28672, 80, 64),
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    "qwen3-0.6b": {**_QWEN3, **_sizes(1024, 3072, 28, 16, tie_word_embeddings=True)},
    "qwen3-8b": {**_QWEN3, **_sizes(4096, 12288, 36, 32)},
    "qwen3-32b": {**_QWEN3, **_sizes(5120, 25600, 64, 64)},
    "smollm2-135m": {
        "model_type": "llama",
        **_sizes(576, 1536, 30, 9, num_key_value_heads=3, tie_word_embeddings=True),
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
"""Geometries by name: what ``AutoConfig.for_model`` is given."""


def model_config(arch: str | Path) -> PretrainedConfig:
    """Transformers' config of a geometry: a name of `ARCHITECTURES`, or a folder with a config.json.

    Raises:
        ValueError: ``arch`` is neither.
    """
    if str(arch) in ARCHITECTURES:
        return AutoConfig.for_model(**ARCHITECTURES[str(arch)])
    if not (Path(arch) / CONFIG).is_file():
        names = ", ".join(ARCHITECTURES)
        raise ValueError(f"arch must be a folder with a {CONFIG}, or one of {names}; got {str(arch)!r}")
    return AutoConfig.from_pretrained(arch)


def write_dummy(
    arch: str | Path,
    out: str | Path,
    *,
    quantization: QuantConfig | None = None,
    stored_bits: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    config_only: bool = False,
) -> QuantConfig | None:
    """Write a model folder of random contents, a file a block; all linear layers but the output are quantised.

    Args:
        arch: a name of `ARCHITECTURES`, or a folder with a config.json.
        out: the new folder.
        quantization: how to quantise; None for a dense model.
        stored_bits: store bit planes of this one width, which is then served too; None for whole codes.
        dtype: type of what is not quantised, and of scales.
        device: where to draw random numbers; a GPU is faster.
        seed: of the random numbers.
        config_only: write config.json alone, for engines that make up weights themselves.

    Returns:
        The folder's quantisation config.

    Raises:
        ValueError: ``arch`` is not known, or a width or group size does not fit.
        FileExistsError: ``out`` is there already.
    """
    config = model_config(arch)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    values = {**config.to_dict(), "architectures": [type(model).__name__]}
    values.pop("quantization_config", None)
    if quantization is not None:
        if stored_bits is not None:
            check_bits(stored_bits, name="stored_bits", most=quantization.master_bits)
            quantization = QuantConfig.from_dict({**quantization.to_dict(), "bits": stored_bits})
        values["quantization_config"] = quantization.to_dict()
    quantized = _quantized(model, quantization)
    draw = _Random(torch.Generator(device).manual_seed(seed), dtype, getattr(config, "initializer_range", 0.02))
    with new_folder(out) as folder:
        if not config_only:
            places: dict[str, str] = {}
            total = 0
            for index, tensors in enumerate(_blocks(model, draw, quantized, quantization, stored_bits)):
                file = f"model-{index:05}.safetensors"
                save_file(tensors, folder / file, metadata={"format": "pt"})
                places.update(dict.fromkeys(tensors, file))
                total += sum(tensor.nbytes for tensor in tensors.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        write_json(folder / CONFIG, values)
    return quantization


def random_codes(
    shape: tuple[int, int], master_bits: int, device: torch.device, generator: torch.Generator | None = None
) -> tuple[Tensor, float]:
    """uint8 codes, normal about the middle of their range, and their standard deviation."""
    top = 2**master_bits
    codes = torch.empty(shape, dtype=torch.float16, device=device).normal_(top / 2, top / 6, generator=generator)
    return codes.round_().clamp_(0, top - 1).to(torch.uint8), top / 6


class _Random:
    def __init__(self, generator: torch.Generator, dtype: torch.dtype, std: float) -> None:
        self.generator, self.dtype, self.std = generator, dtype, std

    def dense(self, shape: torch.Size, name: str) -> Tensor:
        if len(shape) == 1:  # of norms; biases are zero
            return torch.full(shape, float(not name.endswith("bias")), dtype=self.dtype)
        return self._normal(tuple(shape)).mul_(self.std).cpu()

    def quantized(self, shape: torch.Size, config: QuantConfig, stored_bits: int | None) -> dict[str, Tensor]:
        rows, columns = shape
        device = self.generator.device
        codes, deviation = random_codes((rows, columns), config.master_bits, device, self.generator)
        if stored_bits is not None:
            slices = slice_codes(codes, stored_bits, config.slicing, master_bits=config.master_bits)
            codes = pack_planes(slices, stored_bits)
        groups = (rows, group_count(columns, config.group_size))
        scale = self.std / deviation
        spread = torch.empty(groups, device=device).uniform_(0.7, 1.3, generator=self.generator)
        tensors = {"qweight": codes.cpu(), "scales": (spread * scale).to(self.dtype).cpu()}
        if not config.sym:
            middle = 2 ** (config.master_bits - 1)
            zeros = torch.empty(groups, device=device).uniform_(0.9 * middle, 1.1 * middle, generator=self.generator)
            tensors["zeros"] = zeros.round().to(torch.uint8).cpu()
        return tensors

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.generator.device).normal_(generator=self.generator)


def _quantized(model: nn.Module, config: QuantConfig | None) -> set[str]:
    """Names of the layers to quantise; their columns are checked to be whole groups."""
    if config is None:
        return set()
    output = model.get_output_embeddings()  # type: ignore[operator]
    names = set()
    for name, module in model.named_modules():
        if is_linear(module) and module is not output and not config.skips(name):
            group_count(module.in_features, config.group_size, where=name)
            names.add(name)
    return names


def _blocks(
    model: nn.Module, draw: _Random, quantized: set[str], config: QuantConfig | None, stored_bits: int | None
) -> Iterator[Mapping[str, Tensor]]:
    """The folder's tensors, file by file."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    block: dict[str, Tensor] = {}
    present = ""
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        owner, _, suffix = name.rpartition(".")
        numbered = re.match(r".*?\.\d+\.", name)  # the block of a decoder that it belongs to
        place = numbered[0] if numbered else ""
        if block and place != present:
            yield block
            block = {}
        present = place
        if config is not None and owner in quantized and suffix == "weight":
            block.update({f"{owner}.{k}": v for k, v in draw.quantized(parameter.shape, config, stored_bits).items()})
        else:
            block[name] = draw.dense(parameter.shape, name)
    yield block
