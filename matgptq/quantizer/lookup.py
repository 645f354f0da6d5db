"""Choosing a nested code is a one-dimensional lookup.

MatGPTQ picks, for each weight, the code whose slices are best on average over the trained widths:

    q = argmin_c  sum_b lambda_b * (u - v_b(c))**2,        u = w / scale + zero

with ``v_b(c)`` the level of code ``c`` at width ``b`` (`matgptq.slicing`). Up to a term without ``c`` the cost of
a code is a line in ``u``,

    cost_c(u) = -2 * A_c * u + B_c,     A_c = sum_b lambda_b * v_b(c),     B_c = sum_b lambda_b * v_b(c)**2,

so the best code is the lower envelope of ``2**master_bits`` lines: a sorted list of breakpoints, found once. The
envelope is computed in rational arithmetic, so it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ..slicing import check_bits, check_rule, code_levels


@dataclass(frozen=True)
class CodeLookup:
    """Best code and its mean level for any ``u``; made by `build_lookup`.

    Attributes:
        breakpoints: ascending, float32 ``(n - 1,)``: segment ``i`` holds ``breakpoints[i-1] < u <= breakpoints[i]``.
        codes: uint8 ``(n,)``, the best code of each segment.
        mean_levels: float32 ``(n,)``, ``sum_b lambda_b v_b(code) / sum_b lambda_b``: what error feedback subtracts.
    """

    breakpoints: Tensor
    codes: Tensor
    mean_levels: Tensor

    def segment(self, u: Tensor) -> Tensor:
        """Index into ``codes`` and ``mean_levels`` for each element of ``u`` (weights in code units)."""
        return torch.bucketize(u, self.breakpoints)

    def to(self, device: torch.device | str) -> CodeLookup:
        """The same lookup on another device."""
        return CodeLookup(self.breakpoints.to(device), self.codes.to(device), self.mean_levels.to(device))


def build_lookup(
    widths: Sequence[int], lambdas: Sequence[float], rule: str = "round", master_bits: int = 8
) -> CodeLookup:
    """Lower envelope for a set of trained widths (equations at the top of this module).

    Where codes have the same cost everywhere (low bits that no trained width reads), the one nearest to its mean
    level is taken, so that an untrained width is served as well as it can be.

    Args:
        widths: trained widths, each 2 to ``master_bits``, no two alike.
        lambdas: weight of each width's error, positive, in the order of ``widths``.
        rule: slicing rule.
        master_bits: width of the codes.

    Raises:
        ValueError: a width, lambda or the rule is out of range, or the lengths differ.
    """
    check_bits(master_bits, name="master_bits")
    check_rule(rule)
    check_widths(widths, lambdas, master_bits)
    weights = [Fraction(value) for value in lambdas]
    levels = [[Fraction(v) for v in code_levels(b, rule, master_bits).tolist()] for b in widths]
    total = sum(weights)
    lines: dict[Fraction, tuple[Fraction, int]] = {}  # A -> (B, code): of parallel lines only the lowest can win
    for code in range(2**master_bits):
        a = sum((lam * level[code] for lam, level in zip(weights, levels, strict=True)), Fraction(0))
        b = sum((lam * level[code] ** 2 for lam, level in zip(weights, levels, strict=True)), Fraction(0))
        best = lines.get(a)
        if best is None or (b, abs(code - a / total)) < (best[0], abs(best[1] - a / total)):
            lines[a] = (b, code)

    hull: list[tuple[Fraction, Fraction, int]] = []  # (A, B, code), ascending A: the winner moves right with u
    breaks: list[Fraction] = []
    for a, (b, code) in sorted(lines.items()):
        crossing = None
        while hull:
            last_a, last_b, _ = hull[-1]
            crossing = (b - last_b) / (2 * (a - last_a))
            if not breaks or crossing > breaks[-1]:
                break
            hull.pop()
            breaks.pop()
        if hull:
            assert crossing is not None
            breaks.append(crossing)
        hull.append((a, b, code))
    return CodeLookup(
        breakpoints=torch.tensor([float(x) for x in breaks], dtype=torch.float32),
        codes=torch.tensor([code for _, _, code in hull], dtype=torch.uint8),
        mean_levels=torch.tensor([float(a / total) for a, _, _ in hull], dtype=torch.float32),
    )


def check_widths(widths: Sequence[int], lambdas: Sequence[float], master_bits: int) -> None:
    """Raise a ValueError unless ``widths`` and ``lambdas`` can be trained together."""
    if not widths:
        raise ValueError("widths must name at least one width, got none")
    for width in widths:
        check_bits(width, name="widths", most=master_bits)
    if len(set(widths)) != len(widths):
        raise ValueError(f"widths must differ from one another, got {tuple(widths)}")
    if len(lambdas) != len(widths):
        raise ValueError(f"lambdas must have one value for each of the {len(widths)} widths, got {len(lambdas)}")
    for value in lambdas:
        if not 0 < value < float("inf"):
            raise ValueError(f"lambdas must be positive and finite, got {value!r}")
