"""The op against float64 over the definition, and bit for bit against the definition itself."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import matgptq
from matgptq import dequantize, set_bits, slice_codes
from matgptq.planes import pack_planes

RULES = ("round", "prefix")
WIDTHS = range(2, 9)
K, GROUP = 96, 48
OP = torch.ops.matgptq.linear


def random_weight(out_features=33, in_features=K, group_size=GROUP, seed=0, zeros=None):
    """Codes, float16 scales and zeros (None, "uint8" or "float")."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (out_features, in_features), dtype=torch.uint8, generator=random)
    groups = 1 if group_size == -1 else in_features // group_size
    scales = (torch.rand(out_features, groups, generator=random) * 0.02 + 0.001).half()
    if zeros is None:
        return codes, scales, None
    chosen = torch.randint(64, 192, scales.shape, dtype=torch.uint8, generator=random)
    return codes, scales, chosen if zeros == "uint8" else chosen.half() + 0.125


def stored(codes, bits, rule, storage):
    """``codes`` as they are, or as the planes of the slice that is served, or of all eight bits."""
    if storage == "codes":
        return codes
    return pack_planes(slice_codes(codes, bits, rule), bits) if storage == "planes" else pack_planes(codes, 8)


def assert_near(got, x, weights, bias=None):
    """Within the error of float32 sums over K and one rounding to the type of x, of the float64 product."""
    want = x.double() @ weights.double().t()
    reach = x.double().abs() @ weights.double().abs().t()
    if bias is not None:
        want, reach = want + bias.double(), reach + bias.double().abs()
    bound = (x.shape[-1] + 2) * torch.finfo(torch.float32).eps * reach
    bound += torch.finfo(x.dtype).eps * (want.abs() + bound) / 2
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zeros", [None, "uint8", "float"])
@pytest.mark.parametrize("storage", ["codes", "planes", "all planes"])
@pytest.mark.parametrize("rule", RULES)
def test_every_width_is_the_float64_product(rule, storage, zeros, dtype):
    codes, scales, zero = random_weight(zeros=zeros)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    for bits in WIDTHS:
        got = OP(x, stored(codes, bits, rule, storage), scales, zero, None, bits, GROUP, rule, 8)
        assert_near(got, x, dequantize(codes, scales, zero, bits=bits, group_size=GROUP, rule=rule))


@pytest.mark.parametrize("zeros", [None, "uint8", "float"])
@pytest.mark.parametrize("storage", ["codes", "planes", "all planes"])
@pytest.mark.parametrize("rule", RULES)
def test_one_hot_activations_give_the_weights_bit_for_bit(rule, storage, zeros):
    codes, scales, zero = random_weight(zeros=zeros)
    for bits in WIDTHS:
        got = OP(torch.eye(K), stored(codes, bits, rule, storage), scales, zero, None, bits, GROUP, rule, 8)
        assert torch.equal(got.t(), dequantize(codes, scales, zero, bits=bits, group_size=GROUP, rule=rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("master_bits", [4, 5, 6, 7])
def test_codes_of_a_smaller_master_width_are_exact_too(master_bits, rule):
    codes, scales, _ = random_weight()
    codes >>= 8 - master_bits
    for bits in range(2, master_bits + 1):
        kwargs = {"bits": bits, "group_size": GROUP, "rule": rule, "master_bits": master_bits}
        want = dequantize(codes, scales, **kwargs)
        assert torch.equal(matgptq.linear(torch.eye(K), codes, scales, **kwargs).t(), want)
        planes = pack_planes(codes, master_bits)
        assert torch.equal(matgptq.linear(torch.eye(K), planes, scales, **kwargs).t(), want)


@pytest.mark.parametrize("out_features", [1, 7, 33])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 96])
def test_ragged_rows_and_every_group_size(group_size, out_features):
    codes, scales, _ = random_weight(out_features, group_size=group_size)
    x = torch.randn(3, K)
    got = matgptq.linear(x, codes, scales, bits=4, group_size=group_size)
    assert_near(got, x, dequantize(codes, scales, bits=4, group_size=group_size))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
def test_leading_dimensions_are_kept(shape):
    codes, scales, _ = random_weight()
    x, bias = torch.randn(*shape, K), torch.randn(33).half()
    got = matgptq.linear(x, codes, scales, bias=bias, bits=3, group_size=GROUP)
    assert_near(got, x, dequantize(codes, scales, bits=3, group_size=GROUP), bias)


def test_strided_activations_are_read_as_their_values():
    codes, scales, _ = random_weight()
    x = torch.randn(K, 4).t()
    got = matgptq.linear(x, codes, scales, bits=4, group_size=GROUP)
    assert_near(got, x, dequantize(codes, scales, bits=4, group_size=GROUP))


@pytest.mark.parametrize("storage", ["codes", "planes"])
def test_no_float_copy_of_a_large_weight_is_made(storage):
    rows, columns = 2048, 1024  # 2 Mi weights; a piece is 1/4 Mi
    codes, scales, _ = random_weight(rows, columns, -1)
    weight = stored(codes, 4, "round", storage)

    class Largest(TorchDispatchMode):
        floats = bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != weight.data_ptr():
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
                    if tensor.is_floating_point():
                        self.floats = max(self.floats, tensor.untyped_storage().nbytes() // 4)
            return out

    with Largest() as largest:
        # the mode sees what the kernel of the op calls, not the op as one call
        matgptq.ops.linear_by_pieces(torch.randn(1, columns), weight, scales, None, None, 4, -1)
    assert largest.floats == matgptq.ops.PIECE  # the pieces were seen, and nothing larger
    assert largest.bytes == 4 * matgptq.ops.PIECE  # integers included: unpacked slices are no larger


@pytest.mark.parametrize("storage", ["codes", "planes"])
@pytest.mark.parametrize("zeros", [None, "uint8"])
@pytest.mark.parametrize("shape", [(2, K), (0, K)])
def test_opcheck(shape, zeros, storage):
    codes, scales, zero = random_weight(zeros=zeros)
    weight = stored(codes, 4, "prefix", storage)
    bias = torch.randn(33)
    torch.library.opcheck(OP.default, (torch.randn(shape), weight, scales, zero, bias, 4, GROUP, "prefix", 8))


CODES, SCALES, _ = random_weight(4, 32, 16)
X = torch.randn(2, 32)


def call(x=X, qweight=CODES, scales=SCALES, zeros=None, bias=None, **changes):
    return matgptq.linear(x, qweight, scales, zeros, bias, **{"bits": 4, "group_size": 16} | changes)


PLANES = pack_planes(CODES >> 4, 4)
BAD_CALLS = [
    ({"x": X.int()}, TypeError, "x must be float16, bfloat16 or float32, got torch.int32"),
    ({"x": X[:, :16]}, ValueError, "x must have shape (..., 32), got (2, 16)"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have shape (..., 32), got ()"),
    ({"qweight": CODES.int()}, TypeError, "qweight must be uint8, got torch.int32"),
    (
        {"qweight": CODES[0]},
        ValueError,
        "qweight must be codes (2 dimensions) or bit planes (3), got (32,)",
    ),
    ({"qweight": CODES[:, :0], "x": X[:, :0]}, ValueError, "qweight must have columns, got (4, 0)"),
    ({"qweight": PLANES.repeat(3, 1, 1)}, ValueError, "qweight must have 2 to 8 bit planes, got 12"),
    ({"qweight": PLANES, "bits": 5}, ValueError, "bits must be at most 4, the stored width, got 5"),
    (
        {"qweight": PLANES, "bits": 3},
        ValueError,
        "bits must be 4: a slice cut by the rule 'round' serves its own width only, got 3",
    ),
    ({"scales": SCALES[:3]}, ValueError, "scales must have shape (4, 2), got (3, 2)"),
    ({"scales": SCALES.int()}, TypeError, "scales must be floating point, got torch.int32"),
    ({"zeros": SCALES[:, :1]}, ValueError, "zeros must have shape (4, 2), got (4, 1)"),
    ({"zeros": SCALES.int()}, TypeError, "zeros must be floating point, got torch.int32"),
    ({"bias": torch.zeros(5)}, ValueError, "bias must have shape (4,), got (5,)"),
    ({"bits": 9}, ValueError, "bits must be an integer from 2 to 8, got 9"),
    ({"bits": 5, "master_bits": 4}, ValueError, "bits must be an integer from 2 to 4, got 5"),
    ({"group_size": 24}, ValueError, "group_size must be -1 or a positive multiple of 16, got 24"),
    ({"group_size": 48}, ValueError, "group_size must divide in_features = 32, got 48"),
    ({"rule": "up"}, ValueError, "rule must be one of round, prefix, got 'up'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS, ids=[message for *_, message in BAD_CALLS])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors_name_the_argument_the_rule_and_the_value(device, changes, error, message):
    moved = {"x": X, "qweight": CODES, "scales": SCALES} | changes
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in moved.items()}
    with pytest.raises(error, match=re.escape(message)):
        call(**moved)


def test_set_bits_of_a_model_without_quantised_layers_fails():
    with pytest.raises(ValueError, match="model must have MatGPTQLinear layers, got none"):
        set_bits(torch.nn.Linear(2, 2), 4)
