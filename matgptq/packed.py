"""Layers in the kernels' layout: what a model on a GPU is made of.

`pack` turns the layers of a model into `PackedLinear`. Their weights are bit planes in tensor-core order
(`matgptq.kernels.packing`): packed, ``bits`` planes that serve one width, or resident, eight planes that serve every
width of the checkpoint, chosen per call.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.matmul import warmup as compile_and_load
from .kernels.op import packed_linear, packed_linear_at
from .kernels.packing import TILE, pack_codes, pack_scales, unpack, unpack_scales
from .kernels.shared_norm import scaled_linear, summed_linear
from .kernels.tiles import Problem
from .linear import MatGPTQLinear, quantized_layers
from .ops import inference_only
from .planes import pack_planes, read_slices
from .slicing import MAX_BITS

logger = logging.getLogger(__name__)

for op in ("packed_linear", "packed_linear_at", "packed_linears_at", "summed_linear_at", "scaled_linears_at"):
    inference_only(op)


class PackedLinear(MatGPTQLinear):
    """A `MatGPTQLinear` whose weights are bit planes in tensor-core order. Same equation, same ``bits`` and ``widths``.

    The kernels count in units of 8-bit codes; narrower codes are shifted up, with scales and zeros to match.
    `state_dict` gives, and `load_state_dict` takes, the layer as it is stored (`unpacked`).

    Args:
        layer: the layer to pack; it is not changed.
        dtype: type of the activations, float16 or bfloat16, in which scales and bias are held.
        resident: hold eight planes and serve every width of ``layer``, or hold and serve its present width alone. A
            layer that has one width is held at it.

    Raises:
        ValueError: ``dtype`` is not one that the kernels compute in, or cannot hold the weights of the scales.
    """

    planes: Tensor
    unit_zeros: Tensor | None
    width_at_run_time: bool
    """Whether ``torch.compile`` leaves the width open: code compiled once serves all widths (`matgptq.decode`)."""

    def __init__(self, layer: MatGPTQLinear, *, dtype: torch.dtype, resident: bool = True) -> None:
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype} ({layer.name})")
        nn.Module.__init__(self)
        for name in ("in_features", "out_features", "group_size", "rule", "master_bits", "stored_bits", "name"):
            setattr(self, name, getattr(layer, name))
        self.resident = resident and len(layer.widths) > 1
        self._widths = layer.widths if self.resident else (layer.bits,)
        self.own_widths = tuple(b for b in layer.own_widths if b in self._widths)
        self.width_at_run_time = False
        with torch.inference_mode(False):  # so that it can be written in and out of inference mode
            self._width = torch.zeros(2, dtype=torch.long, device="cpu")  # of packed_linear_at; stays on the CPU
        self.bits = layer.bits
        self.stored_dtype = layer.scales.dtype
        self.zero_dtype = None if layer.zeros is None else layer.zeros.dtype
        shift = MAX_BITS - layer.master_bits

        if self.resident:
            codes = read_slices(layer.qweight, layer.stored_bits, layer.rule, layer.master_bits)
            planes = pack_codes(codes << (MAX_BITS - layer.stored_bits), MAX_BITS)
        else:
            planes = pack_codes(read_slices(layer.qweight, layer.bits, layer.rule, layer.master_bits), layer.bits)
        self.register_buffer("planes", planes)
        zeros = _unit_zeros(layer, shift)
        shared = [] if set(self.own_widths) == set(self._widths) else ["scales"]
        for name in (*shared, *(f"scales_{b}" for b in self.own_widths)):
            scales = getattr(layer, name).float() / 2**shift
            check_scales(scales, dtype, f"{layer.name}.{name}".lstrip("."), zeros)
            self.register_buffer(name, pack_scales(scales.to(dtype)))
        self.register_buffer("unit_zeros", None if zeros is None else pack_scales(zeros))
        self.register_buffer("perm", layer.perm)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(dtype), False)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that can be assigned to ``bits``."""
        return self._widths

    @property
    def _zeros(self) -> Tensor | None:
        return self.unit_zeros

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return next(t.dtype for name, t in self.named_buffers() if name.startswith("scales"))

    def problem(self, tokens: int, gated: bool = False) -> Problem:
        """What the kernels are asked for a call of ``tokens`` tokens, on the GPU that the layer is on."""
        major, minor = torch.cuda.get_device_capability(self.planes.device)
        return Problem(
            tokens,
            self.out_features // 2 if gated else self.out_features,
            self.in_features,
            self.bits,
            dtype=str(self.dtype).removeprefix("torch."),
            group_size=self.group_size,
            resident=self.resident,
            rule=self.rule,
            zeros=self.unit_zeros is not None,
            sm=10 * major + minor,
            gated=gated,
        )

    @property
    def bits(self) -> int:
        """Served width; assigning a width that is not one of `widths` raises a ValueError."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        MatGPTQLinear.bits.fset(self, bits)  # type: ignore[attr-defined]
        index = self.own_widths.index(bits) if bits in self.own_widths else len(self.own_widths)
        self._width[0], self._width[1] = bits, index

    def forward(self, x: Tensor, gated: bool = False) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, in the type of ``x``.

        A layer that is two of one size, one after the other, may be ``gated``: ``(..., out_features / 2)``,
        ``silu(first) * second`` (`packed_linear`).
        """
        buffers = self._buffers  # a buffer as an attribute takes nn.Module half a microsecond to find
        if buffers["perm"] is not None:
            x = x.index_select(-1, buffers["perm"])
        if self.width_at_run_time and torch.compiler.is_compiling() and not gated:
            shared = [self.scales] if "scales" in self._buffers else []
            return packed_linear_at(
                x,
                self.planes,
                [*(getattr(self, f"scales_{width}") for width in self.own_widths), *shared],
                self.unit_zeros,
                self.bias,
                self._width,
                in_features=self.in_features,
                out_features=self.out_features,
                group_size=self.group_size,
                rule=self.rule,
                resident=self.resident,
            )
        return packed_linear(
            x,
            buffers["planes"],  # type: ignore[arg-type]
            buffers[f"scales_{self._bits}" if self._bits in self.own_widths else "scales"],  # type: ignore[arg-type]
            buffers["unit_zeros"],
            self.bias,
            in_features=self.in_features,
            out_features=self.out_features // 2 if gated else self.out_features,
            bits=self._bits,
            group_size=self.group_size,
            rule=self.rule,
            resident=self.resident,
            gated=gated,
        )

    def summed(self, x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """`kernels.shared_norm.summed_linear`; x is not permuted."""
        operands, layer = self._call(False)
        return summed_linear(x, residual, norm, eps, *operands, **layer)

    def scaled(self, z: Tensor, means: Tensor, gated: bool = False) -> Tensor:
        """`kernels.shared_norm.scaled_linear`; z is not permuted."""
        operands, layer = self._call(gated)
        return scaled_linear(z, means, *operands, **layer)

    def _call(self, gated: bool) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        """`packed_linear`'s arguments but the first."""
        scales = f"scales_{self._bits}" if self._bits in self.own_widths else "scales"
        operands = (self.planes, self.get_buffer(scales), self.unit_zeros, self.bias)
        return operands, {
            "in_features": self.in_features,
            "out_features": self.out_features // 2 if gated else self.out_features,
            "bits": self._bits,
            "group_size": self.group_size,
            "rule": self.rule,
            "resident": self.resident,
            "gated": gated,
        }

    def rows(self, start: int, stop: int) -> PackedLinear:
        """The layer that computes outputs ``start`` to ``stop`` alone, in the same memory, with a width of its own.

        Raises:
            ValueError: ``start`` is within a tile of rows, or ``stop`` is and there are rows after it.
        """
        if start % TILE or (stop % TILE and stop != self.out_features):
            raise ValueError(f"rows must be cut at multiples of {TILE}, got {start} to {stop} ({self.name})")
        part = super().rows(start, stop)
        assert isinstance(part, PackedLinear)
        return part

    def __copy__(self) -> PackedLinear:
        """The layer in the same memory, with a width of its own."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        with torch.inference_mode(False):
            twin._width = self._width.clone()
        return twin

    def _cut(self, name: str, tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
        return tensor if tensor is None or name == "perm" else tensor[start // TILE : -(-stop // TILE)]

    def unpacked(self) -> MatGPTQLinear:
        """The layer as it is stored in a model folder: the codes of a resident layer, the one slice of a packed one.

        Raises:
            ValueError: the scales were stored in another type than the activations have, and were rounded to it.
        """
        if self.dtype != self.stored_dtype:
            raise ValueError(
                f"scales must be {self.dtype} to be stored again, got {self.stored_dtype} in the checkpoint "
                f"({self.name}): save the model before it is packed"
            )
        codes = unpack(self.planes, self.out_features, self.in_features)
        if self.resident:
            codes >>= MAX_BITS - self.stored_bits
        layer = self._stored(torch.device("meta"))
        layer.qweight = codes if layer.stored_bits == self.master_bits else pack_planes(codes, layer.stored_bits)
        shift = MAX_BITS - self.master_bits
        for name, buffer in self.named_buffers():
            if name.startswith("scales"):
                scales = unpack_scales(buffer, self.out_features).float() * 2**shift
                setattr(layer, name if self.resident else "scales", scales.to(self.stored_dtype))
        if self.zero_dtype is not None:
            assert self.unit_zeros is not None
            zeros = unpack_scales(self.unit_zeros, self.out_features)
            layer.zeros = ((zeros - _gain(self.rule, shift)) / 2**shift).to(self.zero_dtype)
        # Copies: those of a layer that lies together with others share memory, which a file must not.
        layer.perm = None if self.perm is None else self.perm.clone()
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), False)
        return layer

    def _stored(self, device: torch.device) -> MatGPTQLinear:
        """A layer of the form in which this one is stored, without weights."""
        stored_bits = self.stored_bits if self.resident else self.bits
        return MatGPTQLinear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            bits=self.bits,
            group_size=self.group_size,
            sym=self.zero_dtype is None,
            rule=self.rule,
            master_bits=self.master_bits,
            stored_bits=None if stored_bits == self.master_bits else stored_bits,
            act_order=self.perm is not None,
            own_widths=self.own_widths if self.resident else (),
            dtype=self.stored_dtype,
            zero_dtype=self.zero_dtype or torch.uint8,
            device=device,
            name=self.name,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves and converts the tensors; zeros stay float32, as the kernels read them."""
        before = self.unit_zeros
        super()._apply(fn, recurse)
        after = self.unit_zeros
        if before is not None and after is not None and after.dtype != torch.float32:
            self.unit_zeros = before.to(after.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        self.unpacked()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes what `state_dict` gives: the layer as it is stored, all of it or nothing, and packs it again."""
        layer, errors = self._stored(self.planes.device), len(error_msgs)
        missing: list[str] = []
        layer._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += missing
        if missing:
            if any(name.startswith(prefix) for name in state_dict):
                error_msgs.append(f"a packed layer must be given whole, got it without {', '.join(missing)}")
            return
        if len(error_msgs) > errors:
            return
        packed = PackedLinear(layer, dtype=self.dtype, resident=self.resident)
        with torch.no_grad():
            for name, tensor in itertools.chain(self.named_buffers(), self.named_parameters()):
                tensor.copy_(getattr(packed, name))


def pack(model: nn.Module, *, dtype: torch.dtype | None = None, resident: bool = True) -> None:
    """Replace the quantised layers of ``model`` by `PackedLinear`, one after the other, where they are.

    Layers of one module that are alike (q, k and v; gate and up) come to lie one after another in memory: compiled code
    that gives them one input makes one call of them (`matgptq.decode`). Moving the model later takes them apart.

    Args:
        model: a model with `MatGPTQLinear` layers, on the device that it will run on: packing there is fast.
        dtype: type of the activations, float16 or bfloat16; that of ``model.dtype`` where None.
        resident: hold all bits, so that `matgptq.set_bits` works, or each layer's present width alone.

    Raises:
        ValueError: the model has no layers to pack, or ``dtype`` is not one that the kernels compute in.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if not isinstance(layer, PackedLinear)}
    if not layers:
        raise ValueError("model must have MatGPTQLinear layers that are not packed yet, got none")
    if "" in layers:
        raise ValueError("model must hold its layers in a module, got a layer: use PackedLinear(layer, dtype=...)")
    activations: torch.dtype = model.dtype if dtype is None else dtype  # type: ignore[assignment]
    while layers:
        parent = next(reversed(layers)).rpartition(".")[0]
        owner = model.get_submodule(parent)
        while layers and next(reversed(layers)).rpartition(".")[0] == parent:
            name, layer = layers.popitem()  # no reference stays: its memory is there for the next
            setattr(owner, name.rpartition(".")[2], PackedLinear(layer, dtype=activations, resident=resident))
        _lay_together([child for child in owner.children() if isinstance(child, PackedLinear)])


def _lay_together(layers: Iterable[PackedLinear]) -> None:
    """Move those of ``layers`` that could be one into one memory, one after another, each still a layer of its own."""
    runs: dict[tuple[Any, ...], list[list[PackedLinear]]] = {}
    for layer in layers:
        kind = [(name, t.dtype, t.device, t.shape[1:]) for name, t in layer.named_buffers() if name != "perm"]
        key = (layer.in_features, layer.group_size, layer.rule, layer.resident, layer.bias is None, *kind)
        same = runs.setdefault(key, [])
        if same and same[-1][-1].out_features % TILE == 0 and _same_order(same[-1][-1], layer):
            same[-1].append(layer)
        else:
            same.append([layer])
    with torch.inference_mode(False), torch.no_grad():
        for run in itertools.chain.from_iterable(runs.values()):
            if len(run) > 1:
                _join(run)


def _join(layers: Sequence[PackedLinear]) -> None:
    first = layers[0]
    for name, _ in list(first.named_buffers()):
        parts = [layer.get_buffer(name) for layer in layers]
        whole = [parts[0]] * len(parts) if name == "perm" else torch.cat(parts).split([len(part) for part in parts])
        for layer, part in zip(layers, whole, strict=True):
            setattr(layer, name, part)
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    if biases:
        for layer, part in zip(layers, torch.cat(biases).split([len(bias) for bias in biases]), strict=True):
            layer.bias = nn.Parameter(part, False)


def _same_order(a: PackedLinear, b: PackedLinear) -> bool:
    return a.perm is b.perm is None or (a.perm is not None and b.perm is not None and torch.equal(a.perm, b.perm))


def warmup(model: nn.Module, tokens: Iterable[int] = (1, 2, 4, 8, 16, 32, 64)) -> None:
    """Compile and load the kernels that ``model`` needs for calls of ``tokens`` tokens, at the widths it serves now.

    Needed before a CUDA graph is captured, and good before the first answer: in parallel, and from the disk cache where
    they are there. Nothing happens for layers that are not on a GPU.
    """
    layers = [m for m in quantized_layers(model).values() if isinstance(m, PackedLinear) and m.planes.is_cuda]
    for device in {layer.planes.device for layer in layers}:
        there = [layer for layer in layers if layer.planes.device == device]
        compile_and_load({layer.problem(m) for layer in there for m in tokens}, device)


def check_device(device: torch.device | str | None, name: str = "device") -> None:
    """Raise a ValueError unless a model can be on ``device``: torch knows it, and it is there. None is the CPU."""
    try:
        wanted = torch.device("cpu" if device is None else device)
    except RuntimeError:
        raise ValueError(f"{name} must be one of torch's, such as cpu or cuda:0, got {device}") from None
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found and found.type == wanted.type else 0
    if wanted.type != "cpu" and (wanted.index or 0) >= count:
        raise ValueError(f"{name} must be there, got {device}, and torch finds {count} of its kind")


def check_scales(scales: Tensor, dtype: torch.dtype, name: str, zeros: Tensor | None = None) -> None:
    """Raise a ValueError if a weight ``scales * (level - zeros)`` may be beyond ``dtype``, whatever its code.

    Warn of scales too small for ``dtype``, which lose more of themselves than bfloat16 rounds off.

    Hopper's kernel makes weights of all codes, those of padding too, whose x is 0: Inf times 0 would be NaN.
    """
    top = 2**MAX_BITS
    levels = top if zeros is None else torch.maximum(zeros.abs(), (top - zeros).abs()).clamp(min=top)
    largest = (scales.abs() * levels).max().item() / top
    most = torch.finfo(dtype).max / top
    if largest > most:
        of = "" if zeros is None else " with its zeros"
        raise ValueError(f"{name}{of} must be at most {most:g} in {dtype}, for weights to be finite, got {largest:g}")
    lost = int(((scales.to(dtype).float() - scales).abs() > scales.abs() / 2**8).sum())
    if lost:
        logger.warning("%s: %d of %d are too small for %s and lose bits", name, lost, scales.numel(), dtype)


def _gain(rule: str, shift: int) -> float:
    """What a ``prefix`` level gains when its code is shifted up by ``shift`` bits."""
    return (2**shift - 1) / 2 if rule == "prefix" else 0.0


def _unit_zeros(layer: MatGPTQLinear, shift: int) -> Tensor | None:
    """Zeros in units of 8-bit codes, float32 ``(out_features, groups)``; None where they all are 128."""
    gain = _gain(layer.rule, shift)
    if layer.zeros is not None:
        return layer.zeros.float() * 2**shift + gain
    return torch.full_like(layer.scales, 128 + gain, dtype=torch.float32) if gain else None
