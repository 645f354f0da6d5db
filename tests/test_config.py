"""The quantization_config: what it reads, what it writes and what it refuses."""

import json
import re

import pytest

from matgptq import QuantConfig
from matgptq.config import read_widths

PUBLISHED = {
    "quant_method": "matgptq_quant",
    "group_size": 128,
    "master_bitwidth": 8,
    "inference_bitwidth": 4,
    "quant_dtype": "float16",
    "modules_to_not_convert": ["lm_head", "norm"],
}


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig(bits=4, group_size=-1, sym=False, slicing="prefix", modules_to_not_convert=()),
        QuantConfig(bits=3, master_bits=6, group_size=48, bits_per_layer={"a.b": 6, "*.q_proj": 2}),
    ],
)
def test_what_is_written_reads_back_the_same(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert QuantConfig.from_dict(values) == config
    assert values["quant_method"] == "matgptq"


def test_every_key_has_the_default_of_the_format():
    assert QuantConfig.from_dict({"quant_method": "matgptq"}).to_dict() == {
        "quant_method": "matgptq",
        "bits": 8,
        "master_bits": 8,
        "group_size": 128,
        "sym": True,
        "slicing": "round",
        "bits_per_layer": {},
        "modules_to_not_convert": ["lm_head"],
        "format_version": 1,
    }


def test_published_keys_are_read():
    config = QuantConfig.from_dict(PUBLISHED)
    assert config == QuantConfig(
        bits=4, group_size=128, sym=True, slicing="round", modules_to_not_convert=("lm_head", "norm")
    )
    assert config.to_dict()["quant_method"] == "matgptq"


@pytest.mark.parametrize("names", [None, []])
def test_a_published_config_may_leave_no_module_out(names):
    config = QuantConfig.from_dict(PUBLISHED | {"modules_to_not_convert": names})
    assert config.modules_to_not_convert == ()


def test_the_input_is_left_alone():
    values = dict(PUBLISHED)
    QuantConfig.from_dict(values)
    assert values == PUBLISHED


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("model.layers.0.mlp.down_proj", 8),  # its own entry goes before patterns that stand earlier
        ("model.layers.1.mlp.down_proj", 6),
        ("model.layers.1.mlp.up_proj", 3),  # of two patterns that match, the first
        ("model.layers.12.mlp.up_proj", 5),
        ("model.layers.1.self_attn.q_proj", 4),
        ("MODEL.LAYERS.1.MLP.UP_PROJ", 4),  # case matters
    ],
)
def test_bits_for_a_layer_are_its_own_else_the_first_pattern_that_matches_else_bits(name, bits):
    widths = {
        "*.down_proj": 6,
        "model.layers.?.mlp.up_proj": 3,
        "model.*.up_proj": 5,
        "model.layers.0.mlp.down_proj": 8,
    }
    assert QuantConfig(bits=4, bits_per_layer=widths).bits_for(name) == bits


@pytest.mark.parametrize(
    ("name", "skipped"),
    [("lm_head", True), ("model.lm_head", True), ("model.my_lm_head", False), ("model.norm", True), ("norm.q", False)],
)
def test_modules_are_left_out_by_name_or_last_parts(name, skipped):
    assert QuantConfig(modules_to_not_convert=("lm_head", "norm")).skips(name) is skipped


KNOWN = "bits, bits_per_layer, format_version, group_size, master_bits, modules_to_not_convert, slicing, sym"
PUBLISHED_KNOWN = "group_size, inference_bitwidth, master_bitwidth, modules_to_not_convert, quant_dtype"
WRONG = [
    ({"bits": 1}, "bits must be an integer from 2 to 8, got 1"),
    ({"bits": 9}, "bits must be an integer from 2 to 8, got 9"),
    ({"bits": "4"}, "bits must be an integer from 2 to 8, got '4'"),
    ({"bits": 4.0}, "bits must be an integer from 2 to 8, got 4.0"),
    ({"bits": None}, "bits must be an integer from 2 to 8, got None"),
    ({"bits": 6, "master_bits": 5}, "bits must be an integer from 2 to 5, got 6"),
    ({"master_bits": 16}, "master_bits must be an integer from 2 to 8, got 16"),
    ({"group_size": 0}, "group_size must be -1 or a positive multiple of 16, got 0"),
    ({"group_size": 100}, "group_size must be -1 or a positive multiple of 16, got 100"),
    ({"group_size": -1.0}, "group_size must be -1 or a positive multiple of 16, got -1.0"),
    ({"group_size": "128"}, "group_size must be -1 or a positive multiple of 16, got '128'"),
    ({"group_size": None}, "group_size must be -1 or a positive multiple of 16, got None"),
    ({"sym": 1}, "sym must be true or false, got 1"),
    ({"sym": "yes"}, "sym must be true or false, got 'yes'"),
    ({"slicing": "floor"}, "slicing must be one of round, prefix, got 'floor'"),
    ({"slicing": ["round"]}, "slicing must be one of round, prefix, got ['round']"),
    ({"bits_per_layer": [4]}, "bits_per_layer must map module names to widths, got [4]"),
    ({"bits_per_layer": {"a.b": 9}}, "bits_per_layer must be an integer from 2 to 8, got 9 (a.b)"),
    ({"bits_per_layer": {"a.b": "4"}}, "bits_per_layer must be an integer from 2 to 8, got '4' (a.b)"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of names, got 'lm_head'"),
    ({"modules_to_not_convert": [1]}, "modules_to_not_convert must be a list of names, got [1]"),
    ({"modules_to_not_convert": 5}, "modules_to_not_convert must be a list of names, got 5"),
    ({"modules_to_not_convert": None}, "modules_to_not_convert must be a list of names, got None"),
    ({"format_version": 2}, "format_version must be 1, got 2"),
    ({"format_version": "1"}, "format_version must be 1, got '1'"),
    ({"format_version": True}, "format_version must be 1, got True"),
    ({"desc_act": True}, f"keys must be among {KNOWN}, got 'desc_act'"),
    ({"master_bitwidth": 8}, f"keys must be among {KNOWN}, got 'master_bitwidth'"),
    ({"quant_method": "gptq"}, "quant_method must be matgptq or matgptq_quant, got 'gptq'"),
    ({"quant_method": None}, "quant_method must be matgptq or matgptq_quant, got None"),
]
PUBLISHED_WRONG = [
    ({"inference_bitwidth": 9}, "bits must be an integer from 2 to 8, got 9"),
    ({"master_bitwidth": 10}, "master_bits must be an integer from 2 to 8, got 10"),
    ({"group_size": 12}, "group_size must be -1 or a positive multiple of 16, got 12"),
    ({"bits": 4}, f"keys must be among {PUBLISHED_KNOWN}, got 'bits'"),
    ({"slicing": "prefix"}, f"keys must be among {PUBLISHED_KNOWN}, got 'slicing'"),
]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"quant_method": "matgptq"} | changes, message) for changes, message in WRONG]
    + [(PUBLISHED | changes, message) for changes, message in PUBLISHED_WRONG],
)
def test_a_wrong_value_is_refused_by_place_key_rule_and_value(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'config.json: {message}')}$"):
        QuantConfig.from_dict(values, where="config.json")


def test_a_width_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "widths.txt"
    path.write_text(
        "# mixed, 3.5 bits on average\n\nmodel.layers.0.mlp.up_proj: 3\n  lm_head :8  # the output\r\na:b: 4",
        encoding="utf-8-sig",
    )
    assert read_widths(path) == {"model.layers.0.mlp.up_proj": 3, "lm_head": 8, "a:b": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 4\nb 3\n", "line 2: lines must read 'layer name: bits', got 'b 3'"),
        (": 4", "line 1: lines must read 'layer name: bits', got ': 4'"),
        ("a:", "line 1: lines must read 'layer name: bits', got 'a:'"),
        ("a: four", "line 1: lines must read 'layer name: bits', got 'a: four'"),
        ("a: -4", "line 1: lines must read 'layer name: bits', got 'a: -4'"),
        ("a: 3.5", "line 1: lines must read 'layer name: bits', got 'a: 3.5'"),
        ("a: 9", "line 1: bits must be an integer from 2 to 8, got 9"),
        ("a: 1", "line 1: bits must be an integer from 2 to 8, got 1"),
        ("a: 4\n\na: 4", "line 3: each layer may be named once, got 'a' again"),
    ],
)
def test_a_wrong_line_is_refused_by_file_and_line(tmp_path, text, message):
    path = tmp_path / "widths.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}, {message}')}$"):
        read_widths(path)


def test_a_width_file_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "widths.txt"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: file must be UTF-8 text"):
        read_widths(path)


def test_a_config_is_updated_by_what_was_asked():
    stored = QuantConfig(bits=4, group_size=64, bits_per_layer={"*.q_proj": 6})
    assert stored.updated({"quant_method": "matgptq"}) == stored
    assert stored.updated({"quant_method": "matgptq", "bits": 3}) == QuantConfig(bits=3, group_size=64)
    published = {"quant_method": "matgptq_quant", "inference_bitwidth": 3, "quant_dtype": "float16"}
    assert stored.updated(published) == QuantConfig(bits=3, group_size=64)
    with pytest.raises(ValueError, match=r"config: keys must be among .*, got 'groups'"):
        stored.updated({"quant_method": "matgptq", "groups": 1}, where="config")
    with pytest.raises(ValueError, match=r"quant_method must be .*, got None"):
        stored.updated({"bits": 3})
