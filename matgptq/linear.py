"""The quantised linear layer as a module, and changing the width of a whole model."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .ops import linear, servable, unservable
from .slicing import MIN_BITS, check_bits, check_rule, group_count


class MatGPTQLinear(nn.Module):
    """Linear layer ``y = x W^T + bias`` whose weight is nested codes, served at the width `bits`.

    Buffers: ``qweight`` (codes or bit planes), ``scales``, and where the checkpoint has them ``zeros``, ``perm`` and
    ``scales_<b>``, scales of its own for a width (``docs/format.md``). ``bits`` can be assigned at any time.

    Args:
        in_features: columns of ``W``, a multiple of 16 and of ``group_size``.
        out_features: rows of ``W``.
        bias: whether there is a bias.
        bits: served width.
        group_size: weights along in_features that share a scale, -1 for one group a row.
        sym: without ``zeros``: zero is the middle code.
        rule: slicing rule, ``"round"`` or ``"prefix"``.
        master_bits: width of the codes.
        stored_bits: planes stored where the layer was cut to a width; None for whole codes.
        act_order: with ``perm``, the order in which columns are stored.
        own_widths: widths that have scales of their own.
        dtype: type of scales and bias.
        zero_dtype: type of zeros, uint8 or floating point.
        device: where the buffers live.

    Raises:
        ValueError: a size, width, group size or rule does not fit.

    Example:
        >>> layer = MatGPTQLinear(64, 32, bits=4, group_size=32)
        >>> _ = layer.qweight.random_(), layer.scales.fill_(0.01)
        >>> layer.bits = 3
        >>> layer(torch.ones(5, 64, dtype=torch.float16)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        bits: int = 8,
        group_size: int = 128,
        sym: bool = True,
        rule: str = "round",
        master_bits: int = 8,
        stored_bits: int | None = None,
        act_order: bool = False,
        own_widths: Iterable[int] = (),
        dtype: torch.dtype = torch.float16,
        zero_dtype: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        at = f" ({name})" if name else ""
        if in_features <= 0 or in_features % 16:
            raise ValueError(f"in_features must be a positive multiple of 16, got {in_features}{at}")
        if out_features <= 0:
            raise ValueError(f"out_features must be positive, got {out_features}{at}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point, got {dtype}{at}")
        check_bits(master_bits, name="master_bits", where=name)
        groups = group_count(in_features, group_size, where=name)
        self.in_features, self.out_features = in_features, out_features
        self.group_size = group_size
        self.rule = check_rule(rule, where=name)
        self.master_bits = master_bits
        self.stored_bits = master_bits if stored_bits is None else check_bits(stored_bits, most=master_bits, where=name)
        self.name = name

        shape: tuple[int, ...] = (out_features, in_features)
        if stored_bits is not None:
            shape = (stored_bits, out_features, in_features // 8)
        self.qweight: Tensor
        self.scales: Tensor
        self.zeros: Tensor | None
        self.perm: Tensor | None
        self.register_buffer("qweight", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(out_features, groups, dtype=dtype, device=device))
        self.own_widths = tuple(
            sorted(check_bits(width, name="own_widths", most=master_bits, where=name) for width in own_widths)
        )
        for width in self.own_widths:
            self.register_buffer(f"scales_{width}", torch.empty_like(self.scales))
        # Those that may be None come last: torch.export counts buffers with them in one place and without in another.
        zeros = None if sym else torch.empty(out_features, groups, dtype=zero_dtype, device=device)
        self.register_buffer("zeros", zeros)
        perm = torch.empty(in_features, dtype=torch.int32, device=device) if act_order else None
        self.register_buffer("perm", perm)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), False) if bias else None
        self.bits = bits

    @property
    def bits(self) -> int:
        """Served width; assigning a width that the stored bits do not hold raises a ValueError."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        check_bits(bits, where=self.name)
        if bits not in self.widths:
            at = f" ({self.name})" if self.name else ""
            raise ValueError(unservable(bits, max(self.widths), self.rule) + at)
        self._bits = bits

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that can be assigned to `bits`."""
        every = range(MIN_BITS, self.stored_bits + 1)
        return tuple(b for b in every if servable(b, self.stored_bits, self.rule, self.master_bits))

    @property
    def served_scales(self) -> Tensor:
        """Scales of the served width: its own, else the shared ones."""
        return getattr(self, f"scales_{self._bits}") if self._bits in self.own_widths else self.scales

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, in the type of ``x``."""
        if self.perm is not None:
            x = x.index_select(-1, self.perm)
        return linear(
            x,
            self.qweight,
            self.served_scales,
            self.zeros,
            self.bias,
            bits=self._bits,
            group_size=self.group_size,
            rule=self.rule,
            master_bits=self.master_bits,
        )

    def rows(self, start: int, stop: int) -> MatGPTQLinear:
        """The layer that computes outputs ``start`` to ``stop`` alone, in the same memory, with a width of its own."""
        part = copy.copy(self)
        cut = {name: self._cut(name, tensor, start, stop) for name, tensor in self._buffers.items()}
        part._buffers = cut  # nn.Module's copy shares its dicts
        part._parameters = dict(self._parameters)
        part.out_features = stop - start
        if self.bias is not None:
            part.bias = nn.Parameter(self.bias[start:stop], False)
        return part

    def _cut(self, name: str, tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
        """Rows ``start`` to ``stop`` of a buffer."""
        return tensor if tensor is None or name == "perm" else tensor[..., start:stop, :]

    def nbytes(self, bits: int | None = None) -> int:
        """Bytes that the layer weighs cut to ``bits``; as it is stored now where None."""
        if bits is None:
            return sum(t.nbytes for t in (*self.buffers(), *self.parameters()))
        rest = sum(t.nbytes for t in (self.served_scales, self._zeros, self.perm, self.bias) if t is not None)
        return self.out_features * self.in_features * bits // 8 + rest

    @property
    def _zeros(self) -> Tensor | None:
        return self.zeros

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the layer."""
        stored = f", stored_bits={self.stored_bits}" if self.stored_bits != self.master_bits else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, rule={self.rule!r}{stored}"
        )


def quantized_layers(model: nn.Module) -> dict[str, MatGPTQLinear]:
    """The quantised layers of ``model`` by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MatGPTQLinear)}


def match_bits(name: str, bits_per_layer: Mapping[str, int]) -> int | None:
    """Width that ``bits_per_layer`` gives the module ``name``: its own entry, else the first pattern that matches.

    Patterns are shell-style (``*``, ``?``, ``[...]``), so ``"*.mlp.*"`` matches every layer of every MLP.
    """
    if name in bits_per_layer:
        return bits_per_layer[name]
    return next((bits for key, bits in bits_per_layer.items() if fnmatch.fnmatchcase(name, key)), None)


def set_bits(model: nn.Module, bits: int | Mapping[str, int]) -> None:
    """Change the served width of a model's quantised layers; nothing is loaded or copied.

    Args:
        model: a model with `MatGPTQLinear` layers.
        bits: one width for all, or a map from module name or shell-style pattern to width. Layers that the map does
            not match keep their width.

    Raises:
        ValueError: no quantised layers, a width that a layer cannot serve, or an entry that matches no layer. Nothing
            is changed then.

    Example:
        >>> set_bits(model, 4)                                              # doctest: +SKIP
        >>> set_bits(model, {"*.down_proj": 8, "*.self_attn.*": 3})         # doctest: +SKIP
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("model must have MatGPTQLinear layers, got none")
    wanted: Mapping[str, int] = bits if isinstance(bits, Mapping) else {"*": bits}
    for key, value in wanted.items():
        if not any(name == key or fnmatch.fnmatchcase(name, key) for name in layers):
            raise ValueError(f"bits must name quantised layers of the model, got {key!r} which matches none")
        if value is None:
            raise ValueError(f"bits must be a width for {key!r}, got None")
    chosen = {name: match_bits(name, wanted) for name in layers}
    for name, width in chosen.items():
        if width is not None and (not isinstance(width, int) or width not in layers[name].widths):
            served = ", ".join(map(str, layers[name].widths))
            raise ValueError(f"bits must be one of {served} for {name}, got {width!r}")
    for name, width in chosen.items():
        if width is not None:
            layers[name].bits = width
