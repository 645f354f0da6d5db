"""Layers without an engine: cut for ranks, packed as on a GPU, registered by the entry point."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import engines  # noqa: F401 - sets the environment before vLLM is imported
import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache

import matgptq
import vllm_matgptq.compiler
import vllm_matgptq.linear
from matgptq.config import QuantConfig
from matgptq.overlap import WaitFirst
from matgptq.planes import pack_planes
from vllm_matgptq import MatGPTQConfig, engine_args
from vllm_matgptq.linear import FusedLinear, MatGPTQLinearMethod

COLUMNS, GROUP = 128, 32
HEAD = 64


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch):
    """What layers ask of the engine's config."""
    config = SimpleNamespace(
        load_config=SimpleNamespace(load_format="auto"),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=None, inductor_compile_config={}),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
    )
    monkeypatch.setattr(vllm_matgptq.linear, "get_current_vllm_config", lambda: config)
    return config


def stored(rows, seed, columns=COLUMNS, zeros=True, own=(4,), perm=False, planes=None):
    """A layer's tensors, and the layer they make."""
    random = torch.Generator().manual_seed(seed)
    top = 256 if planes is None else 2**planes
    codes = torch.randint(0, top, (rows, columns), generator=random).to(torch.uint8)
    tensors = {"qweight": codes if planes is None else pack_planes(codes, planes)}
    shape = (rows, columns // GROUP)
    for suffix in ("scales", *(f"scales_{bits}" for bits in own)):
        tensors[suffix] = torch.rand(shape, generator=random) * 0.01
    if zeros:
        tensors["zeros"] = torch.randint(96, 160, shape, generator=random).to(torch.uint8)
    if perm:
        tensors["perm"] = torch.randperm(columns, generator=random).int()
    return tensors


def whole(tensors, bits, sym=False):
    """The layer that the tensors of a checkpoint make."""
    codes = tensors["qweight"]
    planes = codes.shape[0] if codes.dim() == 3 else None
    columns = codes.shape[-1] * (1 if planes is None else 8)
    own = [int(name.removeprefix("scales_")) for name in tensors if name.startswith("scales_")]
    layer = matgptq.MatGPTQLinear(
        columns, codes.shape[-2], bits=bits, group_size=GROUP, sym=sym, stored_bits=planes, own_widths=own,
        act_order="perm" in tensors, dtype=tensors["scales"].dtype, name="layer",
    )  # fmt: skip
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)
    return layer


def rank_layer(parts, sizes, *, columns=COLUMNS, ways=1, rank=0, output_size=None, shard_ids=None, **options):
    """What one rank's layer makes of checkpoint tensors, and its `FusedLinear`."""
    config = MatGPTQConfig({"quant_method": "matgptq", "group_size": GROUP, "sym": False, **options.pop("config", {})})
    layer = nn.Module()
    layer.tp_rank = rank
    for name, value in options.items():
        setattr(layer, name, value)
    names = list(parts)
    method = MatGPTQLinearMethod(config, "model.qkv_proj", names)
    method.create_weights(layer, columns // ways, sizes, columns, output_size or sum(sizes), torch.float32)
    for name, shard_id in zip(names, shard_ids or [None] * len(names), strict=True):
        for suffix, tensor in parts[name].items():
            parameter = getattr(layer, suffix)
            parameter.weight_loader(parameter, tensor, *([] if shard_id is None else [shard_id]))
    method.process_weights_after_loading(layer)
    return method, layer


@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("planes", [None, 8])
def test_a_fused_column_parallel_layer_is_cut_by_heads(ways, planes):
    """4 query heads, 2 of keys and of values, which 4 ranks hold twice."""
    widths = {"model.q_proj": 3, "model.k_proj": 4, "model.v_proj": 4}
    parts = {
        name: stored(HEAD * heads, i, planes=planes)
        for i, (name, heads) in enumerate(zip(widths, (4, 2, 2), strict=True))
    }
    x = torch.randn(5, COLUMNS)
    want = [whole(parts[name], bits)(x) for name, bits in widths.items()]
    shared = max(1, ways // 2)
    sizes = [HEAD * 4 // ways, HEAD * 2 * shared // ways, HEAD * 2 * shared // ways]
    for rank in range(ways):
        method, layer = rank_layer(
            parts, sizes, rank=rank, output_size=sum(sizes) * ways, shard_ids="qkv", num_kv_head_replicas=shared,
            config={"bits_per_layer": widths},
        )  # fmt: skip
        assert len(layer.matgptq.runs) == 2  # q, and k with v
        places = [rank, rank // shared, rank // shared]
        cut = [y[:, i * size : (i + 1) * size] for y, i, size in zip(want, places, sizes, strict=True)]
        torch.testing.assert_close(method.apply(layer, x), torch.cat(cut, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shard_ids", [None, [(0, 1)]])
def test_a_layer_that_the_checkpoint_fuses_is_cut_part_by_part(shard_ids):
    tensors = stored(128, 0, perm=True)
    x, bias = torch.randn(5, COLUMNS), torch.randn(64)
    want = whole(tensors, 4)(x)
    for rank in range(2):
        method, layer = rank_layer(
            {"model.gate_up_proj": tensors}, [32, 32], rank=rank, output_size=128, shard_ids=shard_ids,
            config={"bits": 4},
        )  # fmt: skip
        cut = torch.cat([want[:, 32 * rank :][:, :32], want[:, 64 + 32 * rank :][:, :32]], 1)
        torch.testing.assert_close(method.apply(layer, x, bias), cut + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("planes", [None, 8])
def test_the_parts_of_a_row_parallel_layer_add_up(planes):
    tensors = stored(48, 0, planes=planes)
    x = torch.randn(5, COLUMNS)
    total = torch.zeros(5, 48)
    for rank in range(2):
        method, layer = rank_layer({"model.o_proj": tensors}, [48], ways=2, rank=rank, config={"bits": 4})
        total += method.apply(layer, x[:, 64 * rank :][:, :64])
    torch.testing.assert_close(total, whole(tensors, 4)(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_cut_is_an_error():
    with pytest.raises(ValueError, match=r"tensor_parallel_size must be one of 1, 2, 4 for .*, whose 128 .*, got 8"):
        rank_layer({"model.o_proj": stored(48, 0)}, [48], ways=8)
    with pytest.raises(ValueError, match=r"tensor_parallel_size must be 1 for model.o_proj, .*\(perm\), got 2"):
        rank_layer({"model.o_proj": stored(48, 0, perm=True)}, [48], ways=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scales"), "model.up_proj.scales must be stored, got no such tensor"),
        (lambda t: t.pop("zeros"), "model.up_proj.zeros must be stored, got no such tensor"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), r"qweight must have 48 rows for this model, got \(47, 128\)"),
        (lambda t: t.update(scales=t["scales"][:, :1]), r"scales must be torch.float32 \(48, 4\) on this rank"),
        (lambda t: t.update(scales=t["scales"] * float("inf")), "model.up_proj.scales must be finite"),
    ],
    ids=["scales", "zeros", "rows", "groups", "values"],
)
def test_what_does_not_fit_is_an_error(change, message):
    tensors = stored(48, 0)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        rank_layer({"model.up_proj": tensors}, [48])


@pytest.mark.parametrize("sizes", [(64, 128, 64), (48, 64, 80)])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("perm", [False, True])
def test_packed_as_on_a_gpu_gives_the_same(sizes, resident, perm):
    layers = [whole(stored(n, i, own=own), 4) for i, (n, own) in enumerate(zip(sizes, ((), (4,), (3, 4)), strict=True))]
    if perm:
        layers[1] = whole(stored(sizes[1], 7, perm=True), 4)
    for layer in layers:
        for name, buffer in layer.named_buffers():
            if name.startswith("scales"):
                setattr(layer, name, buffer.half())
    layers[0].bits = 3
    x = torch.randn(5, COLUMNS).half()
    fused = FusedLinear(layers, dtype=torch.float16, resident=resident, packed=True)
    torch.testing.assert_close(fused(x), torch.cat([layer(x) for layer in layers], 1), rtol=2e-3, atol=2e-3)
    if resident:
        if sizes[0] % 64 == 0 and not perm:
            assert len(fused.blocks) == 1
        for bits in ([8, 8, 8], [3, 4, 3]):
            fused.set_bits(bits)
            for layer, width in zip(layers, bits, strict=True):
                layer.bits = width
            torch.testing.assert_close(fused(x), torch.cat([layer(x) for layer in layers], 1), rtol=2e-3, atol=2e-3)


def test_two_layers_of_one_size_can_be_gated():
    layers = [whole(stored(128, i), 4) for i in range(2)]
    for layer in layers:
        layer.to(torch.float16)
    x = torch.randn(5, COLUMNS).half()
    for parts, resident, bits in (
        (layers, False, None),
        (layers, True, [3, 3]),
        (layers, True, [8, 4]),
        (layers[:1], False, None),
    ):
        fused = FusedLinear(parts, dtype=torch.float16, resident=resident, packed=True)
        if bits:
            fused.set_bits(bits)
        gate, up = fused(x).chunk(2, -1)
        assert torch.equal(fused.gated(x), torch.nn.functional.silu(gate) * up)


def test_the_override_may_be_short(tmp_path):
    stored_config = QuantConfig(group_size=64, bits_per_layer={"*.q_proj": 6})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stored_config.to_dict()}))

    def served(**values):
        config = MatGPTQConfig({"quant_method": "matgptq", **values})
        config.maybe_update_config(str(tmp_path))
        return config

    assert served(bits=3).stored == QuantConfig(bits=3, group_size=64)
    assert served(bits_per_layer={"*.k_proj": 2}).stored == QuantConfig(group_size=64, bits_per_layer={"*.k_proj": 2})
    assert served(resident=True).stored == stored_config
    assert served(resident=True).resident
    override = MatGPTQConfig.override_quantization_method
    assert override({"quant_method": "gptq"}, None) is None
    assert override({"quant_method": "matgptq"}, "awq") is None
    assert override({"quant_method": "matgptq_quant"}, "matgptq", hf_config=None) == "matgptq"


def test_engine_args_name_only_what_is_asked():
    assert engine_args() == {"hf_overrides": {"quantization_config": {"quant_method": "matgptq"}}}
    assert engine_args({"*.q_proj": 3})["hf_overrides"]["quantization_config"]["bits_per_layer"] == {"*.q_proj": 3}
    assert engine_args(resident=True)["worker_extension_cls"] == "vllm_matgptq.WidthExtension"


def test_the_op_is_what_torch_compile_needs():
    _, layer = rank_layer({"model.o_proj": stored(48, 0)}, [48])
    arguments = (torch.randn(5, COLUMNS), layer.matgptq_key, 48)
    op = torch.ops.vllm_matgptq.linear.default
    # the other checks call it with a copy of the key, which is known by its address
    torch.library.opcheck(op, arguments, test_utils=("test_autograd_registration",))
    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*arguments), op(*arguments))


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs g++ on a CPU")
@pytest.mark.parametrize("gated", [True, False])
def test_the_norm_of_a_sum_is_shared_by_the_calls_around_it(gated, monkeypatch):
    from vllm import ir
    from vllm.model_executor.layers.activation import SiluAndMul

    _, before = rank_layer({"model.o_proj": stored(COLUMNS, 2)}, [COLUMNS])
    checkpoint = {f"model.{name}_proj": stored(128, i) for i, name in enumerate(("gate", "up"))}
    _, after = rank_layer(checkpoint, [128, 128], shard_ids=(0, 1))
    weight = torch.nn.Parameter(torch.rand(COLUMNS).bfloat16() + 0.5, requires_grad=False)
    calls = []
    for name in ("summed", "scaled"):
        method = getattr(FusedLinear, name)

        def noting(self, *given, name=name, method=method):
            calls.append((name, given[-1]))
            return method(self, *given)

        monkeypatch.setattr(FusedLinear, name, noting)

    def forward(x, residual):
        y = torch.ops.vllm_matgptq.linear(x, before.matgptq_key, COLUMNS)
        with ir.enable_torch_wrap(True):
            z, total = ir.ops.fused_add_rms_norm(y, residual, weight, 1e-5)
        y = torch.ops.vllm_matgptq.linear(z, after.matgptq_key, 256)
        return (SiluAndMul.forward_native(y) if gated else y), total

    x, residual = (torch.randn(5, COLUMNS).bfloat16() for _ in range(2))
    passes = {"post_grad_custom_pre_pass": vllm_matgptq.compiler.FuseLinears()}
    with fresh_cache(), torch.inference_mode():
        got = torch.compile(forward, fullgraph=True, dynamic=True, options=passes)(x, residual)
        want = forward(x, residual)
    assert calls == [("summed", 1e-5), ("scaled", gated)]
    # vLLM takes the mean of squares of a sum that is not rounded yet
    assert (got[0] - want[0]).float().norm() < 8e-3 * want[0].float().norm()
    assert torch.equal(got[1], want[1])


def test_layers_share_a_norm_whatever_they_are():
    """What a layer of several runs or an order of columns returns is normalised, and taken by one that is not."""
    _, before = rank_layer({"model.o_proj": stored(COLUMNS, 2)}, [COLUMNS])
    _, after = rank_layer({"model.qkv_proj": stored(64, 3)}, [64])
    x, residual, norm = torch.randn(3, COLUMNS), torch.randn(3, COLUMNS), torch.rand(COLUMNS)
    z, total, means = before.matgptq.summed(x, residual, norm, 1e-5)
    assert torch.equal(total, before.matgptq(x) + residual)
    want = after.matgptq(torch.nn.functional.rms_norm(total, (COLUMNS,), norm, 1e-5))
    torch.testing.assert_close(after.matgptq.scaled(z, means, False), want)
    torch.testing.assert_close(after.matgptq.scaled(2 * z, 4 * means, False), want)


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs g++ on a CPU")
@pytest.mark.parametrize("gated", [True, False])
def test_gate_and_up_are_one_call_with_what_follows_them(gated, monkeypatch):
    from vllm.model_executor.layers.activation import SiluAndMul

    checkpoint = {f"model.{name}_proj": stored(128, i) for i, name in enumerate(("gate", "up"))}
    _, layer = rank_layer(checkpoint, [128, 128], shard_ids=(0, 1))
    calls = []
    monkeypatch.setattr(
        FusedLinear, "gated", lambda self, x, gated=FusedLinear.gated: calls.append(1) or gated(self, x)
    )

    def forward(x):
        y = torch.ops.vllm_matgptq.linear(x, layer.matgptq_key, 256)
        return SiluAndMul.forward_native(y if gated else y.flip(-1))

    x = torch.randn(5, COLUMNS).bfloat16()
    passes = {"post_grad_custom_pre_pass": vllm_matgptq.compiler.FuseLinears()}
    with fresh_cache():
        got = torch.compile(forward, fullgraph=True, dynamic=True, options=passes)(x)
    assert len(calls) == gated
    torch.testing.assert_close(got, forward(x), rtol=2e-2, atol=1e-3)


def test_vllm_finds_the_entry_point():
    """Import failures in plugins are only logged: see that it is registered."""
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "from vllm.model_executor.layers.quantization import get_quantization_config as get; "
        "print(get('matgptq').__module__, get('matgptq_quant').__module__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "vllm_matgptq.config vllm_matgptq.config"


def test_what_the_compiler_is_told(monkeypatch):
    from vllm.config import CompilationConfig

    def options(**asked):
        config = SimpleNamespace(compilation_config=CompilationConfig(inductor_compile_config=asked))
        before = config.compilation_config.compute_hash()
        vllm_matgptq.compiler.set_compile_options(config)
        found = config.compilation_config.inductor_compile_config
        assert config.compilation_config.compute_hash() != before
        assert isinstance(found["post_grad_custom_pre_pass"], vllm_matgptq.compiler.FuseLinears)
        return {name: found.get(name) for name in ("triton.enable_pdl", "_post_fusion_custom_pass")}

    nothing = {"triton.enable_pdl": None, "_post_fusion_custom_pass": None}
    assert options() == nothing  # no GPU
    monkeypatch.setattr(vllm_matgptq.compiler, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert options() == nothing
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert options(**{"triton.enable_pdl": False})["triton.enable_pdl"] is False
    found = options()
    assert found["triton.enable_pdl"] is True
    assert isinstance(found["_post_fusion_custom_pass"], WaitFirst)
