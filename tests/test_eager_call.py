"""The eager call that goes past the dispatcher: what it launches, and when it must not be taken. A mock launches."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from matgptq.bench import Case, random_layer
from matgptq.kernels import matmul, op
from matgptq.kernels.tiles import Problem

CPU = torch.device("cpu")


class Launcher:
    """Writes down what it is asked to launch."""

    def __init__(self, M, N, K, bits, dtype, group_size, rule, resident, zeros, gated, index, norm):
        kind = str(dtype).removeprefix("torch.")
        self.problem = Problem(M, N, K, bits, kind, group_size, resident, rule, zeros, gated=gated)
        self.problem = replace(self.problem, **({norm: True} if norm else {}))
        self.checked = set()
        self.calls = []

    def __call__(self, *arguments):
        self.calls.append(arguments)


@pytest.fixture
def gpu(monkeypatch):
    """Tensors say that they are on a GPU; returns the launchers that were made."""
    made = []

    def launcher(*constants):
        made.append(Launcher(*constants))
        return made[-1]

    monkeypatch.setattr(matmul, "_launcher", launcher)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    monkeypatch.setattr(matmul, "_empty", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    matmul.bind.cache_clear()
    yield made
    matmul.bind.cache_clear()


def packed_layer(**options):
    return random_layer(Case(1, 128, 256, 4, **options), CPU)[1]


def test_a_layer_launches_its_own_memory(gpu):
    layer = packed_layer()
    x = torch.randn(2, 3, 256, dtype=torch.half)
    y = layer(x)
    assert y.shape == (2, 3, 128)
    assert y.dtype == x.dtype
    (launcher,) = gpu
    want = (77, 6, x.data_ptr(), layer.planes.data_ptr(), layer.scales.data_ptr(), 0, 0, y.data_ptr())
    assert launcher.calls == [want]


def test_two_layers_gated_are_a_launch_of_its_own_kind(gpu):
    layer = packed_layer()
    assert layer(torch.randn(2, 256, dtype=torch.half), gated=True).shape == (2, 64)
    assert layer(torch.randn(2, 256, dtype=torch.half)).shape == (2, 128)
    assert [(launcher.problem.N, launcher.problem.gated) for launcher in gpu] == [(64, True), (128, False)]


def test_layers_around_a_norm_launch_what_they_share(gpu):
    layer, norm = packed_layer(dtype="bfloat16"), torch.rand(128).bfloat16()
    x, residual = torch.randn(2, 256).bfloat16(), torch.randn(128, 2).bfloat16().T
    z, total, means = layer.summed(x, residual, norm, 1e-5)
    assert (z.shape, total.shape, means.shape) == ((2, 128), (2, 128), (2, 8))
    assert (z.dtype, total.dtype, means.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    (first,) = gpu
    (call,) = first.calls
    before, (means_at, where, *rest) = list(call[:8]), call[8:]
    assert before == [77, 2, x.data_ptr(), layer.planes.data_ptr(), layer.scales.data_ptr(), 0, 0, z.data_ptr()]
    assert where != residual.data_ptr()  # rows that do not lie one after another are copied
    assert (means_at, *rest) == (means.data_ptr(), norm.data_ptr(), total.data_ptr(), 1e-5)
    y = layer.scaled(x, torch.rand(2, 16), gated=True)
    assert y.shape == (2, 64)
    second = gpu[1]
    assert (first.problem.summed, second.problem.scaled, second.problem.gated) == (True, True, True)
    assert second.calls[0][7] == y.data_ptr()
    assert second.calls[0][9:] == (0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(1, 128)}, r"residual must be torch.float16 \(1, 128\) on cpu, got torch.float32"),
        ({"residual": torch.zeros(2, 128).half()}, r"residual must be .*, got torch.float16 \(2, 128\)"),
        ({"norm": torch.ones(127).half()}, r"norm must be torch.float16 \(128,\) on cpu, got torch.float16 \(127,\)"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
    ],
)
def test_what_is_added_must_fit(gpu, change, message):
    given = {"residual": torch.zeros(1, 128).half(), "norm": torch.ones(128).half(), "eps": 1e-5, **change}
    with pytest.raises(ValueError, match=message):
        packed_layer().summed(torch.zeros(1, 256).half(), **given)


@pytest.mark.parametrize("means", [torch.ones(1, 8), torch.ones(1, 16).half()])
def test_means_must_fit(gpu, means):
    with pytest.raises(ValueError, match=r"means must be torch.float32 \(1, 16\) on cpu, got torch.float"):
        packed_layer().scaled(torch.zeros(1, 256).half(), means)


def test_memory_that_was_replaced_is_checked_and_launched(gpu):
    layer, x = packed_layer(), torch.randn(1, 256, dtype=torch.half)
    layer.bias = torch.nn.Parameter(torch.randn(128).half(), False)
    layer(x)
    layer.planes, layer.bias.data = layer.planes.clone(), layer.bias.data.clone()  # as Module.to does for each
    y = layer(x)
    (launcher,) = gpu
    wanted = (layer.planes.data_ptr(), layer.scales.data_ptr(), 0, layer.bias.data_ptr(), y.data_ptr())
    assert launcher.calls[-1][3:] == wanted
    layer.planes = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="planes must be"):
        layer(x)


def test_another_width_is_another_kernel(gpu):
    layer, x = packed_layer(mode="resident"), torch.randn(1, 256, dtype=torch.half)
    layer._widths = (3, 4)
    for bits in (4, 3, 4):
        layer.bits = bits
        layer(x)
    assert [launcher.problem.bits for launcher in gpu] == [4, 3]
    assert [len(launcher.calls) for launcher in gpu] == [2, 1]


def test_kernels_are_shared_by_layers_of_a_kind_and_by_many_tokens(gpu):
    for layer in (packed_layer(), packed_layer()):
        for tokens in (1, 66, 70, 500):
            layer(torch.randn(tokens, 256, dtype=torch.half))
    assert [launcher.problem.M for launcher in gpu] == [1, 72, 512]
    assert [[call[1] for call in launcher.calls] for launcher in gpu] == [[1, 1], [66, 70, 66, 70], [500, 500]]


def test_awkward_activations(gpu):
    layer = packed_layer()
    assert layer(torch.randn(0, 256).half()).shape == (0, 128)
    assert gpu[0].calls == []
    x = torch.randn(256, 5).half().t()
    layer(x)
    assert gpu[-1].calls[-1][2] != x.data_ptr()
    layer(torch.randn(256).half())
    for wrong in (torch.randn(1, 255).half(), torch.tensor(1.0).half()):
        with pytest.raises(ValueError, match="x must have in_features 256 columns"):
            layer(wrong)


class SeesFunctions(TorchFunctionMode):
    """A mode that changes nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class SeesOps(TorchDispatchMode):
    """Writes down the ops that come by."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_else_would_see_a_plain_call():
    x = torch.randn(1, 256)
    assert op._is_eager(x)
    with torch.inference_mode():
        assert op._is_eager(torch.randn(1, 256))
        assert op._is_eager(x)


def test_whatever_wants_the_op_gets_it():
    x = torch.randn(1, 256)
    assert not op._is_eager(torch.randn(1, 256, requires_grad=True))
    assert not op._is_eager(torch.nn.Parameter(x, False))
    for mode in (SeesOps(), SeesFunctions(), FakeTensorMode(), torch.profiler.profile()):
        with mode:
            assert not op._is_eager(x)
    assert op._is_eager(x)
    seen = []

    def spy(v):
        seen.append(op._is_eager(v))
        return v + 1

    torch.vmap(spy)(x)
    torch.func.functionalize(spy)(x)
    make_fx(spy)(x)
    torch.jit.trace(spy, x, check_trace=False)
    assert seen and not any(seen)  # noqa: PT018
    answer = torch.compile(lambda v: v + op._is_eager(v), fullgraph=True, backend="eager")(x)
    assert torch.equal(answer, x)


def test_modes_and_exporters_see_the_op_of_a_layer():
    layer, x = packed_layer(), torch.randn(2, 256, dtype=torch.half)
    with SeesOps() as mode:
        want = layer(x)
    assert "matgptq.packed_linear.default" in mode.seen
    exported = torch.export.export(layer, (x,))
    assert any("packed_linear" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), want)
