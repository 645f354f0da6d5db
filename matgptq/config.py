"""The ``quantization_config`` of a model folder: our keys, and the reader of the published ones.

Keys and their meaning are in ``docs/format.md``. The upstream names (``master_bitwidth``, ``inference_bitwidth``,
``quant_dtype``) appear in this file and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .linear import match_bits
from .slicing import MAX_BITS, check_bits, check_rule, group_count

QUANT_METHOD = "matgptq"
PUBLISHED_METHOD = "matgptq_quant"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class QuantConfig:
    """How a folder's weights are stored and the widths at which they are served.

    Attributes:
        bits: width of the layers that ``bits_per_layer`` does not name.
        master_bits: width of the stored codes, before any cut.
        group_size: weights along in_features that share a scale, -1 for a row.
        sym: no zeros are stored; zero is the middle code.
        slicing: slicing rule, ``"round"`` or ``"prefix"``.
        bits_per_layer: module name or shell-style pattern -> width; a name goes before patterns, these in order.
        modules_to_not_convert: names, or last parts of names, of modules left as they are in the base model.
        format_version: 1.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> QuantConfig(bits=4, bits_per_layer={"*.down_proj": 6}).bits_for("model.layers.0.mlp.down_proj")
        6
    """

    bits: int = MAX_BITS
    master_bits: int = MAX_BITS
    group_size: int = 128
    sym: bool = True
    slicing: str = "round"
    bits_per_layer: Mapping[str, int] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = ("lm_head",)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_bits(self.master_bits, name="master_bits")
        check_bits(self.bits, most=self.master_bits)
        group_count(0, self.group_size)
        if not isinstance(self.sym, bool):
            raise ValueError(f"sym must be true or false, got {self.sym!r}")
        check_rule(self.slicing, name="slicing")
        if not isinstance(self.bits_per_layer, Mapping):
            raise ValueError(f"bits_per_layer must map module names to widths, got {self.bits_per_layer!r}")
        for name, bits in self.bits_per_layer.items():
            check_bits(bits, name="bits_per_layer", most=self.master_bits, where=name)
        names = self.modules_to_not_convert
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"modules_to_not_convert must be a list of names, got {names!r}")
        object.__setattr__(self, "modules_to_not_convert", tuple(names))
        if isinstance(self.format_version, bool) or self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {self.format_version!r}")

    def bits_for(self, name: str) -> int:
        """Served width of the module ``name``."""
        found = match_bits(name, self.bits_per_layer)
        return self.bits if found is None else found

    def skips(self, name: str) -> bool:
        """Whether ``modules_to_not_convert`` names the module, in full or by its last parts."""
        return any(name == skip or name.endswith(f".{skip}") for skip in self.modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        """Our keys, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["bits_per_layer"] = dict(self.bits_per_layer)
        values["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return {"quant_method": QUANT_METHOD, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "quantization_config") -> QuantConfig:
        """Read our keys, or the published ones where ``quant_method`` is ``matgptq_quant``.

        Raises:
            ValueError: another quant_method, a key that the format does not have, or a value out of range; the message
                begins with ``where``.
        """
        rest = dict(values)
        if rest.get("quant_method") == PUBLISHED_METHOD:
            rest = {"modules_to_not_convert": (), "slicing": "round", "sym": True, **_our_keys(rest, where)}
        else:
            rest = _our_keys(rest, where)
        try:
            return cls(**rest)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None

    def updated(self, values: Mapping[str, Any], *, where: str = "quantization_config") -> QuantConfig:
        """This config with the keys of ``values`` in place of its own: a folder's config, and what was asked for.

        ``values`` needs a ``quant_method``, ours or the published one, and may leave out everything else. ``bits``
        without ``bits_per_layer`` is the width of every layer.

        Raises:
            ValueError: as `from_dict`.

        Example:
            >>> config = QuantConfig(group_size=64).updated({"quant_method": "matgptq", "bits": 3})
            >>> config.bits, config.group_size
            (3, 64)
        """
        asked = _our_keys(dict(values), where)
        if "bits" in asked:
            asked.setdefault("bits_per_layer", {})
        return self.from_dict({**self.to_dict(), **asked}, where=where)


def _our_keys(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys that ``values`` has besides quant_method, by our names; the published ones are renamed."""
    method = values.pop("quant_method", None)
    if method == QUANT_METHOD:
        known = {f.name: f.name for f in dataclasses.fields(QuantConfig)}
    elif method == PUBLISHED_METHOD:
        known = {"master_bitwidth": "master_bits", "inference_bitwidth": "bits", "group_size": "group_size"}
        known |= {"modules_to_not_convert": "modules_to_not_convert", "quant_dtype": ""}
    else:
        raise ValueError(f"{where}: quant_method must be {QUANT_METHOD} or {PUBLISHED_METHOD}, got {method!r}")
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: keys must be among {', '.join(sorted(known))}, got {key!r}")
    ours = {known[key]: value for key, value in values.items() if known[key]}  # tensors carry their own dtype
    if method == PUBLISHED_METHOD and ours.get("modules_to_not_convert", ()) is None:
        ours["modules_to_not_convert"] = ()
    return ours


@contextlib.contextmanager
def utf8(path: str | Path) -> Iterator[None]:
    """What reads ``path`` as UTF-8 text raises a ValueError that names the file where it is none."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: file must be UTF-8 text, got {error}") from None


def read_widths(path: str | Path) -> dict[str, int]:
    """Read a mixed-width text file, lines of ``layer name: bits``; empty lines and ``#`` comments are skipped.

    Raises:
        ValueError: no UTF-8 text, a line of another form, a width out of range or a layer that is named twice.
    """
    widths: dict[str, int] = {}
    with utf8(path):
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()  # Notepad begins with a BOM
    for number, line in enumerate(lines, start=1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        at = f"{path}, line {number}"
        name, colon, value = (part.strip() for part in line.rpartition(":"))
        if not colon or not name or not value.isdecimal():
            raise ValueError(f"{at}: lines must read 'layer name: bits', got {line!r}")
        if name in widths:
            raise ValueError(f"{at}: each layer may be named once, got {name!r} again")
        try:
            widths[name] = check_bits(int(value))
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from None
    return widths
