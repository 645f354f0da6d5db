"""What Inductor is told about a decoding step: which calls it joins, and which graphs may overlap launches."""

import shutil
from collections import Counter

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import fresh_cache
from torch.nn.functional import silu

import matgptq
from matgptq import inductor
from matgptq.decode import Decoder
from matgptq.inductor import JoinLinears, step_options
from matgptq.kernels import op, shared_norm
from matgptq.overlap import SCHEDULER_OPTION, WaitFirst
from matgptq.packed import pack
from matgptq.quantizer.pipeline import quantize

IDS = torch.arange(3, 20).view(1, -1)
AROUND = ("summed_linear_at", "scaled_linears_at")
LAYERS = 2
MIXED = ({"*.q_proj": 3, "*": 4}, {"*.k_proj": 8, "*.up_proj": 2, "*": 4})
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs g++ on a CPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose layers fill whole tiles, with scales of their own for some widths."""
    place = tmp_path_factory.mktemp("join")
    tiny_model(num_key_value_heads=4, intermediate_size=128, num_hidden_layers=LAYERS).half().save_pretrained(
        place / "dense"
    )
    tiny_tokenizer().save_pretrained(place / "dense")
    (place / "text.txt").write_text("the mill stood where the river turns. " * 40, encoding="utf-8")
    method = matgptq.Method(group_size=16, own_scales=(2, 4))
    options = {"calibration": place / "text.txt", "samples": 2, "sequence_length": 16, "progress": False}
    quantize(place / "dense", place / "nested", method, **options)
    return place / "nested"


@pytest.fixture
def model(folder):
    model = matgptq.load(folder, dtype=torch.float32).to(torch.bfloat16)
    pack(model)
    return model


def linears(graph):
    """How often a graph calls which linear op, and how many of these calls are gated."""
    ops = torch.ops.matgptq
    arguments = {ops.packed_linear_at.default: 11, ops.packed_linears_at.default: 11}
    arguments |= {ops.summed_linear_at.default: 14, ops.scaled_linears_at.default: 12}
    calls = [node for node in graph.nodes if node.target in arguments]
    gated = sum(len(node.args) > arguments[node.target] for node in calls)
    return Counter(str(node.target).split(".")[1] for node in calls) + Counter(gated=gated)


def joining(graphs):
    """A backend that runs the graphs of ATen ops as they are after `JoinLinears`, and notes their linear ops."""

    def compiler(module, inputs):
        before = linears(module.graph)
        JoinLinears()(module.graph)
        module.graph.lint()
        module.recompile()
        graphs.append((before, linears(module.graph)))
        return module

    return aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())


def joined_decoder(model, **options):
    graphs = []
    decoder = Decoder(model, max_length=40, compile=True, **options)
    decoder._compute = torch.compile(decoder._next, fullgraph=True, dynamic=False, backend=joining(graphs))
    return decoder, graphs


def calls_of_a_step(decoder, monkeypatch):
    count = 0
    packed_linear = op.packed_linear

    def counting(*arguments, **options):
        nonlocal count
        count += 1
        return packed_linear(*arguments, **options)

    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(op, "packed_linear", counting)
        patch.setattr(shared_norm, "packed_linear", counting)
        decoder._cache.reset()
        decoder._step()
    return count


def test_layers_that_share_an_input_are_one_call_at_any_widths(model, monkeypatch):
    decoder, graphs = joined_decoder(model)
    plain = Decoder(model, max_length=40)
    calls, answers = [], []
    for bits in (8, 4, *MIXED, 2, 4):
        matgptq.set_bits(model, bits)
        answers.append(decoder.generate(IDS, 8))
        assert torch.equal(answers[-1], plain.generate(IDS, 8))
        calls.append(calls_of_a_step(decoder, monkeypatch))
    # q, k and v of the first layer are behind no sum; one code for all widths
    # nor is the last one's down before a layer
    after = {"packed_linear_at": 1, "packed_linears_at": 1} | dict.fromkeys(AROUND, 2 * LAYERS - 1)
    assert graphs == [({"packed_linear_at": 7 * LAYERS}, {**after, "gated": LAYERS})]
    # q is apart from k and v; q, k and v are apart, and so are gate and up
    assert calls == [LAYERS * n for n in (4, 4, 5, 7, 4, 4)]
    assert torch.equal(answers[1], answers[-1])
    assert not torch.equal(answers[0], answers[4])


def test_a_batch_is_joined_too(model):
    decoder, graphs = joined_decoder(model, batch_size=2)
    ids = torch.cat([IDS, IDS.flip(1)])
    matgptq.set_bits(model, 4)
    assert torch.equal(decoder.generate(ids, 8), Decoder(model, batch_size=2, max_length=40).generate(ids, 8))
    assert graphs[0][1]["packed_linears_at"] + graphs[0][1]["scaled_linears_at"] == 2 * LAYERS


def test_layers_that_were_moved_are_calls_of_their_own(model, monkeypatch):
    decoder, graphs = joined_decoder(model)
    matgptq.set_bits(model, 4)
    want = decoder.generate(IDS, 8)
    attention = model.model.layers[0].self_attn
    attention.k_proj.planes = attention.k_proj.planes.clone()
    assert torch.equal(decoder.generate(IDS, 8), want)
    assert calls_of_a_step(decoder, monkeypatch) == 4 * LAYERS + 2  # k, and v behind it
    another, others = joined_decoder(model)
    assert torch.equal(another.generate(IDS, 8), want)
    joined = {**dict.fromkeys(AROUND, 2 * LAYERS - 1), "gated": LAYERS}
    assert others[0][1] == {"packed_linear_at": 1 + 3, **joined}
    assert graphs[0][1] == {"packed_linear_at": 1, "packed_linears_at": 1, **joined}


class Siblings(nn.Module):
    """Two layers, of the same input or not."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        order = torch.randperm(64)
        for name in "ab":
            layer = matgptq.MatGPTQLinear(64, 64, True, group_size=32, act_order=True, **options)
            layer.qweight.random_(0, 255)
            layer.scales.uniform_(0.01, 0.02)
            layer.zeros.random_(0, 255)
            layer.bias.data.normal_()
            layer.perm.copy_(order)
            setattr(self, name, layer)
        self.same = True

    def forward(self, x):
        first = self.a(x)
        if not self.same:
            x += 1
        return self.use(first, self.b(x))

    def use(self, a, b):
        return a * b


def compiled_calls(module):
    """The linear ops of the compiled `Siblings`, whose results are compared with those of plain calls."""
    pack(module, dtype=torch.float16)
    for layer in (module.a, module.b):
        layer.width_at_run_time = True
    graphs = []
    x = torch.randn(3, 64).half()
    with torch.inference_mode():
        got = torch.compile(module, fullgraph=True, backend=joining(graphs))(x.clone())
        torch.testing.assert_close(got, module(x.clone()))
    return graphs[0][1]


@pytest.mark.parametrize("same", [True, False])
def test_only_equal_inputs_are_joined(same):
    module = Siblings(sym=False)
    module.same = same
    assert compiled_calls(module) == ({"packed_linears_at": 1} if same else {"packed_linear_at": 2})


def spelled_out(a, number):
    return (a / (torch.exp(-a) + number)).half()


@pytest.mark.parametrize(
    ("use", "gated"),
    [
        (lambda a, b: silu(a) * b, True),
        (lambda a, b: silu(b) * a, False),
        (lambda a, b: silu(a) * b + a, False),
        (lambda a, b: silu(a) * silu(b), False),
        (lambda a, b: spelled_out(a.float(), 1) * b, True),
        (lambda a, b: spelled_out(a.float(), 2) * b, False),
    ],
)
def test_only_silu_of_the_first_times_the_second_is_gated(use, gated):
    module = Siblings(sym=False)
    module.use = use
    assert compiled_calls(module) == {"packed_linears_at": 1, **({"gated": 1} if gated else {})}


class Normed(nn.Module):
    """Layers before and after RMSNorm of a sum, as Transformers has it, or a variant of that."""

    def __init__(self, change=""):
        super().__init__()
        torch.manual_seed(0)
        self.change, self.norm = change, nn.Parameter(torch.randn(64).half(), False)
        for name in ("before", "after"):
            layer = matgptq.MatGPTQLinear(64, 64, group_size=32, act_order=change == f"order {name}")
            layer.qweight.random_(0, 255)
            layer.scales.uniform_(0.01, 0.02)
            if layer.perm is not None:
                layer.perm.copy_(torch.randperm(64))
            setattr(self, name, layer)

    def forward(self, x, residual):
        y = x if self.change == "no layer before" else self.before(x)
        total = residual + y if self.change == "sum turned" else y + residual
        total = torch.add(y, residual, alpha=2) if self.change == "scaled sum" else total
        total = y if self.change == "no sum" else total
        h = total.to(torch.float32)
        h = h + 1 if self.change == "shifted" else h
        power, over = 3 if self.change == "power" else 2, 0 if self.change == "dimension" else -1
        h = h * torch.rsqrt(h.pow(power).mean(over, keepdim=True) + 1e-5)
        norm = 1 + self.norm if self.change == "one more" else x[0] if self.change == "not given" else self.norm
        z = h.half() * norm if self.change == "turned" else norm * h.half()
        other = {"z used twice": z, "y used twice": y}.get(self.change, total)
        return other, self.after(z)


SHARED = ("", "turned", "sum turned", "order before")
NOT_SHARED = ("order after", "no layer before", "scaled sum", "no sum", "shifted", "power", "dimension", "one more")
NOT_SHARED += ("not given", "z used twice", "y used twice")


@pytest.mark.parametrize("change", [*SHARED, *NOT_SHARED])
def test_only_a_norm_of_a_sum_is_shared_by_the_calls_around_it(change):
    torch._dynamo.reset()  # else this would be one variant too many of one method
    module = Normed(change)
    pack(module, dtype=torch.float16)
    module.before.width_at_run_time = module.after.width_at_run_time = True
    graphs = []
    x, residual = torch.rand(3, 64).half(), torch.rand(3, 64).half()
    with torch.inference_mode():
        got = torch.compile(module, fullgraph=True, backend=joining(graphs))(x, residual)
        torch.testing.assert_close(got, module(x, residual), equal_nan=change == "power")
    plain = {"packed_linear_at": 1 if change == "no layer before" else 2}
    assert graphs[0][1] == (dict.fromkeys(AROUND, 1) if change in SHARED else plain)


@needs_compiler
def test_a_decoder_as_users_have_it(folder, monkeypatch):
    model = matgptq.load(folder, dtype=torch.float32).to(torch.bfloat16)
    del model.model.layers[1:]
    pack(model)
    graphs, schedulers = [], []

    gate_linears = inductor.gate_linears

    def noting(graph, gated):
        before = linears(graph)
        gate_linears(graph, gated)
        graphs.append((before, linears(graph)))

    def wait_first(nodes):
        schedulers.append(nodes[0].scheduler)
        return WaitFirst()(nodes)

    monkeypatch.setattr(inductor, "gate_linears", noting)
    decoder = Decoder(model, max_length=40, compile=True)
    plain = Decoder(model, max_length=40)
    with fresh_cache(), config.patch({SCHEDULER_OPTION: wait_first}):
        for bits in (4, MIXED[0], 8):
            matgptq.set_bits(model, bits)
            assert torch.equal(decoder.generate(IDS, 8), plain.generate(IDS, 8))
    joined = {"packed_linear_at": 2, "packed_linears_at": 2}
    assert graphs == [(joined, {**joined, "gated": 1})]
    for scheduler in schedulers:  # it has generated the kernels by now
        scheduler.previous_node = "a kernel"
        assert scheduler.previous_node is None
    assert schedulers
    assert config.post_grad_custom_pre_pass is None


def test_overlap_is_asked_for_from_hopper_on(monkeypatch):
    assert step_options(torch.device("cpu")).keys() == {"post_grad_custom_pre_pass"}
    for capability, asked in (((8, 9), False), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert step_options(torch.device("cuda")).get("triton.enable_pdl", False) is asked
