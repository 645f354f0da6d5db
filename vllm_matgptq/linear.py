"""Quantised linear layers: what is loaded into them, cut for a rank, and how they are computed.

A layer of vLLM may hold several of the checkpoint (q, k and v; gate and up). Each of these is a `Shard`, with tensors
and a width of its own. Neighbours that are stored alike become one `MatGPTQLinear`, and neighbours that are served at
one width are one call.

torch.compile sees one op a layer, ``vllm_matgptq::linear``, which finds the layer when it runs. So compiled code, and
vLLM's cache of it, holds for every width, and similar layers share it. `compiler` makes what is around a layer part of
its call there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from matgptq.kernels.matmul import buckets, warmup
from matgptq.kernels.op import silu_and_mul
from matgptq.kernels.packing import TILE
from matgptq.kernels.problem import MEAN_ROWS
from matgptq.kernels.shared_norm import normalised, normalised_sum, summed_fake
from matgptq.kernels.tiles import can_implement
from matgptq.linear import MatGPTQLinear
from matgptq.packed import PackedLinear
from matgptq.slicing import MAX_BITS, MIN_BITS

from .compiler import set_compile_options
from .shards import Shard

if TYPE_CHECKING:
    from .config import MatGPTQConfig

SUFFIXES = {"qweight": torch.uint8, "zeros": torch.uint8, "perm": torch.int32, "scales": torch.float32}
SUFFIXES |= {f"scales_{bits}": torch.float32 for bits in range(MIN_BITS, MAX_BITS + 1)}

library = torch.library.Library("vllm_matgptq", "DEF")
library.define(
    "linear(Tensor x, Tensor key, int out_features, bool gated=False) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
library.define(
    "summed_linear(Tensor x, Tensor residual, Tensor norm, float eps, Tensor key, int out_features) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "scaled_linear(Tensor z, Tensor means, Tensor key, int out_features, bool gated=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_served: WeakValueDictionary[int, FusedLinear] = WeakValueDictionary()  # by the address of the layer's key


def _linear(x: Tensor, key: Tensor, out_features: int, gated: bool = False) -> Tensor:
    layer = _served[key.data_ptr()]
    return layer.gated(x) if gated else layer(x)


def _linear_fake(x: Tensor, key: Tensor, out_features: int, gated: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _summed_linear(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, key: Tensor, out_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _served[key.data_ptr()].summed(x, residual, norm, eps)


def _summed_linear_fake(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, key: Tensor, out_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    return summed_fake(x.new_empty(*x.shape[:-1], out_features))


def _scaled_linear(z: Tensor, means: Tensor, key: Tensor, out_features: int, gated: bool = False) -> Tensor:
    return _served[key.data_ptr()].scaled(z, means, gated)


def _scaled_linear_fake(z: Tensor, means: Tensor, key: Tensor, out_features: int, gated: bool = False) -> Tensor:
    return z.new_empty(*z.shape[:-1], out_features)


library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_matgptq::linear", _linear_fake, lib=library)
library.impl("summed_linear", _summed_linear, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_matgptq::summed_linear", _summed_linear_fake, lib=library)
library.impl("scaled_linear", _scaled_linear, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_matgptq::scaled_linear", _scaled_linear_fake, lib=library)


class FusedLinear(nn.Module):
    """The layers of the checkpoint that vLLM computes as one: ``(..., in_features)`` to ``(..., out_features)``.

    Args:
        layers: the layers, in the order of their outputs; they are not used any more afterwards.
        dtype: type of the activations.
        resident: hold all bits, so that `set_bits` works.
        packed: in the kernels' layout, as on a GPU, or as they are stored.

    Attributes:
        peak_bytes: the most that was allocated on the GPU until this layer was loaded.

    Raises:
        ValueError: the GPU or the sizes are not ones that the kernels serve.
    """

    def __init__(
        self, layers: Sequence[MatGPTQLinear], *, dtype: torch.dtype, resident: bool = False, packed: bool = False
    ) -> None:
        super().__init__()
        self.names = [layer.name for layer in layers]
        self.sizes = [layer.out_features for layer in layers]
        self.widths = [layer.widths for layer in layers]
        self.resident = resident
        self.peak_bytes = 0
        groups: list[list[MatGPTQLinear]] = []
        for layer in layers:
            if groups and _alike(groups[-1][-1], layer, resident, packed):
                groups[-1].append(layer)
            else:
                groups.append([layer])
        self.blocks = nn.ModuleList()
        self._counts = [len(group) for group in groups]
        for group in groups:
            block = fuse(group)
            self.blocks.append(_pack(block, dtype, resident) if packed else block)
        self.set_bits([layer.bits for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        """``y = x W^T``, a call a run of outputs at one width."""
        outputs = [run(x) for run in self.runs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def gated(self, x: Tensor) -> Tensor:
        """``silu(first) * second`` of two layers of one size: one call, where they are one."""
        return self.runs[0](x, gated=True) if self._gates() else silu_and_mul(self(x))

    def summed(self, x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """z, the sum and means of ``rms_norm(forward(x) + residual)`` (`matgptq.kernels.shared_norm`)."""
        run = self._only_run()
        return normalised_sum(self(x), residual, norm, eps) if run is None else run.summed(x, residual, norm, eps)

    def scaled(self, z: Tensor, means: Tensor, gated: bool) -> Tensor:
        """`gated`, or `forward`, of what `summed` returned."""
        run = self._only_run()
        if run is not None and (self._gates() or not gated):
            return run.scaled(z, means, gated)
        z = normalised(z, means)
        return self.gated(z) if gated else self(z)

    def _only_run(self) -> PackedLinear | None:
        """The layer that is all, if one is, and the kernels take its columns in their order."""
        run = self.runs[0]
        return run if len(self.runs) == 1 and isinstance(run, PackedLinear) and run.perm is None else None

    def _gates(self) -> bool:
        """Whether the kernels compute `gated` as one."""
        run = self.runs[0]
        packed = len(self.runs) == 1 and isinstance(run, PackedLinear)
        return packed and len(self.sizes) == 2 and self.sizes[0] == self.sizes[1] and self.sizes[0] % TILE == 0

    def set_bits(self, bits: Sequence[int]) -> None:
        """Serve the layers at these widths, each of them one of its `widths`: neighbours at one width are one call."""
        self.bits = list(bits)
        self.runs: list[MatGPTQLinear] = []
        i = 0
        for block, count in zip(self._blocks(), self._counts, strict=True):
            start = stop = 0
            for width, same in itertools.groupby(range(i, i + count), lambda i: bits[i]):
                stop += sum(self.sizes[i] for i in same)
                run = block if stop - start == block.out_features else block.rows(start, stop)
                run.bits = width
                self.runs.append(run)
                start = stop
            i += count

    def _blocks(self) -> list[MatGPTQLinear]:
        return list(self.blocks)  # type: ignore[arg-type]

    def warm_up(self, tokens: Iterable[int]) -> None:
        """Compile and load the kernels for these numbers of tokens."""
        runs = [run for run in self.runs if isinstance(run, PackedLinear) and run.planes.is_cuda]
        # A sum and its norm follow no layer of several parts; they come before gate and up.
        problems = set()
        for run, count, gated in itertools.product(runs, tokens, (False, True) if self._gates() else (False,)):
            plain = run.problem(count, gated)
            problems |= {plain, replace(plain, scaled=True)}
            if len(self.sizes) == 1 and run.out_features % MEAN_ROWS == 0:
                problems.add(replace(plain, summed=True))
        problems -= _warm
        if problems:
            warmup(problems, runs[0].planes.device)
            _warm.update(problems)


_warm: set[Any] = set()  # problems whose kernels are loaded


def fuse(layers: Sequence[MatGPTQLinear]) -> MatGPTQLinear:
    """One layer with the outputs of all, one after another; they are stored alike (`_alike`).

    A width for which only some have scales of its own takes the shared scales of the others.
    """
    if len(layers) == 1:
        return layers[0]
    first = layers[0]
    fused = MatGPTQLinear(
        first.in_features,
        sum(layer.out_features for layer in layers),
        bits=first.bits,
        group_size=first.group_size,
        sym=first.zeros is None,
        rule=first.rule,
        master_bits=first.master_bits,
        stored_bits=first.stored_bits if first.qweight.dim() == 3 else None,
        act_order=first.perm is not None,
        own_widths={bits for layer in layers for bits in layer.own_widths},
        dtype=first.scales.dtype,
        zero_dtype=torch.uint8 if first.zeros is None else first.zeros.dtype,
        device="meta",
        name=" + ".join(layer.name for layer in layers),
    )
    for suffix, buffer in fused.named_buffers():
        if suffix == "perm":
            fused.perm = first.perm
        else:
            parts = [getattr(layer, suffix, layer.scales) for layer in layers]
            setattr(fused, suffix, torch.cat(parts, buffer.dim() - 2))
    return fused


def _alike(a: MatGPTQLinear, b: MatGPTQLinear, resident: bool, packed: bool) -> bool:
    """Whether two neighbours can be one layer: stored alike, and served alike where they are packed at their width."""
    if packed and not resident and a.bits != b.bits:
        return False
    if packed and resident and a.out_features % TILE:
        return False
    if a.perm is None or b.perm is None:
        if a.perm is not b.perm:
            return False
    elif not torch.equal(a.perm, b.perm):
        return False
    if getattr(a.zeros, "dtype", None) != getattr(b.zeros, "dtype", None):
        return False
    return a.qweight.dim() == b.qweight.dim() and a.stored_bits == b.stored_bits and a.scales.dtype == b.scales.dtype


def _pack(layer: MatGPTQLinear, dtype: torch.dtype, resident: bool) -> PackedLinear:
    packed = PackedLinear(layer, dtype=dtype, resident=resident)
    if packed.planes.is_cuda:
        able, reason = can_implement(packed.problem(1))
        if not able:
            raise ValueError(f"{reason} ({layer.name})")
    return packed


class MatGPTQLinearMethod(LinearMethodBase):
    """How vLLM makes, loads and computes a quantised linear layer, or an output layer (lm_head).

    Args:
        config: the model's.
        prefix: the layer's name in vLLM.
        names: names in the checkpoint: one for each part of a fused layer, or one for all of it.
    """

    def __init__(self, config: MatGPTQConfig, prefix: str, names: Sequence[str]) -> None:
        self.config, self.prefix, self.names = config, prefix, names

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register a parameter for each tensor that the checkpoint may have; they take memory when they are loaded.

        Raises:
            ValueError: the columns cannot be cut for this ``tensor_parallel_size``.
        """
        check_cut(self.prefix, input_size, input_size_per_partition, self.config.stored.group_size)
        names = self.names if len(self.names) > 1 else list(self.names) * len(output_partition_sizes)
        if len(names) != len(output_partition_sizes):
            raise ValueError(f"{self.prefix} must hold {len(output_partition_sizes)} layers, got {', '.join(names)}")
        row_ways = output_size // sum(output_partition_sizes)
        if isinstance(layer, VocabParallelEmbedding):
            row_ways = 1  # `load` cuts what is stored, which vLLM fills up
        column_ways = input_size // input_size_per_partition
        rank = getattr(layer, "tp_rank", None)
        rank = get_tensor_model_parallel_rank() if rank is None else rank
        self.shards = []
        for i, (name, rows) in enumerate(zip(names, output_partition_sizes, strict=True)):
            shared = getattr(layer, "num_kv_head_replicas", 1) if i > 0 else 1  # ranks that hold the same keys, values
            ways = max(1, row_ways // shared)
            self.shards.append(
                Shard(
                    name,
                    rows,
                    input_size_per_partition,
                    ways,
                    rank // shared if ways > 1 else 0,
                    column_ways,
                    rank if column_ways > 1 else 0,
                )
            )
        self.dtype = params_dtype
        vllm_config = get_current_vllm_config()
        set_compile_options(vllm_config)
        self.dummy = vllm_config.load_config.load_format == "dummy"
        self.tokens = token_counts(vllm_config)
        for suffix, dtype in SUFFIXES.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(self.load, layer, suffix)  # type: ignore[attr-defined]
            layer.register_parameter(suffix, parameter)

    def load(
        self, layer: nn.Module, suffix: str, parameter: nn.Parameter, tensor: Tensor, shard_id: Any = None
    ) -> None:
        """Give a stored tensor to the shards that it belongs to.

        Args:
            shard_id: "q", "k" or "v"; the number, or a tuple of numbers, of parts; None where the tensor is the whole.
        """
        if isinstance(layer, VocabParallelEmbedding):
            tensor = _vocabulary_part(layer, suffix, tensor, self.shards[0])
        if shard_id is None:
            shards = self.shards
        elif isinstance(shard_id, str):
            shards = [self.shards["qkv".index(shard_id)]]
        else:
            shards = [self.shards[i] for i in (shard_id if isinstance(shard_id, tuple) else (shard_id,))]
        if len(shards) == 1 or suffix == "perm":
            parts: Sequence[Tensor] = [tensor] * len(shards)
        else:  # fused in the checkpoint too
            rows = [shard.stored_rows for shard in shards]
            if sum(rows) != tensor.shape[-2]:
                got = tuple(tensor.shape)
                raise ValueError(f"{self.prefix}.{suffix} must have {sum(rows)} rows for this model, got {got}")
            parts = tensor.split(rows, -2)
        for shard, part in zip(shards, parts, strict=True):
            shard.load(suffix, part, parameter.device)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the loaded tensors a `FusedLinear`, packed on a GPU, and compile the kernels that it needs."""
        if not self.shards:
            return  # done already
        device = layer.qweight.device
        if self.dummy:
            for shard in self.shards:
                shard.fill(self.config, self.dtype, device)
        layers = []
        for shard in self.shards:
            layers.append(shard.layer(self.config))
            shard.tensors = {}
        self.shards = []
        for suffix in SUFFIXES:
            delattr(layer, suffix)
        packed = device.type == "cuda"
        fused = FusedLinear(layers, dtype=self.dtype, resident=self.config.resident, packed=packed)
        fused.warm_up(self.tokens)
        fused.peak_bytes = torch.cuda.max_memory_allocated(device) if packed else 0
        layer.matgptq = fused
        layer.matgptq_key = nn.Parameter(torch.empty(1, dtype=torch.uint8, device=device), requires_grad=False)
        _served[layer.matgptq_key.data_ptr()] = fused
        self.out_features = sum(fused.sizes)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + bias`` on this rank."""
        y = torch.ops.vllm_matgptq.linear(x, layer.matgptq_key, self.out_features)
        return y if bias is None else y + bias


def check_cut(name: str, in_features: int, part: int, group_size: int) -> None:
    """Raise a ValueError unless ``part`` of the ``in_features`` columns of a layer is whole groups."""

    def fits(columns: int) -> bool:
        return columns % 16 == 0 and (group_size == -1 or columns % group_size == 0)

    if not fits(part):
        sizes = [ways for ways in range(1, 65) if in_features % ways == 0 and fits(in_features // ways)]
        raise ValueError(
            f"tensor_parallel_size must be one of {', '.join(map(str, sizes)) or 'none'} for {name}, whose "
            f"{in_features} in_features are stored in groups of {group_size}, got {in_features // part}"
        )


def token_counts(vllm_config: Any) -> list[int]:
    """Numbers of tokens for which kernels are compiled before graphs are captured."""
    captured = vllm_config.compilation_config.cudagraph_capture_sizes or ()
    return buckets(max(0, *captured, vllm_config.scheduler_config.max_num_batched_tokens))


def _vocabulary_part(layer: Any, suffix: str, tensor: Tensor, shard: Shard) -> Tensor:
    """This rank's rows of the output layer, filled up to what vLLM computes on each rank."""
    if suffix == "perm":
        return tensor
    first, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    if tensor.shape[-2] != layer.org_vocab_size:
        raise ValueError(
            f"{shard.name}.{suffix} must have {layer.org_vocab_size} rows for this model, got {tuple(tensor.shape)}"
        )
    part = tensor.narrow(-2, first, end - first)
    return nn.functional.pad(part, (0, 0, 0, shard.out_features - part.shape[-2]))
