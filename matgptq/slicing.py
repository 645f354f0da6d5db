"""What a b-bit model means: the codes, their slices and the weights they stand for.

Everything else in the package - the CPU op, the kernels, the quantiser - is tested against the two
functions here. They are written for clarity, in plain torch.

A checkpoint stores one unsigned code ``q`` of ``master_bits`` bits a weight. A ``bits``-wide model keeps the
``bits`` most significant bits of it, by one of two rules (``d = master_bits - bits``):

``round``   ``S = min((q >> d) + ((q >> (d - 1)) & 1), 2**bits - 1)``     level ``v = S << d``
``prefix``  ``S = q >> d``                                                level ``v = (S + 1/2) * 2**d - 1/2``

and ``S = v = q`` where ``bits == master_bits``. The weight is ``scale * (v - zero)``.
``round`` is the rule of MatQuant (arXiv 2502.06786) and of the published MatGPTQ checkpoints; ``prefix`` reads
exactly ``bits`` bits, and its level is the mean of the codes that share a slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("round", "prefix")
MIN_BITS, MAX_BITS = 2, 8


def check_bits(bits: int, *, name: str = "bits", most: int = MAX_BITS, where: str = "") -> int:
    """Return ``bits`` if it is an integer from 2 to ``most``, else raise a ValueError that says so."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= most:
        raise ValueError(f"{name} must be an integer from {MIN_BITS} to {most}, got {bits!r}{_at(where)}")
    return bits


def check_rule(rule: str, *, name: str = "rule", where: str = "") -> str:
    """Return ``rule`` if it names a slicing rule, else raise a ValueError that lists them."""
    if rule not in RULES:
        raise ValueError(f"{name} must be one of {', '.join(RULES)}, got {rule!r}{_at(where)}")
    return rule


def group_count(in_features: int, group_size: int, *, where: str = "") -> int:
    """Number of groups along ``in_features``; ``group_size`` -1 means one group a row.

    Raises:
        ValueError: ``group_size`` is neither -1 nor a positive multiple of 16, or does not divide ``in_features``.
    """
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if whole and group_size == -1:
        return 1
    if not whole or group_size <= 0 or group_size % 16:
        raise ValueError(f"group_size must be -1 or a positive multiple of 16, got {group_size!r}{_at(where)}")
    if in_features % group_size:
        raise ValueError(f"group_size must divide in_features = {in_features}, got {group_size}{_at(where)}")
    return in_features // group_size


def slice_codes(codes: Tensor, bits: int, rule: str = "round", *, master_bits: int = MAX_BITS) -> Tensor:
    """The ``bits`` most significant bits of ``codes``, by ``rule`` (equations at the top of this module).

    Args:
        codes: uint8 tensor of any shape, each value below ``2**master_bits``.
        bits: width of the slice, 2 to ``master_bits``.
        rule: ``"round"`` or ``"prefix"``.
        master_bits: width of the codes, 2 to 8.

    Returns:
        uint8 tensor of the same shape, each value below ``2**bits``.

    Raises:
        TypeError: ``codes`` is not uint8.
        ValueError: a width or the rule is out of range.

    Example:
        >>> slice_codes(torch.tensor([7, 8, 120, 255], dtype=torch.uint8), bits=4).tolist()
        [0, 1, 8, 15]
        >>> slice_codes(torch.tensor([7, 8, 120, 255], dtype=torch.uint8), bits=4, rule="prefix").tolist()
        [0, 0, 7, 15]
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    check_bits(master_bits, name="master_bits")
    check_bits(bits, most=master_bits)
    check_rule(rule)
    dropped = master_bits - bits
    if dropped == 0:
        return codes.clone()
    top = codes >> dropped
    if rule == "prefix":
        return top
    return (top + ((codes >> (dropped - 1)) & 1)).clamp_(max=2**bits - 1)


def level_terms(bits: int, rule: str, master_bits: int = MAX_BITS) -> tuple[float, float]:
    """``(step, offset)`` of the affine map from a slice to its level: ``v = step * S + offset``."""
    step = float(2 ** (master_bits - bits))
    return step, (step - 1) / 2 if rule == "prefix" else 0.0


def code_levels(bits: int, rule: str, master_bits: int = MAX_BITS) -> Tensor:
    """Level that each of the ``2**master_bits`` codes stands for at a width: float64, in code units."""
    codes = torch.arange(2**master_bits, dtype=torch.uint8)
    step, offset = level_terms(bits, rule, master_bits)
    return slice_codes(codes, bits, rule, master_bits=master_bits).double() * step + offset


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    rule: str = "round",
    master_bits: int = MAX_BITS,
) -> Tensor:
    """Weights of the ``bits``-wide model: ``W = scales * (v - zeros)``, in float32.

    The difference is exact and is rounded once, by the product with the scale.

    Args:
        codes: uint8 ``(out_features, in_features)``.
        scales: floating point ``(out_features, in_features / group_size)``.
        zeros: ``(out_features, in_features / group_size)`` in code units, or None for ``2**(master_bits - 1)``.
        bits: served width, 2 to ``master_bits``.
        group_size: weights along ``in_features`` that share a scale; -1 for one group a row.
        rule: slicing rule of the checkpoint.
        master_bits: width of the codes.

    Returns:
        float32 ``(out_features, in_features)``.

    Raises:
        TypeError: ``codes`` is not uint8.
        ValueError: a width, rule, group size or shape does not fit.

    Example:
        >>> codes = torch.arange(0, 256, 16, dtype=torch.uint8).view(1, 16)
        >>> dequantize(codes, torch.tensor([[0.5]]), bits=2, group_size=-1)[0, ::4].tolist()
        [-64.0, -32.0, 0.0, 32.0]
    """
    if codes.dim() != 2 or 0 in codes.shape:
        raise ValueError(f"codes must have shape (out_features, in_features), neither 0, got {tuple(codes.shape)}")
    out_features, in_features = codes.shape
    groups = group_count(in_features, group_size)
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and tuple(tensor.shape) != (out_features, groups):
            raise ValueError(f"{name} must have shape {(out_features, groups)}, got {tuple(tensor.shape)}")
    sliced = slice_codes(codes, bits, rule, master_bits=master_bits)
    step, offset = level_terms(bits, rule, master_bits)
    levels = (sliced.float() * step + offset).view(out_features, groups, -1)
    zero = 2.0 ** (master_bits - 1) if zeros is None else zeros.float().unsqueeze(-1)
    return (scales.float().unsqueeze(-1) * (levels - zero)).reshape(out_features, in_features)


def _at(where: str) -> str:
    return f" ({where})" if where else ""
