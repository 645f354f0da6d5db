"""Hessians of a block's linear layers, ``H = 2 / n * X^T X`` over the calibration tokens that reach them.

Products of one batch are float32, their sum over batches float64: the order of batches, and with it the number of
processes they are spread over, then does not show in the result.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import world


class HessianHooks:
    """Collects one Hessian for each distinct input of ``linears`` while it is entered.

    Layers that are given the very same tensor (q, k and v; gate and up) share one Hessian.

    Example:
        >>> linear = nn.Linear(16, 4)
        >>> with HessianHooks({"linear": linear}) as hooks:
        ...     _ = linear(torch.ones(3, 16))
        >>> hooks.hessian("linear")[0, 0].item()
        2.0
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._leader: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[str, Tensor] | None = None

    def __enter__(self) -> HessianHooks:
        self._handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in self._linears.items()]
        return self

    def __exit__(self, *_: object) -> None:
        self._last = None
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            if self._last is not None and self._last[1] is x:
                leader = self._last[0]
            else:
                leader = name
                self._last = (name, x)
            if self._leader.setdefault(name, leader) != leader:
                raise RuntimeError(f"{name} must share its input with the same layers in every batch")
            if leader == name:
                flat = x.reshape(-1, x.shape[-1]).float()
                product = flat.t() @ flat
                if name not in self._sums:
                    self._sums[name] = torch.zeros_like(product, dtype=torch.float64)
                    self._tokens[name] = 0
                self._sums[name] += product
                self._tokens[name] += flat.shape[0]

        return hook

    def reduce(self) -> None:
        """Sum over the processes of the default group, if there is one. Every process must have seen a batch."""
        if world() == 1:
            return
        for name, total in self._sums.items():
            tokens = torch.tensor(self._tokens[name], device=total.device)
            dist.all_reduce(total)
            dist.all_reduce(tokens)
            self._tokens[name] = int(tokens)

    def groups(self) -> dict[str, list[str]]:
        """First layer of each distinct input -> all layers that share it. Layers without input are left out."""
        found: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            found.setdefault(leader, []).append(name)
        return found

    def hessian(self, name: str) -> Tensor:
        """Float32 ``(in_features, in_features)`` of the layer ``name``."""
        leader = self._leader[name]
        return (self._sums[leader] * (2 / self._tokens[leader])).float()
