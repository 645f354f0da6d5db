"""What only a GPU can show: the kernels against the plain op, in layers and whole models, eager and captured."""

import itertools
import re

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from test_packed import LAYERS, block, layer, of_several
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code

import matgptq
from matgptq.decode import Decoder
from matgptq.kernels import op
from matgptq.packed import PackedLinear, pack, warmup
from matgptq.quantizer.pipeline import quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def compiled():
    """The kernels of the one-hot tests, compiled in parallel: one by one they take a minute."""
    layers = []
    for options, dtype, resident in itertools.product(LAYERS.values(), DTYPES, (True, False)):
        stored = layer(**{**options, "dtype": dtype}).cuda()
        for bits in stored.widths:
            stored.bits = bits
            layers.append(PackedLinear(stored, dtype=dtype, resident=resident))
    warmup(torch.nn.ModuleList(layers), [96])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
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


def test_an_eager_call_and_the_op_give_the_same_bits():
    packed = PackedLinear(layer().cuda(), dtype=torch.float16)
    for tokens in (1, 7, 70):
        x = torch.randn(2, tokens, 96, device="cuda", dtype=torch.float16)
        with torch.profiler.profile() as profile:
            want = packed(x)
        assert any(event.name == "matgptq::packed_linear" for event in profile.events())
        assert torch.equal(packed(x), want)
        with torch.inference_mode():
            assert torch.equal(packed(x), want)


def test_a_layer_that_was_moved_and_changed_launches_what_it_holds_now():
    stored = layer().cuda()
    packed = PackedLinear(stored, dtype=torch.float16)
    x = torch.randn(3, 96, device="cuda", dtype=torch.float16)
    want = {}
    for bits in (4, 3):
        packed.bits = bits
        want[bits] = packed(x)
    packed.cpu().cuda()
    for bits in (3, 4):
        packed.bits = bits
        assert torch.equal(packed(x), want[bits])
    packed.planes.zero_()
    packed.bias.data = packed.bias.data.clone()
    assert not torch.equal(packed(x), want[4])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_layer_on_a_gpu_that_is_not_the_current_one():
    packed = PackedLinear(layer().to("cuda:1"), dtype=torch.float16)
    x = torch.randn(3, 96, device="cuda:1", dtype=torch.float16)
    with torch.cuda.device(1):
        want = packed(x)
    with torch.cuda.device(0):
        assert torch.equal(packed(x), want)


def test_an_exported_layer_runs_the_kernels():
    packed = PackedLinear(layer().cuda(), dtype=torch.float16)
    x = torch.randn(4, 96, device="cuda", dtype=torch.float16)
    exported = torch.export.export(packed, (x,))
    assert any("packed_linear" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), packed(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_in_one_call_give_the_weights_of_each(dtype):
    module = block(128, 64, 70).cuda()
    pack(module, dtype=dtype)
    identity = torch.eye(96, device="cuda", dtype=dtype)
    layers = list(module.children())
    for widths in ((8, 8, 8), (4, 4, 4), (3, 3, 3), (8, 4, 4)):
        for made, bits in zip(layers, widths, strict=True):
            made.bits = bits
        got = torch.ops.matgptq.packed_linears_at(*of_several(identity, layers))
        assert torch.equal(got, torch.cat([made(identity) for made in layers], -1))


@pytest.fixture(scope="module")
def whole_tiles(tmp_path_factory):
    """A folder of a tiny model whose layers fill whole tiles: q, k and v, and gate and up, are joined."""
    place = tmp_path_factory.mktemp("join")
    tiny_model(num_key_value_heads=4, intermediate_size=128).half().save_pretrained(place / "dense")
    tiny_tokenizer().save_pretrained(place / "dense")
    quantize(place / "dense", place / "nested", matgptq.Method(group_size=16, feedback=False), progress=False)
    return place / "nested"


def test_a_compiled_decoder_makes_one_call_of_layers_that_share_an_input(whole_tiles, monkeypatch):
    reference = matgptq.load(whole_tiles, dtype=torch.float32)
    model = matgptq.load(whole_tiles, device="cuda")
    ids = torch.arange(23, 40).view(1, -1)  # no other token is within 0.13 of the likeliest at any step
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    torch._dynamo.reset()
    counters.clear()
    decoder = Decoder(model, max_length=40, compile=True)
    calls = []
    packed_linear = op.packed_linear
    monkeypatch.setattr(op, "packed_linear", lambda *a, **o: calls.append(o["bits"]) or packed_linear(*a, **o))
    apart = {"*.q_proj": 6, "*": 4}
    for bits, count in ((8, 8), (4, 8), (apart, 10), (8, 8)):
        matgptq.set_bits(model, bits)
        matgptq.set_bits(reference, bits)
        assert torch.equal(decoder.generate(ids, 12), reference.generate(ids, **options)[:, ids.shape[1] :])
        calls.clear()
        with torch.inference_mode():
            decoder._cache.reset()
            decoder._advance()
        assert len(calls) == count
    assert len(decoder._graphs) == 3
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs programmatic dependent launch",
)
def test_every_generated_kernel_of_a_step_waits_for_the_one_before(whole_tiles):
    decoder = Decoder(matgptq.load(whole_tiles, device="cuda"), max_length=40, compile=True)
    with fresh_cache():
        _, codes = run_and_get_code(decoder.prepare)
    pattern = r"async_compile\.triton\(.*?'''(.*?)'''"
    kernels = [source for code in codes for source in re.findall(pattern, code, re.DOTALL)]
    assert kernels
    for source in kernels:
        assert "'launch_pdl': True" in source
        body = source[source.index("def triton_") :]
        assert body.index("gdc_wait()") < min(body.find(access) % len(body) for access in ("tl.load(", "tl.store("))
        assert body.index("gdc_wait()") < body.index("gdc_launch_dependents()")
