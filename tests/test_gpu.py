"""What only a GPU can show: the kernels against the plain op, in layers and whole models, eager and captured."""

import pytest
import torch
from test_packed import LAYERS, layer

import matgptq
from matgptq.packed import PackedLinear, pack, warmup
from matgptq.quantizer.pipeline import quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_hot_activations_give_the_weights(options, resident, dtype):
    stored = layer(**{**options, "dtype": dtype})
    stored.bias = None
    stored.cuda()
    identity = torch.eye(96, device="cuda", dtype=dtype)
    for bits in stored.widths:
        stored.bits = bits
        packed = PackedLinear(stored, dtype=dtype, resident=resident)
        assert torch.equal(packed(identity), stored(identity))


def test_a_model_gives_the_tokens_of_the_cpu(tiny_folder, tmp_path):
    quantize(tiny_folder, tmp_path / "nested", matgptq.Method(group_size=16, feedback=False), progress=False)
    reference = matgptq.load(tmp_path / "nested", dtype=torch.float32)
    model = matgptq.load(tmp_path / "nested", device="cuda")
    assert all(isinstance(m, PackedLinear) for m in matgptq.quantized_layers(model).values())
    ids = torch.arange(3, 20).view(1, -1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for bits in (8, 4):
        matgptq.set_bits(reference, bits)
        matgptq.set_bits(model, bits)
        torch.testing.assert_close(model(ids.cuda()).logits.float().cpu(), reference(ids).logits, rtol=2e-2, atol=2e-2)
        assert torch.equal(model.generate(ids.cuda(), **options).cpu(), reference.generate(ids, **options))


def test_a_captured_graph_replays_the_same_bits():
    packed = PackedLinear(layer().cuda(), dtype=torch.float16)
    x = torch.randn(4, 96, device="cuda", dtype=torch.float16)
    packed.bits = 4
    warmup(packed, [4])
    want = packed(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed(x)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, want)


def test_a_compiled_model_runs_the_kernels():
    packed = PackedLinear(layer().cuda(), dtype=torch.float16)
    x = torch.randn(4, 96, device="cuda", dtype=torch.float16)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for bits in (4, 3):
            packed.bits = bits
            assert torch.equal(compiled(x), packed(x))


def test_packing_a_model_on_the_gpu_leaves_no_plain_layers(tiny_folder, tmp_path):
    quantize(tiny_folder, tmp_path / "nested", matgptq.Method(group_size=16, feedback=False), progress=False)
    model = matgptq.load(tmp_path / "nested").cuda()
    pack(model, resident=False)
    assert {m.widths for m in matgptq.quantized_layers(model).values()} == {(8,)}
