"""Quantise one weight matrix: GPTQ's column loop with a nested code.

GPTQ (arXiv 2210.17323) fixes the columns of ``W`` one after the other and corrects the columns still to come for
the error just made. With ``U`` the upper Cholesky factor of the inverse Hessian (``inv(H) = U^T U``),

    q_k   = lookup(w_k / scale + zero)                       (`matgptq.quantizer.lookup`)
    e_k   = (w_k - mean_b deq_b(q_k)) / U[k, k]              mean weighted by lambda over the trained widths
    w_j  -= e_k * U[k, j]      for j > k

One trained width equal to ``master_bits`` is plain GPTQ; without a Hessian it is round-to-nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..slicing import check_bits, check_rule, dequantize, group_count
from .lookup import CodeLookup, build_lookup, check_widths

MASTER_LAMBDA = 512.0  # errors are in code units, where those of 3 bits are 32 times those of 8: see docs/quantizer.md
MAX_BLOCK = 128  # columns corrected one by one before the rest of the matrix is, as in GPTQ
SCALE_RIDGE = 1e-2  # pulls fitted scales to the shared one, in units of the normal matrix's mean diagonal
MAX_DAMPING = 1e4  # of the mean diagonal: beyond this the Hessian is noise, and we say so


@dataclass(frozen=True)
class Method:
    """How weights become codes. Every field is a choice that changes the codes.

    Attributes:
        widths: trained widths.
        lambdas: weight of each width's squared error, in the order of ``widths``; where None, 1, and
            `MASTER_LAMBDA` for the master width.
        master_bits: stored width.
        group_size: weights along in_features that share a scale, -1 for a row.
        sym: zero at the middle code; otherwise a zero for each group.
        rule: slicing rule.
        act_order: quantise columns in the order of falling Hessian diagonal.
        static_groups: take each group's scale from the weights as they were, and let groups be neighbouring columns
            whatever the order. Otherwise, as in GPTQ, a scale is taken when the loop reaches its group, and with
            ``act_order`` groups follow that order, which is then stored as a permutation.
        damping: added to the Hessian's diagonal, in units of its mean.
        feedback: False for round-to-nearest, which needs no calibration.
        scale_dtype: type in which scales are stored; codes are chosen for the stored scales.
        own_scales: widths that get scales of their own, fitted by least squares once the codes are chosen; where
            None, those of 2, 3, 4 and 6 that are below ``master_bits``, and none for round-to-nearest.
    """

    widths: tuple[int, ...] = (3, 4, 8)
    lambdas: tuple[float, ...] | None = None
    master_bits: int = 8
    group_size: int = 128
    sym: bool = True
    rule: str = "round"
    act_order: bool = False
    static_groups: bool = True
    damping: float = 0.1
    feedback: bool = True
    scale_dtype: torch.dtype = torch.float16
    own_scales: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_bits(self.master_bits, name="master_bits")
        check_rule(self.rule)
        check_widths(self.widths, self.weights, self.master_bits)
        for bits in self.fitted_widths:
            check_bits(bits, name="own_scales", most=self.master_bits)
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, got {self.damping!r}")

    @property
    def weights(self) -> tuple[float, ...]:
        """``lambdas``, with the default filled in."""
        if self.lambdas is not None:
            return self.lambdas
        return tuple(MASTER_LAMBDA if b == self.master_bits else 1.0 for b in self.widths)

    @property
    def fitted_widths(self) -> tuple[int, ...]:
        """``own_scales``, with the default filled in."""
        if self.own_scales is not None:
            return self.own_scales
        return tuple(b for b in (2, 3, 4, 6) if b < self.master_bits) if self.feedback else ()

    @property
    def needs_hessian(self) -> bool:
        """Whether calibration is needed: for all but round-to-nearest with shared scales."""
        return self.feedback or self.act_order or bool(self.fitted_widths)

    def lookup(self) -> CodeLookup:
        """The code lookup of this method; round-to-nearest chooses for the master width alone."""
        if not self.feedback:
            return build_lookup((self.master_bits,), (1.0,), self.rule, self.master_bits)
        return build_lookup(self.widths, self.weights, self.rule, self.master_bits)


@dataclass
class QuantizedWeight:
    """Codes of one matrix and what is needed to read them.

    Attributes:
        codes: uint8 ``(out_features, in_features)``, columns in the order of ``perm`` where there is one.
        scales: ``(out_features, groups)`` in the method's ``scale_dtype``.
        zeros: uint8 ``(out_features, groups)``, or None where symmetric.
        perm: int32 ``(in_features,)``, column ``j`` of ``codes`` is column ``perm[j]`` of the weight; or None.
        own_scales: width -> scales of its own.
        errors: width -> ``tr(E H E^T) / tr(W H W^T)``, the relative squared error of the layer's output.
        damping: what the Hessian needed, in units of its mean diagonal (the asked value unless it was singular).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    perm: Tensor | None = None
    own_scales: dict[int, Tensor] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    damping: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, under the names they have in a model folder."""
        named = {"qweight": self.codes, "scales": self.scales, "zeros": self.zeros, "perm": self.perm}
        named |= {f"scales_{bits}": scales for bits, scales in self.own_scales.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The inverse of `tensors`; what was measured (errors, damping) is not stored."""
        own = {int(key.removeprefix("scales_")): t for key, t in tensors.items() if key.startswith("scales_")}
        return cls(tensors["qweight"], tensors["scales"], tensors.get("zeros"), tensors.get("perm"), own)


def quantize_weight(
    weight: Tensor,
    hessian: Tensor | None,
    method: Method,
    *,
    lookup: CodeLookup | None = None,
    report_widths: Sequence[int] = (),
    where: str = "",
) -> QuantizedWeight:
    """Quantise ``weight`` by ``method``.

    Args:
        weight: floating point ``(out_features, in_features)``, finite.
        hessian: float32 ``(in_features, in_features)``, ``2 / n * X^T X``; None only without error feedback.
        method: what to do.
        lookup: ``method.lookup()``, if it is at hand already.
        report_widths: widths whose error is reported; the trained ones where empty.
        where: name of the layer, for messages.

    Raises:
        ValueError: a shape does not fit, a value is not finite, the scales overflow their type, or no damping up to
            `MAX_DAMPING` makes the Hessian positive definite.
    """
    at = f" ({where})" if where else ""
    if weight.dim() != 2:
        raise ValueError(f"weight must have two dimensions, got {tuple(weight.shape)}{at}")
    in_features = weight.shape[1]
    group_count(in_features, method.group_size, where=where)
    if hessian is not None and tuple(hessian.shape) != (in_features, in_features):
        raise ValueError(f"hessian must have shape {(in_features, in_features)}, got {tuple(hessian.shape)}{at}")
    if hessian is None and method.needs_hessian:
        raise ValueError(f"hessian must be given unless the method is round-to-nearest, got None{at}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"weight must be finite, got a NaN or an infinity{at}")
    if hessian is not None and not torch.isfinite(hessian).all():
        raise ValueError(f"hessian must be finite, got a NaN or an infinity: check the calibration text{at}")

    lookup = (lookup or method.lookup()).to(weight.device)
    dense = weight.float()
    order = None
    if method.act_order:
        assert hessian is not None
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    perm = None if method.static_groups else order
    if perm is not None:  # from here on columns are in stored order
        dense, hessian, order = dense[:, perm], _permuted(hessian, perm), None
    result = _column_loop(dense, hessian, order, lookup, method, at)
    result.perm = None if perm is None else perm.to(torch.int32)
    if hessian is not None:
        for bits in method.fitted_widths:
            result.own_scales[bits] = _fit_scales(dense, hessian, result, bits, method, at)
        energy = _quadratic(dense, hessian)
        for bits in report_widths or method.widths:
            error = dense - _decode(result, bits, method)
            result.errors[bits] = (_quadratic(error, hessian) / energy.clamp(min=torch.finfo(energy.dtype).tiny)).item()
    return result


def _inverse_factor(hessian: Tensor, damping: float, at: str) -> tuple[Tensor, float]:
    """Upper ``U`` with ``inv(H + damping * mean(diag H) * I) = U^T U``, damped more until it exists.

    A column that calibration never reached (zero diagonal) has nothing to feed back: its diagonal becomes 1.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    damped[dead] = 0
    damped[:, dead] = 0
    diagonal[dead] = mean
    base = diagonal.clone()
    while damping <= MAX_DAMPING:
        diagonal.copy_(base + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper, damping
        damping *= 10
    raise ValueError(
        f"hessian must be positive definite once damped, but {MAX_DAMPING} times its mean is too little{at}"
    )


def _column_loop(
    dense: Tensor, hessian: Tensor | None, order: Tensor | None, lookup: CodeLookup, method: Method, at: str
) -> QuantizedWeight:
    """Codes, scales and zeros of ``dense``, its columns taken in ``order`` (as they stand where None)."""
    out_features, in_features = dense.shape
    groups = group_count(in_features, method.group_size)
    group = in_features // groups
    columns = dense.t().contiguous()  # the loop runs over in_features: make each step's data contiguous
    codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=dense.device)
    scales = columns.new_empty(groups, out_features, dtype=method.scale_dtype)
    zeros = columns.new_empty(groups, out_features)
    static = method.static_groups or groups == 1
    for g in range(groups if static else 0):
        scales[g], zeros[g] = _min_max(columns[g * group : (g + 1) * group], method, at)

    factor, damping = None, 0.0
    if method.feedback:
        assert hessian is not None
        factor, damping = _inverse_factor(hessian if order is None else _permuted(hessian, order), method.damping, at)
    group_of = torch.arange(in_features) // group
    if order is not None:
        columns, group_of = columns[order], group_of[order.cpu()]
    group_at = group_of.tolist()
    block = _block_size(group)
    for start in range(0, in_features, block):
        stop = min(start + block, in_features)
        errors = columns.new_empty(stop - start, out_features)
        for k in range(start, stop):
            g = group_at[k]
            if not static and k % group == 0:
                scales[g], zeros[g] = _min_max(columns[k : k + group], method, at)
            scale, zero = scales[g].float(), zeros[g]
            segment = lookup.segment(columns[k] / scale + zero)
            codes[k] = lookup.codes[segment]
            if factor is None:
                continue
            error = (columns[k] - scale * (lookup.mean_levels[segment] - zero)) / factor[k, k]
            columns[k + 1 : stop].addr_(factor[k, k + 1 : stop], error, alpha=-1)
            errors[k - start] = error
        if factor is not None and stop < in_features:
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return QuantizedWeight(
        codes=codes.t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=None if method.sym else zeros.t().to(torch.uint8).contiguous(),
        damping=damping,
    )


def _permuted(hessian: Tensor | None, order: Tensor) -> Tensor:
    """Rows and columns of ``hessian`` in ``order``."""
    assert hessian is not None
    return hessian[order][:, order]


def _block_size(group: int) -> int:
    """Most columns up to `MAX_BLOCK` such that blocks and groups never overlap in part."""
    if group <= MAX_BLOCK:
        return MAX_BLOCK // group * group
    return max(size for size in range(16, MAX_BLOCK + 1, 16) if group % size == 0)


def _min_max(columns: Tensor, method: Method, at: str) -> tuple[Tensor, Tensor]:
    """Scale (in its stored type) and zero that let ``2**master_bits - 1`` steps span the range of each column group."""
    steps = 2**method.master_bits - 1
    low, high = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
    if method.sym:
        high = torch.maximum(high, -low)
        low = -high
    limits = torch.finfo(method.scale_dtype)
    scale = ((high - low) / steps).clamp(min=limits.tiny * limits.eps)  # the smallest subnormal: never zero
    if scale.max() > limits.max:
        raise ValueError(f"scales must fit {method.scale_dtype}, got {scale.max().item():.3g}{at}")
    stored = scale.to(method.scale_dtype)
    if method.sym:
        return stored, torch.full_like(scale, 2.0 ** (method.master_bits - 1))
    return stored, (-low / stored.float()).round_().clamp_(0, steps)


def _decode(result: QuantizedWeight, bits: int, method: Method) -> Tensor:
    """Weights at a width, columns in stored order."""
    return dequantize(
        result.codes,
        result.own_scales.get(bits, result.scales),
        result.zeros,
        bits=bits,
        group_size=method.group_size,
        rule=method.rule,
        master_bits=method.master_bits,
    )


def _quadratic(matrix: Tensor, hessian: Tensor) -> Tensor:
    """``tr(M H M^T)``."""
    return (matrix @ hessian).mul_(matrix).sum(dtype=torch.float64)


def _fit_scales(dense: Tensor, hessian: Tensor, result: QuantizedWeight, bits: int, method: Method, at: str) -> Tensor:
    """Least-squares scales of one width: ``argmin_s (w - s l) H (w - s l)^T`` for each row.

    ``l`` are the centred levels; the groups of a row are solved for together (the H-weighted normal equations).
    """
    out_features, in_features = dense.shape
    groups = result.scales.shape[1]
    unit = QuantizedWeight(result.codes, torch.ones_like(result.scales), result.zeros)
    levels = _decode(unit, bits, method)
    grouped = levels.view(out_features, groups, -1)
    normal = torch.stack(
        [
            (grouped[:, i] @ hessian.view(groups, -1, in_features)[i])
            .mul_(levels)
            .view(out_features, groups, -1)
            .sum(-1)
            for i in range(groups)
        ],
        dim=1,
    )
    target = (dense @ hessian).mul_(levels).view(out_features, groups, -1).sum(-1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = SCALE_RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    # The ridge pulls towards the shared scale, which stays where a group decodes to nothing but zeros.
    diagonal += ridge
    fitted = torch.linalg.solve(normal, target + ridge * result.scales.float())
    stored = fitted.to(method.scale_dtype).contiguous()
    if not torch.isfinite(stored).all():
        raise ValueError(
            f"scales of {bits} bits must fit {method.scale_dtype}, got {fitted.abs().max().item():.3g}{at}"
        )
    return stored
