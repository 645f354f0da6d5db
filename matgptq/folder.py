"""Writing model folders: each appears under its name only when it is complete. Cutting one to a width."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import (
    CONFIG,
    INDEX,
    StoredLayer,
    check_codes,
    folder_headers,
    open_weights,
    read_config,
    stored_layers,
    weight_files,
)
from .config import QuantConfig
from .linear import match_bits
from .planes import pack_planes, read_slices
from .slicing import check_bits

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def slice_folder(source: str | Path, out: str | Path, bits: int | Mapping[str, int]) -> QuantConfig:
    """Write ``source`` cut to a width: each quantised layer stores only its bits, as planes.

    Args:
        source: a model folder, ours or published.
        out: the new folder; must not exist, or be empty.
        bits: one width, or a map from layer name or pattern to width; other layers keep the width they serve.

    Returns:
        The new folder's config.

    Raises:
        CheckpointError: ``source`` breaks a rule, or does not hold a width that is asked for.
        FileExistsError: ``out`` is there already.
    """
    source = Path(source)
    values, config = read_config(source)
    tensors = folder_headers(source)
    if isinstance(bits, Mapping):
        # a layer's own entry goes before patterns: drop those of layers for which a pattern asks another width now
        old = {
            key: width
            for key, width in config.bits_per_layer.items()
            if key not in bits and not (f"{key}.qweight" in tensors and match_bits(key, bits))
        }
        config = replace(config, bits_per_layer={**bits, **old})
    else:
        config = replace(config, bits=check_bits(bits, most=config.master_bits), bits_per_layer={})
    layers = stored_layers(tensors, config)
    values["quantization_config"] = config.to_dict()
    with new_folder(out) as partial:
        sizes = {}
        for file in weight_files(source):
            cut: dict[str, Tensor] = {}
            with open_weights(file) as handle:
                for name in handle.keys():  # noqa: SIM118
                    owner, _, suffix = name.rpartition(".")
                    if owner not in layers:
                        cut[name] = handle.get_tensor(name)
                    else:
                        cut.update(_cut(suffix, handle.get_tensor(name), layers[owner], config, file))
            save_file(cut, partial / file.name, metadata={"format": "pt"})
            sizes.update({name: (file.name, tensor.nbytes) for name, tensor in cut.items()})
        if (source / INDEX).exists():
            index = {
                "metadata": {"total_size": sum(size for _, size in sizes.values())},
                "weight_map": {name: file for name, (file, _) in sizes.items()},
            }
            write_json(partial / INDEX, index)
        write_json(partial / CONFIG, values)
        copy_side_files(source, partial)
    return config


def _cut(suffix: str, tensor: Tensor, layer: StoredLayer, config: QuantConfig, file: Path) -> dict[str, Tensor]:
    """What is left of one tensor of a quantised layer at the width that ``config`` gives the layer, by its new name."""
    bits = config.bits_for(layer.name)
    kept = layer.kept(bits, config)
    if suffix not in kept:
        return {}
    if suffix == "qweight":
        check_codes(tensor, config.master_bits, f"{file}: {layer.name}.qweight")
        tensor = pack_planes(read_slices(tensor, bits, config.slicing, config.master_bits), bits)
    return {f"{layer.name}.{kept[suffix]}": tensor}


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends well, and goes away otherwise.

    Raises:
        FileExistsError: ``out`` is there already and is not an empty folder.
    """
    check_new(out)
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir()
        yield partial
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(out: str | Path) -> None:
    """Raise FileExistsError unless ``out`` is free to be written, and can be replaced where it is an empty folder."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out must be a new or an empty folder, got {out}")
    place = out.resolve()
    if place.is_mount() or place == Path.cwd():
        kind = "a mount point" if place.is_mount() else "the working folder"
        raise FileExistsError(f"out must be a folder that can be replaced, got {kind}, {out}: name a folder in it")


def publish(partial: Path, out: Path) -> None:
    """Give the finished folder ``partial`` its name; an empty folder of that name is replaced."""
    check_new(out)
    for file in partial.rglob("*"):
        if file.is_file():  # some writers let their owner alone read: whoever may read the folder may read the files
            file.chmod(partial.stat().st_mode & 0o666)
    os.replace(partial, out)


def copy_side_files(source: Path, out: Path) -> None:
    """Copy what is neither weights, hidden nor already written: tokenizer, generation config, licence, model code."""
    for file in source.iterdir():
        skipped = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json") or file.name.startswith(".")
        if file.is_file() and not skipped and not (out / file.name).exists():
            shutil.copy2(file, out / file.name)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` as indented JSON with a newline at the end; the file appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
