"""`MatGPTQLinear` and `set_bits`: widths that change at run time, compiled and exported."""

import re

import pytest
import torch
from torch import nn

from matgptq import MatGPTQLinear, dequantize, quantized_layers, set_bits, slice_codes
from matgptq.planes import pack_planes

K, GROUP = 64, 32


def layer(out_features=24, seed=0, bias=True, **options):
    """A layer with random tensors."""
    random = torch.Generator().manual_seed(seed)
    options = {"bits": 4, "group_size": GROUP} | options
    made = MatGPTQLinear(K, out_features, bias, **options)
    made.qweight.random_(generator=random)
    for name, tensor in made.named_buffers():
        if name.startswith("scales"):
            tensor.uniform_(0.001, 0.02, generator=random)
    if made.zeros is not None:
        made.zeros.random_(64, 192, generator=random)
    if made.perm is not None:
        made.perm.copy_(torch.randperm(K, generator=random))
    if bias:
        made.bias.data.uniform_(-1, 1, generator=random)
    return made


def weights(made, bits, scales=None):
    """The float32 weights that a layer of whole codes stands for, columns as they are stored."""
    scales = made.scales if scales is None else scales
    return dequantize(made.qweight, scales, made.zeros, bits=bits, group_size=made.group_size, rule=made.rule)


def outputs_of_one_hot(made):
    return (made(torch.eye(K)) - (0 if made.bias is None else made.bias.float())).t()


@pytest.mark.parametrize("rule", ["round", "prefix"])
@pytest.mark.parametrize("sym", [True, False])
def test_one_layer_serves_every_width(sym, rule):
    made = layer(sym=sym, rule=rule, bias=False)
    assert made.widths == (2, 3, 4, 5, 6, 7, 8)
    for bits in (4, 3, 8, 2, 6, 5, 7):
        made.bits = bits
        assert torch.equal(outputs_of_one_hot(made), weights(made, bits))


def test_the_bias_is_added():
    made = layer()
    x = torch.randn(2, 3, K)
    bias, made.bias = made.bias, None
    without = made(x)
    made.bias = bias
    assert torch.equal(made(x), without + bias.float())


def test_the_permutation_says_which_input_a_stored_column_takes():
    made = layer(act_order=True, bias=False)
    got, want = outputs_of_one_hot(made), weights(made, 4)
    for column, source in enumerate(made.perm.tolist()):
        assert torch.equal(got[:, source], want[:, column])


def test_scales_of_its_own_serve_their_width_and_no_other():
    made = layer(own_widths=(3, 5), bias=False)
    for bits in range(2, 9):
        made.bits = bits
        scales = {3: made.scales_3, 5: made.scales_5}.get(bits, made.scales)
        assert torch.equal(outputs_of_one_hot(made), weights(made, bits, scales))


@pytest.mark.parametrize(
    ("rule", "stored_bits", "widths"),
    [("round", 4, (4,)), ("prefix", 4, (2, 3, 4)), ("round", 8, tuple(range(2, 9))), ("prefix", 2, (2,))],
)
def test_a_cut_layer_serves_the_widths_that_its_planes_hold(rule, stored_bits, widths):
    whole = layer(rule=rule, bias=False)
    cut = layer(rule=rule, bias=False, stored_bits=stored_bits, bits=stored_bits)
    cut.qweight = pack_planes(slice_codes(whole.qweight, stored_bits, rule), stored_bits)
    cut.scales = whole.scales
    assert cut.widths == widths
    for bits in widths:
        cut.bits = bits
        assert torch.equal(outputs_of_one_hot(cut), weights(whole, bits))


def test_a_compiled_layer_follows_its_width():
    made = layer(sym=False, act_order=True)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for bits, tokens in ((4, 2), (3, 2), (8, 5), (4, 1)):
        made.bits = bits
        x = torch.randn(tokens, K)
        assert torch.equal(compiled(x), made(x))


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"sym": False, "act_order": True}])
def test_an_exported_layer_takes_any_number_of_tokens(options):
    made = layer(**options, own_widths=(4,))
    tokens = torch.export.Dim("tokens")
    exported = torch.export.export(made, (torch.randn(3, K),), dynamic_shapes=({0: tokens},)).module()
    for count in (2, 7):
        x = torch.randn(count, K)
        assert torch.equal(exported(x), made(x))


def test_the_state_dict_restores_a_layer():
    made = layer(sym=False, act_order=True, own_widths=(3,))
    other = layer(seed=1, sym=False, act_order=True, own_widths=(3,))
    other.load_state_dict(made.state_dict())
    x = torch.randn(2, K)
    assert torch.equal(other(x), made(x))


def test_bytes_by_width_are_bits_of_each_weight_and_the_rest():
    made = layer(own_widths=(3,))
    rest = made.scales.nbytes + made.bias.nbytes
    assert made.nbytes() == K * 24 + 2 * made.scales.nbytes + made.bias.nbytes
    assert [made.nbytes(bits) - rest for bits in (8, 4, 3)] == [K * 24, K * 24 // 2, K * 24 * 3 // 8]


@pytest.mark.parametrize(
    ("options", "bits", "message"),
    [
        ({}, 9, "bits must be an integer from 2 to 8, got 9 (mlp.up)"),
        ({}, 1, "bits must be an integer from 2 to 8, got 1 (mlp.up)"),
        ({}, "4", "bits must be an integer from 2 to 8, got '4' (mlp.up)"),
        ({"master_bits": 6}, 7, "bits must be at most 6, the stored width, got 7 (mlp.up)"),
        ({"stored_bits": 4}, 5, "bits must be at most 4, the stored width, got 5 (mlp.up)"),
        (
            {"stored_bits": 4},
            3,
            "bits must be 4: a slice cut by the rule 'round' serves its own width only, got 3 (mlp.up)",
        ),
        ({"stored_bits": 4, "rule": "prefix"}, 5, "bits must be at most 4, the stored width, got 5 (mlp.up)"),
    ],
)
def test_a_width_that_is_not_stored_is_refused_and_nothing_changes(options, bits, message):
    made = layer(name="mlp.up", **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        made.bits = bits
    assert made.bits == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 100}, "in_features must be a positive multiple of 16, got 100 (up)"),
        ({"in_features": 0}, "in_features must be a positive multiple of 16, got 0 (up)"),
        ({"out_features": 0}, "out_features must be positive, got 0 (up)"),
        ({"group_size": 48}, "group_size must divide in_features = 64, got 48 (up)"),
        ({"group_size": 8}, "group_size must be -1 or a positive multiple of 16, got 8 (up)"),
        ({"rule": "floor"}, "rule must be one of round, prefix, got 'floor' (up)"),
        ({"master_bits": 9}, "master_bits must be an integer from 2 to 8, got 9 (up)"),
        ({"stored_bits": 9}, "bits must be an integer from 2 to 8, got 9 (up)"),
        ({"dtype": torch.int32}, "dtype must be floating point, got torch.int32 (up)"),
        ({"own_widths": (1,)}, "own_widths must be an integer from 2 to 8, got 1 (up)"),
    ],
)
def test_construction_errors_name_the_argument_the_rule_the_value_and_the_layer(options, message):
    arguments = {"in_features": 64, "out_features": 8, "group_size": 32, "name": "up"} | options
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MatGPTQLinear(**arguments)


def small_model():
    return nn.ModuleDict(
        {
            "0": nn.ModuleDict({"up": layer(), "down": layer()}),
            "1": nn.ModuleDict({"up": layer(stored_bits=4, rule="prefix"), "down": layer()}),
            "head": nn.Linear(4, 4),
        }
    )


def widths_of(model):
    return {name: made.bits for name, made in quantized_layers(model).items()}


@pytest.mark.parametrize(
    ("bits", "widths"),
    [
        (3, (3, 3, 3, 3)),
        ({"0.up": 8}, (8, 4, 4, 4)),
        ({"*.down": 8, "1.*": 2}, (4, 8, 2, 8)),  # the first pattern that matches
        ({"*": 3, "0.up": 6}, (6, 3, 3, 3)),  # a name goes before patterns
        ({"?.down": 5}, (4, 5, 4, 5)),
        ({}, (4, 4, 4, 4)),
    ],
)
def test_set_bits_takes_a_width_names_and_patterns(bits, widths):
    model = small_model()
    set_bits(model, bits)
    assert tuple(widths_of(model).values()) == widths


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (8, "bits must be one of 2, 3, 4 for 1.up, got 8"),
        ({"0.up": 3, "1.up": 6}, "bits must be one of 2, 3, 4 for 1.up, got 6"),
        ({"0.up": 3, "0.down": 9}, "bits must be one of 2, 3, 4, 5, 6, 7, 8 for 0.down, got 9"),
        ({"0.up": 3, "0.down": 8.0}, "bits must be one of 2, 3, 4, 5, 6, 7, 8 for 0.down, got 8.0"),
        ({"0.up": 3, "0.down": "8"}, "bits must be one of 2, 3, 4, 5, 6, 7, 8 for 0.down, got '8'"),
        (None, "bits must be a width for '*', got None"),
        ({"0.up": 3, "head": 4}, "bits must name quantised layers of the model, got 'head' which matches none"),
        ({"0.up": 3, "*.gate": 4}, "bits must name quantised layers of the model, got '*.gate' which matches none"),
    ],
)
def test_a_set_bits_that_fails_changes_nothing(bits, message):
    model = small_model()
    before = widths_of(model)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        set_bits(model, bits)
    assert widths_of(model) == before
