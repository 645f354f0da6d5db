"""Layers in the kernels' layout say the same as those in the stored one, at every width, and can be stored again."""

import copy
import itertools
import weakref

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from torch import nn

import matgptq
from matgptq.kernels import op
from matgptq.kernels.packing import follows
from matgptq.packed import PackedLinear, pack
from matgptq.planes import pack_planes
from matgptq.quantizer.pipeline import quantize
from matgptq.slicing import slice_codes


def layer(
    rule="round", sym=True, master_bits=8, stored_bits=None, own=(), act_order=False, dtype=torch.float16, **options
):
    """A layer of 70 x 96 with random contents."""
    torch.manual_seed(options.pop("seed", 0))
    made = matgptq.MatGPTQLinear(
        96,
        70,
        True,
        bits=stored_bits or master_bits,
        group_size=options.pop("group_size", 32),
        sym=sym,
        rule=rule,
        master_bits=master_bits,
        stored_bits=stored_bits,
        own_widths=own,
        act_order=act_order,
        dtype=dtype,
        **options,
    )
    codes = torch.randint(0, 2**master_bits, (70, 96), dtype=torch.uint8)
    made.qweight = (
        codes
        if stored_bits is None
        else pack_planes(slice_codes(codes, stored_bits, rule, master_bits=master_bits), stored_bits)
    )
    for name in ("scales", *(f"scales_{b}" for b in own)):
        getattr(made, name).uniform_(0.01, 0.02)
    if not sym:
        made.zeros.random_(0, 2**master_bits)
    if act_order:
        made.perm.copy_(torch.randperm(96))
    made.bias.data.normal_()
    return made


LAYERS = {
    "round": {},
    "prefix": {"rule": "prefix"},
    "zeros": {"sym": False},
    "prefix-zeros": {"rule": "prefix", "sym": False},
    "own-scales": {"own": (2, 3, 4, 6)},
    "permuted": {"act_order": True},
    "rows": {"group_size": -1},
    "4-bit-codes": {"master_bits": 4},
    "4-bit-codes-prefix": {"master_bits": 4, "rule": "prefix"},
    "6-bit-codes-prefix-zeros": {"master_bits": 6, "rule": "prefix", "sym": False},
    "cut-round": {"stored_bits": 3},
    "cut-prefix": {"stored_bits": 6, "rule": "prefix"},
}
X = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("resident", [True, False])
def test_the_same_output_at_every_width(options, resident):
    stored = layer(**options)
    for bits in stored.widths:
        stored.bits = bits
        packed = PackedLinear(stored, dtype=torch.float16, resident=resident)
        assert packed.bits == bits
        torch.testing.assert_close(packed(X), stored(X), rtol=1e-5, atol=1e-5)
    if resident:
        for bits in packed.widths:  # one copy, another width per call
            packed.bits = stored.bits = bits
            torch.testing.assert_close(packed(X), stored(X), rtol=1e-5, atol=1e-5)


def test_outputs_can_be_changed_in_place():
    for made in (layer(), PackedLinear(layer(), dtype=torch.float16)):
        y = made(X.clone().requires_grad_())
        y += 1
        assert torch.equal(y, made(X) + 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_refused_not_left_out(compiled):
    made, packed, at_run_time = layer(), *(PackedLinear(layer(), dtype=torch.float16) for _ in range(2))
    at_run_time.width_at_run_time = True
    module = block(64, 64)
    pack(module, dtype=torch.float16)
    arguments = of_several(None, list(module.children()))[1:]
    for call in (made, packed, at_run_time, lambda x: torch.ops.matgptq.packed_linears_at(x, *arguments)):
        if compiled:
            call = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        y = call(X.clone().requires_grad_())
        with pytest.raises(RuntimeError, match="a MatGPTQ layer has no backward pass"):
            y.sum().backward()


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("resident", [True, False])
def test_what_was_packed_can_be_stored_again(options, resident):
    stored = layer(**options)
    stored.bits = stored.widths[len(stored.widths) // 2]
    packed = PackedLinear(stored, dtype=torch.float16, resident=resident)
    again = packed.unpacked()
    if packed.resident or len(stored.widths) == 1:
        assert again.state_dict().keys() == stored.state_dict().keys()
        assert all(torch.equal(again.state_dict()[k], v) for k, v in stored.state_dict().items())
    assert packed.state_dict().keys() == again.state_dict().keys()
    torch.testing.assert_close(again(X), stored(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("resident", [True, False])
def test_what_was_stored_is_loaded_into_the_same_memory(options, resident):
    first, second = (
        PackedLinear(layer(**options, seed=seed), dtype=torch.float16, resident=resident) for seed in (0, 1)
    )
    places = {name: tensor.data_ptr() for name, tensor in first.named_buffers()}
    assert not torch.equal(first(X), second(X))
    assert first.load_state_dict(second.state_dict()) == ([], [])
    assert torch.equal(first(X), second(X))
    assert places == {name: tensor.data_ptr() for name, tensor in first.named_buffers()}


def test_a_packed_layer_is_loaded_whole_or_not_at_all():
    first, second = (PackedLinear(layer(seed=seed), dtype=torch.float16) for seed in (0, 1))
    before, saved = first(X), second.state_dict()
    assert first.load_state_dict({}, strict=False).missing_keys == ["bias", "qweight", "scales"]
    with pytest.raises(RuntimeError, match="a packed layer must be given whole, got it without bias, scales"):
        first.load_state_dict({"qweight": saved["qweight"]}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        first.load_state_dict({**saved, "qweight": saved["qweight"][:3]})
    assert torch.equal(first(X), before)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "planes"'):
        first.load_state_dict({**saved, "planes": second.planes})


def test_a_packed_layer_holds_its_bits_and_no_more():
    stored = layer()
    for bits in stored.widths:
        stored.bits = bits
        packed = PackedLinear(stored, dtype=torch.float16, resident=False)
        assert packed.planes.nbytes == 128 * 128 * bits // 8  # 70 x 96 fill two tiles of 64 each way
        assert packed.widths == (bits,)
        for other in set(stored.widths) - {bits}:
            with pytest.raises(ValueError, match="bits must be"):
                packed.bits = other


def test_rounded_scales_are_not_stored_as_if_they_were_not():
    packed = PackedLinear(layer(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"scales must be torch.bfloat16 to be stored again, got torch.float16"):
        packed.state_dict()


def test_activations_that_the_kernels_do_not_take_are_refused():
    with pytest.raises(ValueError, match=r"dtype must be torch.float16 or torch.bfloat16, got torch.float32"):
        PackedLinear(layer(), dtype=torch.float32)
    with pytest.raises(ValueError, match="model must have MatGPTQLinear layers that are not packed yet, got none"):
        pack(tiny_model())
    with pytest.raises(ValueError, match=r"model must hold its layers in a module, got a layer: use PackedLinear"):
        pack(layer(), dtype=torch.float16)


def test_a_packed_model_is_served_saved_and_loaded(tiny_folder, tmp_path):
    quantize(tiny_folder, tmp_path / "nested", matgptq.Method(group_size=16, feedback=False), progress=False)
    model = matgptq.load(tmp_path / "nested")
    ids = torch.arange(3, 20).view(1, -1)
    want = {}
    for bits in (8, 4, 3):
        matgptq.set_bits(model, bits)
        want[bits] = model(ids).logits
    pack(model)
    assert all(isinstance(m, PackedLinear) for m in matgptq.quantized_layers(model).values())
    for bits in (3, 8, 4):
        matgptq.set_bits(model, bits)
        torch.testing.assert_close(model(ids).logits, want[bits], rtol=1e-2, atol=1e-2)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("nested", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {m.bits for m in matgptq.quantized_layers(matgptq.load(tmp_path / "again")).values()} == {4}


@pytest.mark.parametrize(("resident", "zeros"), list(itertools.product((True, False), repeat=2)))
def test_the_op_passes_opcheck(resident, zeros):
    packed = PackedLinear(layer(sym=not zeros), dtype=torch.float16, resident=resident)
    arguments = (X.half(), packed.planes, packed.scales, packed.unit_zeros, packed.bias, 96, 70, packed.bits, 32)
    torch.library.opcheck(torch.ops.matgptq.packed_linear.default, (*arguments, "round", packed.resident))


@pytest.mark.parametrize("sym", [True, False])
def test_bytes_are_those_of_the_width(sym):
    packed = PackedLinear(layer(sym=sym), dtype=torch.float16)
    zeros = packed.unit_zeros.nbytes if not sym else 0
    assert packed.nbytes(4) == 70 * 96 // 2 + packed.scales.nbytes + zeros + 70 * 2
    assert packed.nbytes() == packed.planes.nbytes + packed.scales.nbytes + zeros + 70 * 2


def test_scales_whose_weights_overflow_are_refused():
    made = layer()
    made.scales[3, 1] = 300
    with pytest.raises(
        ValueError, match=r"^scales must be at most 255\.875 in torch\.float16, for weights to be finite, got 300"
    ):
        PackedLinear(made, dtype=torch.float16)
    assert PackedLinear(made, dtype=torch.bfloat16).widths == made.widths


def test_scales_too_large_with_their_zeros_are_an_error():
    made = layer(sym=False)
    made.scales[3, 1] = 200
    made.zeros[:] = 128
    assert PackedLinear(made, dtype=torch.float16).widths == made.widths
    made.zeros = made.zeros.float()
    made.zeros[3, 1] = 400
    with pytest.raises(
        ValueError, match=r"^scales with its zeros must be at most 255\.875 in torch\.float16, .* got 312"
    ):
        PackedLinear(made, dtype=torch.float16)


def test_scales_that_lose_bits_are_told(caplog):
    made = layer(dtype=torch.bfloat16, name="up")
    made.scales[3, :2] = torch.tensor([0, 2.0**-24])  # exact in float16
    PackedLinear(made, dtype=torch.float16)
    assert not caplog.messages
    made.scales[3, :2] = torch.tensor([1e-9, 1.5 * 2.0**-24])
    PackedLinear(made, dtype=torch.float16)
    assert caplog.messages == ["up.scales: 2 of 210 are too small for torch.float16 and lose bits"]


def test_packing_lets_go_of_each_layer_as_it_goes():
    model = nn.ModuleDict({name: layer() for name in "abcd"})
    alive = [weakref.ref(model[name]) for name in "abcd"]
    counts = []

    class Counting(PackedLinear):
        def __init__(self, *arguments, **options):
            counts.append(sum(reference() is not None for reference in alive))
            super().__init__(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matgptq.packed.PackedLinear", Counting)
        pack(model, dtype=torch.float16)
    assert counts == [4, 3, 2, 1]


def test_the_op_with_the_width_in_a_tensor_passes_opcheck():
    packed = PackedLinear(layer(own=(3,)), dtype=torch.float16)
    for bits, index in ((3, 0), (8, 1)):
        packed.bits = bits
        scales = [packed.scales_3, packed.scales]
        arguments = (X.half(), packed.planes, scales, None, packed.bias, torch.tensor([bits, index]), 96, 70, 32)
        torch.library.opcheck(torch.ops.matgptq.packed_linear_at.default, (*arguments, "round", True))
        assert torch.equal(torch.ops.matgptq.packed_linear_at(*arguments, "round", True), packed(X.half()))


def test_a_compiled_packed_layer_has_no_graph_breaks():
    packed = PackedLinear(layer(), dtype=torch.float16)
    compiled = torch.compile(nn.Sequential(packed), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for bits in (4, 3):
            packed.bits = bits
            torch.testing.assert_close(compiled(X.half()), packed(X.half()))


@pytest.mark.parametrize("resident", [True, False])
def test_rows_are_a_layer_in_the_same_memory(resident):
    whole = layer(sym=False, own=(4,), act_order=True)
    whole.bits = 4
    packed = PackedLinear(whole, dtype=torch.float16, resident=resident)
    x = torch.randn(3, 96).half()
    for source in (whole, packed):
        part = source.rows(64, 70)
        assert torch.equal(part(x), source(x)[:, 64:])
        assert part.served_scales.untyped_storage().data_ptr() == source.served_scales.untyped_storage().data_ptr()
    if resident:
        part.bits = 3
        whole.bits = 3
        assert packed.bits == 4
        torch.testing.assert_close(part(x), whole(x)[:, 64:], rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="rows must be cut at multiples of 64, got 32 to 70"):
        packed.rows(32, 70)
    with pytest.raises(ValueError, match="rows must be cut at multiples of 64, got 0 to 32"):
        packed.rows(0, 32)


def test_the_width_can_change_wherever_the_layer_was_made():
    stored = layer()
    with torch.inference_mode():
        packed = PackedLinear(stored, dtype=torch.float16)
        part = packed.rows(64, 70)
    with torch.device("meta"):  # a default device
        another = PackedLinear(stored, dtype=torch.float16)
        another.bits = 3
    packed.bits = part.bits = 3
    copy.copy(packed).bits = 4
    for made in (packed, part, another):
        assert made._width.tolist() == [3, 0]


def block(*sizes, perms=None, **options):
    """Layers of one module with 96 in_features, of these out_features."""
    torch.manual_seed(0)
    module = nn.Module()
    for i, size in enumerate(sizes):
        made = matgptq.MatGPTQLinear(
            96, size, True, group_size=options.get("group_sizes", [32] * 9)[i], sym=False, act_order=perms is not None,
            own_widths=options.get("own", (3,)),
        )  # fmt: skip
        made.qweight.random_(0, 255)
        made.zeros.random_(0, 255)
        made.bias.data.normal_()
        for name in ("scales", *(f"scales_{b}" for b in made.own_widths)):
            getattr(made, name).uniform_(0.01, 0.02)
        if perms:
            made.perm.copy_(perms[i])
        setattr(module, "abcdefghi"[i], made)
    return module


def of_several(x, layers):
    """The arguments of ``packed_linears_at`` for layers of `block`."""
    scales = [(layer.scales_3, layer.scales) if layer.resident else (layer.scales,) for layer in layers]
    first = layers[0]
    return (
        x,
        [layer.planes for layer in layers],
        [tensor for of_layer in scales for tensor in of_layer],
        [layer.unit_zeros for layer in layers],
        [layer.bias for layer in layers],
        [layer._width for layer in layers],
        first.in_features,
        [layer.out_features for layer in layers],
        first.group_size,
        first.rule,
        first.resident,
    )


def runs(module):
    """Names of layers that lie together."""
    found = []
    for name, made in module.named_children():
        if found and follows(module.get_submodule(found[-1][-1]).planes, made.planes):
            found[-1] += name
        else:
            found.append(name)
    return found


ORDER, OTHER = torch.randperm(96), torch.arange(96)


@pytest.mark.parametrize(
    ("sizes", "options", "want"),
    [
        ((128, 64, 70), {}, ["abc"]),
        ((128, 70, 64, 64), {}, ["ab", "cd"]),  # not after rows that leave a tile open
        ((64, 64, 64), {"group_sizes": (32, 16, 16)}, ["a", "bc"]),
        ((64, 64, 64), {"perms": (ORDER, ORDER, OTHER)}, ["ab", "c"]),
    ],
)
def test_layers_of_a_module_that_are_alike_lie_together(sizes, options, want):
    module, stored = block(*sizes, **options), block(*sizes, **options)
    pack(module, dtype=torch.float16)
    assert runs(module) == want
    for bits in (8, 3):
        for layer, before in zip(module.children(), stored.children(), strict=True):
            layer.bits = before.bits = bits
            torch.testing.assert_close(layer(X), before(X), rtol=1e-5, atol=1e-5)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(module)}
    assert sum(memory.values()) == sum(t.nbytes for t in {id(t): t for t in tensors(module)}.values())
    saved = module.state_dict()
    assert saved.keys() == stored.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.state_dict().items())
    assert len({t.untyped_storage().data_ptr() for t in saved.values()}) == len(saved)  # a file holds each by itself


def tensors(module):
    return [t for layer in module.children() for t in (*layer.buffers(), *layer.parameters())]


@pytest.mark.parametrize("change", [nn.Module.bfloat16, lambda layer: layer.to("meta", torch.bfloat16)])
def test_zeros_stay_float32_whatever_the_activations(change):
    packed = PackedLinear(layer(sym=False), dtype=torch.float16)
    zeros = packed.unit_zeros
    change(packed)
    assert packed.dtype == torch.bfloat16
    assert packed.unit_zeros.dtype == torch.float32
    assert packed.unit_zeros.device == packed.planes.device
    assert packed.planes.is_meta or torch.equal(packed.unit_zeros, zeros)


def test_layers_that_lie_together_can_be_copied_moved_and_changed():
    module = block(64, 64)
    pack(module, dtype=torch.float16)
    want = module.b(X)
    twin = copy.deepcopy(module)
    assert runs(twin) == ["ab"]
    module.a.planes.zero_()
    module.a.bias.data.zero_()
    assert torch.equal(module.b(X), want)
    assert torch.equal(twin.b(X), want)
    module.to(torch.device("meta"))
    assert runs(module) == ["a", "b"]


@pytest.mark.parametrize("widths", [(3, 3), (8, 4)])
@pytest.mark.parametrize("apart", [False, True])
def test_two_layers_gated(apart, widths, monkeypatch):
    module = block(128, 128)
    pack(module, dtype=torch.float16)
    layers = list(module.children())
    if apart:
        layers[1].planes = layers[1].planes.clone()
    for layer, bits in zip(layers, widths, strict=True):
        layer.bits = bits
    calls = []
    packed_linear = op.packed_linear
    monkeypatch.setattr(op, "packed_linear", lambda *a, **o: calls.append(o["gated"]) or packed_linear(*a, **o))
    x = X.half()
    arguments = (*of_several(x, layers), True)
    got = torch.ops.matgptq.packed_linears_at(*arguments)
    assert calls == ([False, False] if apart or widths[0] != widths[1] else [True])
    assert torch.equal(got, torch.nn.functional.silu(layers[0](x)) * layers[1](x))
    torch.library.opcheck(torch.ops.matgptq.packed_linears_at.default, arguments)


def test_the_gated_op_is_what_torch_compile_needs():
    module = block(256)
    pack(module, dtype=torch.float16)
    x = X.half()
    gate, up = module.a(x).chunk(2, -1)
    assert torch.equal(module.a(x, gated=True), torch.nn.functional.silu(gate) * up)
    layer = module.a
    arguments = (
        x,
        layer.planes,
        layer.scales,
        layer.unit_zeros,
        layer.bias,
        96,
        128,
        layer.bits,
        32,
        "round",
        True,
        True,
    )
    torch.library.opcheck(torch.ops.matgptq.packed_linear.default, arguments)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("resident", [True, False])
def test_the_op_of_several_layers_gives_what_each_gives(apart, resident, monkeypatch):
    module = block(128, 64, 70)
    pack(module, dtype=torch.float16, resident=resident)
    layers = list(module.children())
    if apart:
        layers[1].unit_zeros = layers[1].unit_zeros.clone()
    calls = []
    packed_linear = op.packed_linear
    monkeypatch.setattr(op, "packed_linear", lambda *a, **o: calls.append(o["out_features"]) or packed_linear(*a, **o))
    for widths in ((8, 8, 8), (3, 3, 3), (8, 4, 4)) if resident else ((8, 8, 8),):
        for layer, bits in zip(layers, widths, strict=True):
            layer.bits = bits
        arguments = of_several(X.half(), layers)
        calls.clear()
        got = torch.ops.matgptq.packed_linears_at(*arguments)
        assert calls == ([128, 64, 70] if apart else [128, 134] if widths[0] != widths[1] else [262])
        assert torch.equal(got, torch.cat([layer(X.half()) for layer in layers], -1))
        torch.library.opcheck(torch.ops.matgptq.packed_linears_at.default, arguments)
