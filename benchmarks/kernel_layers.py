"""Random layers on a GPU, plain, gated and around a norm, by the kernels and in float64, for `kernel_checks`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matgptq.kernels.matmul import matmul
from matgptq.kernels.packing import pack_codes, pack_scales
from matgptq.kernels.shared_norm import scaled_linear, summed_linear
from matgptq.slicing import slice_codes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Layer:
    """A random layer and its float64 weights."""

    def __init__(
        self,
        N: int,
        K: int,
        bits: int,
        dtype: str = "float16",
        group_size: int = 128,
        rule: str = "round",
        resident: bool = False,
        zeros: bool = False,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        make = torch.Generator("cuda").manual_seed(seed)
        codes = torch.randint(0, 256, (N, K), dtype=torch.uint8, device="cuda", generator=make)
        groups = 1 if group_size == -1 else K // group_size
        scales = (torch.rand((N, groups), device="cuda", generator=make) * 0.01 + 0.002).to(DTYPES[dtype])
        zero = (
            torch.rand((N, groups), device="cuda", generator=make) * 60 + 98
            if zeros
            else torch.full((N, groups), 128.0, device="cuda")
        )
        self.scales, self.zeros = pack_scales(scales), pack_scales(zero) if zeros else None
        self.bias = torch.randn(N, device="cuda", generator=make).to(DTYPES[dtype]) if bias else None
        self.slices = slice_codes(codes, bits, rule)
        self.planes = pack_codes(codes, 8) if resident else pack_codes(self.slices, bits)
        level = self.slices.double() * 2 ** (8 - bits) + ((2 ** (8 - bits) - 1) / 2 if rule == "prefix" else 0)
        per_column = K if group_size == -1 else group_size
        self.weight = (level - zero.double().repeat_interleave(per_column, 1)) * scales.double().repeat_interleave(
            per_column, 1
        )
        self.options: dict[str, Any] = {
            "bits": bits,
            "group_size": group_size,
            "in_features": K,
            "out_features": N,
            "rule": rule,
            "resident": resident,
            "gated": False,
        }
        self.operands = (self.planes, self.scales, self.zeros, self.bias)

    @property
    def in_features(self) -> int:
        """Columns of x."""
        return int(self.options["in_features"])

    def __call__(self, x: Tensor) -> Tensor:
        """The kernels' product."""
        return matmul(x, *self.operands, **self.options)

    def reference(self, x: Tensor) -> Tensor:
        """The product in float64."""
        y = x.double() @ self.weight.T
        return y if self.bias is None else y + self.bias.double()


class GatedLayer(Layer):
    """Two layers of N rows each, gated."""

    def __init__(self, N: int, K: int, bits: int, *rest: Any, **options: Any) -> None:
        super().__init__(2 * N, K, bits, *rest, **options)
        self.options |= {"out_features": N, "gated": True}

    def reference(self, x: Tensor) -> Tensor:
        """The result in float64."""
        gate, up = super().reference(x).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


class Normed:
    """Two layers with RMSNorm of a sum between them; residual and norm are random."""

    eps = 1e-5

    def __init__(self, first: Layer, second: Layer) -> None:
        self.first, self.second, self.in_features = first, second, first.in_features

    def _others(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype, size = str(x.dtype).split(".")[-1], self.first.options["out_features"]
        return tokens(len(x), size, dtype, seed=2), tokens(1, size, dtype, seed=3)[0]

    def sums(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, sum and means of the first layer's kernel."""
        return summed_linear(x, *self._others(x), self.eps, *self.first.operands, **self.first.options)

    def __call__(self, x: Tensor) -> Tensor:
        """The kernels' product."""
        z, _, means = self.sums(x)
        return scaled_linear(z, means, *self.second.operands, **self.second.options)

    def product(self, x: Tensor, total: Tensor) -> Tensor:
        """The second layer's product in float64, from the sum."""
        h, norm = total.double(), self._others(x)[1].double()
        return self.second.reference(h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + self.eps) * norm)

    def sum(self, x: Tensor) -> Tensor:
        """The sum in float64."""
        return self.first.reference(x) + self._others(x)[0].double()

    def reference(self, x: Tensor) -> Tensor:
        """The product in float64."""
        return self.product(x, self.sum(x))

    def z(self, x: Tensor, total: Tensor) -> Tensor:
        """The sum times norm, in the sum's type."""
        return total * self._others(x)[1]


def tokens(M: int, K: int, dtype: str, seed: int = 1) -> Tensor:
    """Normal random activations."""
    return torch.randn((M, K), device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(DTYPES[dtype])
