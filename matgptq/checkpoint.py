"""Reading model folders without trusting them.

A folder is a Hugging Face model folder of safetensors files (``docs/format.md``). Headers are read and checked before
any weight is: what is wrong is one `CheckpointError` that names the file, the tensor, the rule and the value.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import QuantConfig
from .linear import MatGPTQLinear, match_bits
from .ops import servable, unservable
from .slicing import MIN_BITS, group_count

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
WIDTH_OF = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4, "I32": 4, "U32": 4}
WIDTH_OF |= {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


class CheckpointError(ValueError):
    """A file of a model folder breaks a rule of the format."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * WIDTH_OF[self.dtype]


@dataclass(frozen=True)
class StoredLayer:
    """One quantised layer as its headers describe it; ``stored_bits`` is None for whole codes."""

    name: str
    out_features: int
    in_features: int
    stored_bits: int | None
    sym: bool
    act_order: bool
    own_widths: tuple[int, ...]
    bias: bool
    scale_dtype: torch.dtype
    zero_dtype: torch.dtype

    def kept(self, bits: int, config: QuantConfig) -> dict[str, str]:
        """Tensors that are left once the layer is cut to ``bits``: stored suffix -> suffix in the cut folder.

        A cut that serves one width needs one set of scales, and calls it ``scales``.
        """
        widths = [b for b in range(MIN_BITS, bits + 1) if servable(b, bits, config.slicing, config.master_bits)]
        if widths == [bits] and bits in self.own_widths:
            scales = {f"scales_{bits}": "scales"}
        else:
            scales = {s: s for s in ("scales", *(f"scales_{b}" for b in self.own_widths if b in widths))}
        return {s: s for s in ("qweight", "zeros", "perm", "bias")} | scales

    def nbytes_at(self, bits: int, config: QuantConfig, tensors: Mapping[str, StoredTensor]) -> int:
        """Bytes of the layer's tensors once `slice_folder` has cut it to ``bits``."""
        names = (f"{self.name}.{suffix}" for suffix in self.kept(bits, config) if suffix != "qweight")
        return self.out_features * self.in_features * bits // 8 + sum(tensors[n].nbytes for n in names if n in tensors)

    def module(self, config: QuantConfig, **options: Any) -> MatGPTQLinear:
        """An empty module that these tensors fit."""
        return MatGPTQLinear(
            self.in_features,
            self.out_features,
            self.bias,
            bits=config.bits_for(self.name),
            group_size=config.group_size,
            sym=self.sym,
            rule=config.slicing,
            master_bits=config.master_bits,
            stored_bits=self.stored_bits,
            act_order=self.act_order,
            own_widths=self.own_widths,
            dtype=self.scale_dtype,
            zero_dtype=self.zero_dtype,
            name=self.name,
            **options,
        )


def read_config(folder: str | Path) -> tuple[dict[str, Any], QuantConfig]:
    """``config.json`` as it is, and the quantization_config in it.

    Raises:
        CheckpointError: the file is missing or broken, or its quantization_config is missing or wrong.
    """
    path = Path(folder) / CONFIG
    values = read_json(path)
    quantization = values.get("quantization_config")
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quantization_config must be an object, got {quantization!r}")
    try:
        return values, QuantConfig.from_dict(quantization, where=f"{path}: quantization_config")
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, else ``model.safetensors``.

    Raises:
        CheckpointError: the index is broken, a file is not there, or there is a single file beside an index.
    """
    folder = Path(folder)
    index = folder / INDEX
    if index.exists() and (folder / WEIGHTS).exists():  # Transformers would read the one, and others the other
        raise CheckpointError(f"{folder}: folder must have {WEIGHTS} or {INDEX}, got both")
    if not index.exists():
        files = [folder / WEIGHTS]
    else:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(v, str) and v == Path(v).name for v in names.values()):
            raise CheckpointError(f"{index}: weight_map must map tensor names to file names of the folder")
        files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: file must be there, got none")
    return files


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Type and shape of every tensor, by name, without reading data.

    Raises:
        CheckpointError: a file is truncated or is no safetensors file, or two files hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in map(Path, files):
        with open_weights(path) as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                if name in tensors:
                    raise CheckpointError(f"{path}: {name} must be stored once, got another in {tensors[name].file}")
                part = handle.get_slice(name)
                tensors[name] = StoredTensor(path, part.get_dtype(), tuple(part.get_shape()))
    return tensors


def folder_headers(folder: str | Path) -> dict[str, StoredTensor]:
    """`read_headers` of a folder's files, and the index, if there is one, checked against them.

    Raises:
        CheckpointError: as `weight_files` and `read_headers`, or a tensor is not in the file that the index names.
    """
    tensors = read_headers(weight_files(folder))
    index = Path(folder) / INDEX
    if index.exists():
        for name, file in read_json(index)["weight_map"].items():
            if name not in tensors or tensors[name].file.name != file:
                got = tensors[name].file.name if name in tensors else "no such tensor"
                raise CheckpointError(f"{index}: {name} must be in {file}, got {got}")
    return tensors


def stored_layers(tensors: Mapping[str, StoredTensor], config: QuantConfig) -> dict[str, StoredLayer]:
    """Every quantised layer, by name, its tensors checked against one another and against ``config``.

    Raises:
        CheckpointError: a tensor is missing or has the wrong type or shape, a width is not stored, a group does not
            divide, or ``bits_per_layer`` names a layer that is not there.
    """
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not names:
        files = ", ".join(sorted({str(t.file) for t in tensors.values()}))
        raise CheckpointError(f"{files}: at least one tensor must be called <layer>.qweight, got none")
    for key in config.bits_per_layer:
        if not any(match_bits(name, {key: 1}) for name in names):
            folder = next(iter(tensors.values())).file.parent
            raise CheckpointError(f"{folder / CONFIG}: bits_per_layer must name quantised layers, got {key!r}")
    return {name: _stored_layer(name, tensors, config) for name in names}


def _stored_layer(name: str, tensors: Mapping[str, StoredTensor], config: QuantConfig) -> StoredLayer:
    codes = tensors[f"{name}.qweight"]

    def fail(tensor: str, rule: str, got: object, file: Path = codes.file) -> CheckpointError:
        return CheckpointError(f"{file}: {tensor} {rule}, got {got}")

    def check(suffix: str, shape: tuple[int, ...], dtypes: Iterable[str]) -> StoredTensor | None:
        found = tensors.get(f"{name}.{suffix}")
        if found is not None and found.dtype not in dtypes:
            raise fail(f"{name}.{suffix}", f"must be {' or '.join(dtypes)}", found.dtype, found.file)
        if found is not None and found.shape != shape:
            raise fail(f"{name}.{suffix}", f"must have shape {shape}", found.shape, found.file)
        return found

    qweight = f"{name}.qweight"
    if codes.dtype != "U8":
        raise fail(qweight, "must be U8", codes.dtype)
    stored_bits = None
    if len(codes.shape) == 3:
        stored_bits = codes.shape[0]
        if not MIN_BITS <= stored_bits <= config.master_bits:
            raise fail(qweight, f"must have {MIN_BITS} to {config.master_bits} bit planes", stored_bits)
    elif len(codes.shape) != 2:
        raise fail(qweight, "must be codes (2 dimensions) or bit planes (3)", codes.shape)
    out_features = codes.shape[-2]
    in_features = codes.shape[-1] * (1 if stored_bits is None else 8)
    if not out_features or not in_features or in_features % 16:
        raise fail(qweight, "must have rows, and columns that are a multiple of 16", codes.shape)
    try:
        shape = (out_features, group_count(in_features, config.group_size))
    except ValueError as error:
        raise fail(qweight, "must fit group_size", f"{codes.shape}: {error}") from None
    bits = config.bits_for(name)
    if not servable(bits, stored_bits or config.master_bits, config.slicing, config.master_bits):
        reason = unservable(bits, stored_bits or config.master_bits, config.slicing)
        raise CheckpointError(f"{codes.file.parent / CONFIG}: {reason} ({name})")

    scales = check("scales", shape, FLOATS)
    if scales is None:
        raise fail(f"{name}.scales", f"must have shape {shape}", "no such tensor")
    zeros = check("zeros", shape, ("U8", *FLOATS))
    if config.sym != (zeros is None):
        rule = "must be absent where sym is true" if config.sym else "must be there where sym is false"
        raise fail(f"{name}.zeros", rule, "none" if zeros is None else zeros.shape)
    for suffix in ("weight", "g_idx"):
        if f"{name}.{suffix}" in tensors:
            raise fail(f"{name}.{suffix}", "must be absent beside qweight", tensors[f"{name}.{suffix}"].shape)
    own = tuple(b for b in range(MIN_BITS, config.master_bits + 1) if check(f"scales_{b}", shape, (scales.dtype,)))
    return StoredLayer(
        name=name,
        out_features=out_features,
        in_features=in_features,
        stored_bits=stored_bits,
        sym=config.sym,
        act_order=check("perm", (in_features,), ("I32", "I64")) is not None,
        own_widths=own,
        bias=check("bias", (out_features,), FLOATS) is not None,
        scale_dtype=FLOATS[scales.dtype],
        zero_dtype=torch.uint8 if zeros is None else FLOATS.get(zeros.dtype, torch.uint8),
    )


def check_values(layer: MatGPTQLinear, where: str) -> None:
    """Check what only the data shows, once the tensors of ``layer`` are loaded.

    Raises:
        CheckpointError: codes of ``2**master_bits`` or more, scales or zeros that are not finite, or a ``perm`` that
            is no permutation.
    """

    def fail(suffix: str, rule: str, got: object) -> CheckpointError:
        return CheckpointError(f"{where}: {layer.name}.{suffix} {rule}, got {got}")

    check_codes(layer.qweight, layer.master_bits, f"{where}: {layer.name}.qweight")
    for suffix in ("scales", "zeros", *(f"scales_{b}" for b in layer.own_widths)):
        tensor = getattr(layer, suffix)
        if tensor is not None and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise fail(suffix, "must be finite", "a NaN or an infinity")
    if layer.perm is not None:
        order = torch.arange(layer.in_features, device=layer.perm.device)
        if not torch.equal(layer.perm.long().sort().values, order):
            raise fail("perm", f"must be a permutation of 0 to {layer.in_features - 1}", "repeated or missing columns")


def check_codes(qweight: Tensor, master_bits: int, what: str) -> None:
    """Raise a CheckpointError that begins with ``what`` unless all codes are below ``2**master_bits``."""
    limit = 2**master_bits
    if limit < 256 and qweight.dim() == 2 and int(qweight.max()) >= limit:
        raise CheckpointError(f"{what} must hold codes below {limit}, got {int(qweight.max())}")


def check_folder(folder: str | Path) -> tuple[QuantConfig, dict[str, StoredLayer], dict[str, StoredTensor]]:
    """Config, quantised layers and all tensors of a folder, everything that headers can show checked."""
    _, config = read_config(folder)
    tensors = folder_headers(folder)
    return config, stored_layers(tensors, config), tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a CheckpointError that names the file where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file must be there, got none") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: file must be JSON, got {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: file must hold a JSON object, got {type(values).__name__}")
    return values


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file; a broken one is a CheckpointError that names it."""
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: file must be complete safetensors, got {error}") from None
