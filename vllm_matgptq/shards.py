"""A layer of the checkpoint while vLLM loads it: its tensors, cut for a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from matgptq.checkpoint import check_values
from matgptq.dummy import random_codes
from matgptq.linear import MatGPTQLinear
from matgptq.slicing import MAX_BITS, MIN_BITS

if TYPE_CHECKING:
    from .config import MatGPTQConfig


class Shard:
    """One layer of the checkpoint, or its part on this rank, while it is loaded.

    Args:
        name: name in the checkpoint.
        out_features, in_features: size on this rank.
        row_ways, row_rank: into how many parts the stored rows are cut, and which of them is this rank's.
        column_ways, column_rank: likewise for the stored columns.
    """

    def __init__(
        self,
        name: str,
        out_features: int,
        in_features: int,
        row_ways: int = 1,
        row_rank: int = 0,
        column_ways: int = 1,
        column_rank: int = 0,
    ) -> None:
        self.name = name
        self.out_features, self.in_features = out_features, in_features
        self.row_ways, self.row_rank = row_ways, row_rank
        self.column_ways, self.column_rank = column_ways, column_rank
        self.tensors: dict[str, Tensor] = {}

    @property
    def stored_rows(self) -> int:
        """Rows of the stored layer."""
        return self.out_features * self.row_ways

    def load(self, suffix: str, tensor: Tensor, device: torch.device) -> None:
        """Keep this rank's part of a stored tensor.

        Raises:
            ValueError: the tensor does not have the rows or columns of the layer, or is a ``perm`` of a layer whose
                columns are cut.
        """
        if suffix == "perm":
            if self.column_ways > 1:
                raise ValueError(
                    f"tensor_parallel_size must be 1 for {self.name}, whose columns are stored in another order "
                    f"(perm), got {self.column_ways}: quantise without act order to cut it"
                )
            self.tensors[suffix] = tensor.to(device, torch.int32)
            return
        if tensor.shape[-2] != self.stored_rows:
            raise ValueError(
                f"{self.name}.{suffix} must have {self.stored_rows} rows for this model, got {tuple(tensor.shape)}"
            )
        tensor = tensor.narrow(-2, self.row_rank * self.out_features, self.out_features)
        if self.column_ways > 1 and tensor.shape[-1] > 1:  # a single scale a row serves all columns
            columns = tensor.shape[-1] // self.column_ways
            tensor = tensor.narrow(-1, self.column_rank * columns, columns)
        self.tensors[suffix] = tensor.to(device, copy=True)  # a copy: the file is let go

    def fill(self, config: MatGPTQConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Random codes, and scales that keep the size of activations: for ``--load-format dummy``."""
        stored, n, k = config.stored, self.out_features, self.in_features
        groups = 1 if stored.group_size == -1 else k // stored.group_size
        codes, deviation = random_codes((n, k), stored.master_bits, device)
        scales = torch.full((n, groups), k**-0.5 / deviation, dtype=dtype, device=device)
        self.tensors = {"qweight": codes, "scales": scales}
        if not stored.sym:
            middle = 2 ** (stored.master_bits - 1)
            self.tensors["zeros"] = torch.full((n, groups), middle, dtype=torch.uint8, device=device)

    def layer(self, config: MatGPTQConfig) -> MatGPTQLinear:
        """The layer that the loaded tensors make.

        Raises:
            ValueError: a tensor is missing, or has the wrong shape, type or values.
        """
        stored, tensors = config.stored, self.tensors
        wanted = ("qweight", "scales") if stored.sym else ("qweight", "scales", "zeros")
        for suffix in wanted:
            if suffix not in tensors:
                raise ValueError(f"{self.name}.{suffix} must be stored, got no such tensor")
        codes, scales = tensors["qweight"], tensors["scales"]
        layer = MatGPTQLinear(
            self.in_features,
            self.out_features,
            bits=stored.bits_for(self.name),
            group_size=stored.group_size,
            sym=stored.sym,
            rule=stored.slicing,
            master_bits=stored.master_bits,
            stored_bits=codes.shape[0] if codes.dim() == 3 else None,
            act_order="perm" in tensors,
            own_widths=[bits for bits in range(MIN_BITS, MAX_BITS + 1) if f"scales_{bits}" in tensors],
            dtype=scales.dtype,
            zero_dtype=tensors["zeros"].dtype if "zeros" in tensors else torch.uint8,
            device="meta",
            name=self.name,
        )
        for suffix, tensor in tensors.items():
            want = getattr(layer, suffix)
            if want is None or want.shape != tensor.shape or want.dtype != tensor.dtype:
                rule = "must be absent" if want is None else f"must be {want.dtype} {tuple(want.shape)} on this rank"
                raise ValueError(f"{self.name}.{suffix} {rule}, got {tensor.dtype} {tuple(tensor.shape)}")
            setattr(layer, suffix, tensor)
        check_values(layer, "checkpoint")
        return layer
