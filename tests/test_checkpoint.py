"""Folders that keep the format, and values that break it."""

import re

import pytest
import torch
from folders import COLUMNS, ROWS, config_values, healthy, layer_tensors, read_tensors, write_folder

from matgptq import CheckpointError, dequantize
from matgptq.checkpoint import check_folder, check_values


def load_layers(folder):
    """Layers by name with their tensors in place, every check of a loader made."""
    config, layers, tensors = check_folder(folder)
    data, made = read_tensors(folder), {}
    for name, layer in layers.items():
        made[name] = layer.module(config)
        for key, _ in (*made[name].named_buffers(), *made[name].named_parameters()):
            tensor = data[f"{name}.{key}"]
            setattr(made[name], key, torch.nn.Parameter(tensor, False) if key == "bias" else tensor)
        check_values(made[name], str(tensors[f"{name}.qweight"].file))
    return made


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_of_codes_is_described_and_loaded_as_it_was_written(tmp_path, shards):
    tensors = layer_tensors("m.up", zeros=torch.uint8, perm=True, own=(3, 4), bias=True) | layer_tensors(
        "m.down", zeros=torch.float16
    )
    values = config_values(sym=False, slicing="prefix", bits=4, bits_per_layer={"*.down": 3})
    folder = write_folder(tmp_path / "model", tensors, values, shards)
    _, layers, headers = check_folder(folder)
    up, down = layers["m.up"], layers["m.down"]
    assert (up.out_features, up.in_features, up.stored_bits, up.own_widths) == (ROWS, COLUMNS, None, (3, 4))
    assert (up.sym, up.act_order, up.bias, up.scale_dtype) == (False, True, True, torch.float16)
    assert (down.act_order, down.bias, down.own_widths) == (False, False, ())
    assert {name: (h.shape, h.nbytes) for name, h in headers.items()} == {
        name: (tuple(t.shape), t.nbytes) for name, t in tensors.items()
    }
    loaded = load_layers(folder)
    assert (loaded["m.up"].bits, loaded["m.down"].bits) == (4, 3)
    x = torch.randn(2, COLUMNS)
    weights = dequantize(
        tensors["m.up.qweight"],
        tensors["m.up.scales_4"],
        tensors["m.up.zeros"],
        bits=4,
        group_size=32,
        rule="prefix",
    )
    want = x[:, tensors["m.up.perm"]] @ weights.t() + tensors["m.up.bias"].float()
    torch.testing.assert_close(loaded["m.up"](x), want)


@pytest.mark.parametrize(("rule", "widths"), [("round", (4,)), ("prefix", (2, 3, 4))])
def test_a_folder_of_planes_serves_the_widths_that_its_rule_allows(tmp_path, rule, widths):
    values = config_values(bits=4, slicing=rule)
    loaded = load_layers(write_folder(tmp_path / "model", layer_tensors("m.up", planes=4), values))
    assert loaded["m.up"].widths == widths


def test_a_published_folder_is_read(tmp_path):
    published = {"quant_method": "matgptq_quant", "group_size": 32, "master_bitwidth": 8, "inference_bitwidth": 4}
    published |= {"quant_dtype": "float16", "modules_to_not_convert": ["lm_head", "norm"]}
    loaded = load_layers(write_folder(tmp_path / "model", healthy(), published))
    assert [(name, made.bits, made.rule) for name, made in loaded.items()] == [
        ("m.down", 4, "round"),
        ("m.up", 4, "round"),
    ]


def with_value(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[3] = value
    return changed


BAD_VALUES = {
    "code above the master width": ("m.up.qweight", 16, "must hold codes below 16, got 16"),
    "NaN scale": ("m.up.scales", float("nan"), "must be finite, got a NaN or an infinity"),
    "infinite scale": ("m.up.scales", float("inf"), "must be finite, got a NaN or an infinity"),
    "NaN scale of its own": ("m.up.scales_3", float("nan"), "must be finite, got a NaN or an infinity"),
    "NaN zero": ("m.up.zeros", float("nan"), "must be finite, got a NaN or an infinity"),
    "column out of range": ("m.up.perm", 64, "must be a permutation of 0 to 63, got repeated or missing columns"),
    "negative column": ("m.up.perm", -1, "must be a permutation of 0 to 63, got repeated or missing columns"),
}


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_wrong_value_in_the_data_is_refused_by_file_tensor_rule_and_value(tmp_path, name, value, message):
    tensors = layer_tensors("m.up", top=16, zeros=torch.float16, perm=True, own=(3,))
    values = config_values(master_bits=4, bits=4, sym=False)
    load_layers(write_folder(tmp_path / "good", tensors, values))
    bad = write_folder(tmp_path / "bad", tensors | {name: with_value(tensors[name], value)}, values)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{bad}/model.safetensors: {name} {message}')}$"):
        load_layers(bad)
