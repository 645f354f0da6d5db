"""From quantised weights to a model folder: the quantiser's own results, and the published quantiser's raw output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import is_accelerate_available

from .checkpoint import CheckpointError, check_values
from .config import QuantConfig, read_widths
from .folder import check_new, copy_side_files, new_folder
from .hf import attach_config, is_linear
from .linear import MatGPTQLinear
from .quantizer.gptq import QuantizedWeight


def insert_results(model: nn.Module, results: Mapping[str, QuantizedWeight], config: QuantConfig) -> None:
    """Put a quantised layer in the place of each linear layer that ``results`` names."""
    for name, result in results.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        layer = MatGPTQLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            bits=config.bits_for(name),
            group_size=config.group_size,
            sym=config.sym,
            rule=config.slicing,
            master_bits=config.master_bits,
            act_order=result.perm is not None,
            own_widths=result.own_scales,
            dtype=result.scales.dtype,
            name=name,
        )
        for key, tensor in result.tensors().items():
            setattr(layer, key, tensor)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def write_model(model: PreTrainedModel, config: QuantConfig, source: str | Path, tokenizer: Any, folder: Path) -> None:
    """Save a model with quantised layers, its config, its tokenizer and the other files of the folder ``source``.

    Raises:
        ValueError: Transformers cannot load what was written: some models expect a linear layer where they have one.
    """
    attach_config(model, config)
    if isinstance(model.get_output_embeddings(), MatGPTQLinear):
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if Path(source).is_dir():
        copy_side_files(Path(source), folder)
    device = "meta" if is_accelerate_available() else None  # without it Transformers can only load in earnest
    try:
        _, found = AutoModelForCausalLM.from_pretrained(folder, device_map=device, output_loading_info=True)
    except Exception as error:  # the model's own code runs
        reason = f"{type(error).__name__}: {error}"
    else:
        reason = f"no {', '.join(sorted(found['missing_keys']))}" if found["missing_keys"] else ""
    if reason:
        raise ValueError(f"model must load with its linear layers quantised, got {reason} ({source})")


def read_raw(folder: str | Path) -> dict[str, QuantizedWeight]:
    """Read the published quantiser's raw output: ``<folder>/<layer name>/data.pt``.

    Each file is a dict of ``qweight`` uint8 (out_features, in_features), ``scale`` (out_features, groups), ``zero``
    of the same shape or None, and ``perm`` (in_features,) or None. It is read with ``weights_only=True``.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or a tensor has the wrong type or shape.
    """
    files = sorted(Path(folder).glob("*/data.pt"))
    if not files:
        raise CheckpointError(f"{folder}: folder must hold <layer name>/data.pt, got none")
    return {file.parent.name: _read_raw_layer(file) for file in files}


def _read_raw_layer(file: Path) -> QuantizedWeight:
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parts raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: file must be a readable data.pt of tensors, got {reason}") from None
    if not isinstance(data, dict) or not {"qweight", "scale"} <= set(data):
        got = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{file}: file must hold qweight and scale, got {got}")

    def take(key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None) -> Tensor | None:
        tensor = data.get(key)
        if tensor is None:
            return None
        if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{file}: {key} must be {' or '.join(map(str, dtypes))}, got {got}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(f"{file}: {key} must have shape {shape}, got {tuple(tensor.shape)}")
        return tensor

    floats = (torch.float16, torch.bfloat16, torch.float32)
    codes, scales = take("qweight", (torch.uint8,), None), take("scale", floats, None)
    if codes is None or codes.dim() != 2:
        raise CheckpointError(f"{file}: qweight must have two dimensions, got {None if codes is None else codes.shape}")
    rows, columns = codes.shape
    groups = 0 if scales is None or scales.dim() != 2 or scales.shape[0] != rows else scales.shape[1]
    if scales is None or not groups or columns % groups or columns // groups % 16:
        shape = None if scales is None else tuple(scales.shape)
        rule = f"must have shape ({rows}, groups of a multiple of 16 that make up {columns})"
        raise CheckpointError(f"{file}: scale {rule}, got {shape}")
    zeros = take("zero", (torch.uint8, *floats), tuple(scales.shape))
    perm = take("perm", (torch.int32, torch.int64), (codes.shape[1],))
    return QuantizedWeight(codes, scales, zeros, None if perm is None else perm.to(torch.int32))


def convert(
    raw: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    bits: int = 8,
    widths: str | Path | None = None,
    master_bits: int = 8,
) -> QuantConfig:
    """Write the raw output of the published quantiser as a model folder of our format.

    Zeros and permutations, which the published packer drops, are kept.

    Args:
        raw: folder of ``<layer name>/data.pt``.
        model: the base model, folder or hub name, for everything that is not quantised.
        out: the new folder.
        bits: width served by default.
        widths: text file of ``layer name: bits`` for layers that are served at another width.
        master_bits: width of the codes.

    Returns:
        The new folder's config.

    Raises:
        CheckpointError: a raw file is broken, or does not fit the base model.
        FileExistsError: ``out`` is there already.
    """
    check_new(out)
    results = read_raw(raw)
    per_layer = {} if widths is None else read_widths(widths)
    for name in per_layer:
        if name not in results:
            raise CheckpointError(f"{widths}: lines must name layers of {raw}, got {name!r}")
    groups = {(w.codes.shape[1] // w.scales.shape[1], w.scales.shape[1]) for w in results.values()}
    sizes = {size for size, _ in groups}
    if len(sizes) > 1 and any(count > 1 for _, count in groups):
        raise CheckpointError(f"{raw}: scale must have one group size for all layers, got {sorted(sizes)}")
    middle = 2.0 ** (master_bits - 1)
    sym = all(w.zeros is None or bool((w.zeros == middle).all()) for w in results.values())
    for weight in results.values():
        if sym:
            weight.zeros = None
        elif weight.zeros is None:
            weight.zeros = torch.full_like(weight.scales, middle)

    dense = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    linears = {name: module for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    for name, weight in results.items():
        if not is_linear(linears.get(name)):
            raise CheckpointError(
                f"{Path(raw) / name}: folder must be named after a linear layer of {model}, got {name}"
            )
        if weight.codes.shape != linears[name].weight.shape:
            want, got = tuple(linears[name].weight.shape), tuple(weight.codes.shape)
            raise CheckpointError(f"{Path(raw) / name / 'data.pt'}: qweight must have shape {want}, got {got}")
    config = QuantConfig(
        bits=bits,
        master_bits=master_bits,
        group_size=-1 if all(count == 1 for _, count in groups) else sizes.pop(),
        sym=sym,
        bits_per_layer=per_layer,
        modules_to_not_convert=tuple(name for name in linears if name not in results),
    )
    insert_results(dense, results, config)
    for name in results:
        layer = dense.get_submodule(name)
        assert isinstance(layer, MatGPTQLinear)
        check_values(layer, str(Path(raw) / name / "data.pt"))
    with new_folder(out) as folder:
        write_model(dense, config, model, AutoTokenizer.from_pretrained(model), folder)
    return config
