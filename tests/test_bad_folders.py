"""Folders that break the format in one place each."""

import json
import re

import pytest
import torch
from folders import COLUMNS, ROWS, config_values, healthy, write_folder, write_json
from safetensors.torch import load, save_file

from matgptq import CheckpointError, slice_folder
from matgptq.checkpoint import check_folder

SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
UP = "m.up.qweight"
ONE_BYTE = torch.zeros(ROWS, 2, dtype=torch.uint8)
# what is wrong -> (tensors changed, None to leave one out; quantization_config changed; the message)
BAD_TENSORS = {
    "no layer": (
        dict.fromkeys(("m.up.qweight", "m.down.qweight")),
        {},
        "{file}: at least one tensor must be called <layer>.qweight, got none",
    ),
    "codes of another type": ({UP: torch.zeros(ROWS, COLUMNS).half()}, {}, "{file}: m.up.qweight must be U8, got F16"),
    "signed codes": (
        {UP: torch.zeros(ROWS, COLUMNS, dtype=torch.int8)},
        {},
        "{file}: m.up.qweight must be U8, got I8",
    ),
    "one dimension": (
        {UP: torch.zeros(64, dtype=torch.uint8)},
        {},
        "{file}: m.up.qweight must be codes (2 dimensions) or bit planes (3), got (64,)",
    ),
    "ragged columns": (
        {UP: torch.zeros(ROWS, 40, dtype=torch.uint8)},
        {},
        "{file}: m.up.qweight must have rows, and columns that are a multiple of 16, got (8, 40)",
    ),
    "ragged planes": (
        {UP: torch.zeros(4, ROWS, 3, dtype=torch.uint8)},
        {"bits": 4},
        "{file}: m.up.qweight must have rows, and columns that are a multiple of 16, got (4, 8, 3)",
    ),
    "no rows": (
        {UP: torch.zeros(0, COLUMNS, dtype=torch.uint8)},
        {},
        "{file}: m.up.qweight must have rows, and columns that are a multiple of 16, got (0, 64)",
    ),
    "one plane": (
        {UP: torch.zeros(1, ROWS, 8, dtype=torch.uint8)},
        {},
        "{file}: m.up.qweight must have 2 to 8 bit planes, got 1",
    ),
    "more planes than the master width": (
        {UP: torch.zeros(6, ROWS, 8, dtype=torch.uint8)},
        {"master_bits": 4, "bits": 4},
        "{file}: m.up.qweight must have 2 to 4 bit planes, got 6",
    ),
    "group does not divide": (
        {},
        {"group_size": 48},
        "{file}: m.down.qweight must fit group_size, got (8, 64): group_size must divide in_features = 64, got 48",
    ),
    "another group": ({}, {"group_size": 16}, "{file}: m.down.scales must have shape (8, 4), got (8, 2)"),
    "no scales": (
        {"m.up.scales": None},
        {},
        "{file}: m.up.scales must have shape (8, 2), got no such tensor",
    ),
    "scales of another type": (
        {"m.up.scales": ONE_BYTE},
        {},
        "{file}: m.up.scales must be F16 or BF16 or F32, got U8",
    ),
    "scales of another shape": (
        {"m.up.scales": torch.ones(2, ROWS)},
        {},
        "{file}: m.up.scales must have shape (8, 2), got (2, 8)",
    ),
    "own scales of another shape": (
        {"m.up.scales_3": torch.ones(ROWS, 3).half()},
        {},
        "{file}: m.up.scales_3 must have shape (8, 2), got (8, 3)",
    ),
    "own scales of another type than scales": (
        {"m.up.scales_3": torch.ones(ROWS, 2)},
        {},
        "{file}: m.up.scales_3 must be F16, got F32",
    ),
    "zeros of another type": (
        {"m.up.zeros": ONE_BYTE.int(), "m.down.zeros": ONE_BYTE},
        {"sym": False},
        "{file}: m.up.zeros must be U8 or F16 or BF16 or F32, got I32",
    ),
    "zeros of another shape": (
        {"m.up.zeros": ONE_BYTE[:, :1].clone(), "m.down.zeros": ONE_BYTE},
        {"sym": False},
        "{file}: m.up.zeros must have shape (8, 2), got (8, 1)",
    ),
    "zeros where sym is true": (
        {"m.up.zeros": ONE_BYTE},
        {},
        "{file}: m.up.zeros must be absent where sym is true, got (8, 2)",
    ),
    "no zeros where sym is false": (
        {"m.down.zeros": ONE_BYTE},
        {"sym": False},
        "{file}: m.up.zeros must be there where sym is false, got none",
    ),
    "perm of another type": (
        {"m.up.perm": torch.zeros(COLUMNS)},
        {},
        "{file}: m.up.perm must be I32 or I64, got F32",
    ),
    "perm of another shape": (
        {"m.up.perm": torch.arange(32)},
        {},
        "{file}: m.up.perm must have shape (64,), got (32,)",
    ),
    "bias of another shape": (
        {"m.up.bias": torch.zeros(COLUMNS)},
        {},
        "{file}: m.up.bias must have shape (8,), got (64,)",
    ),
    "a weight beside the codes": (
        {"m.up.weight": torch.zeros(ROWS, COLUMNS)},
        {},
        "{file}: m.up.weight must be absent beside qweight, got (8, 64)",
    ),
    "GPTQ's g_idx": (
        {"m.up.g_idx": torch.zeros(COLUMNS).int()},
        {},
        "{file}: m.up.g_idx must be absent beside qweight, got (64,)",
    ),
    "a width above the planes": (
        {UP: torch.zeros(4, ROWS, 8, dtype=torch.uint8)},
        {"bits": 6},
        "{config}: bits must be at most 4, the stored width, got 6 (m.up)",
    ),
    "a width below rounded planes": (
        {UP: torch.zeros(4, ROWS, 8, dtype=torch.uint8)},
        {"bits": 3},
        "{config}: bits must be 4: a slice cut by the rule 'round' serves its own width only, got 3 (m.up)",
    ),
    "a width for a layer that is not there": (
        {},
        {"bits_per_layer": {"m.gate": 4}},
        "{config}: bits_per_layer must name quantised layers, got 'm.gate'",
    ),
    "a width for a pattern that matches nothing": (
        {},
        {"bits_per_layer": {"*.norm": 4}},
        "{config}: bits_per_layer must name quantised layers, got '*.norm'",
    ),
    "an unknown key": (
        {},
        {"desc_act": False},
        "{config}: quantization_config: keys must be among bits, bits_per_layer, format_version, group_size, "
        "master_bits, modules_to_not_convert, slicing, sym, got 'desc_act'",
    ),
    "a wrong value": (
        {},
        {"bits": 12},
        "{config}: quantization_config: bits must be an integer from 2 to 8, got 12",
    ),
    "another method": (
        {},
        {"quant_method": "awq"},
        "{config}: quantization_config: quant_method must be matgptq or matgptq_quant, got 'awq'",
    ),
}


def assert_refused(folder, message):
    """Both readers, `check_folder` and `slice_folder`, refuse, with this message and nothing left behind."""
    for read in (check_folder, lambda source: slice_folder(source, source.parent / "cut", {})):
        with pytest.raises(CheckpointError, match=f"^{re.escape(message)}"):
            read(folder)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(("tensors", "values", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_wrong_tensor_or_key_is_refused_by_file_tensor_rule_and_value(tmp_path, tensors, values, message):
    kept = {name: tensor for name, tensor in (healthy() | tensors).items() if tensor is not None}
    folder = write_folder(tmp_path / "model", kept, config_values(**values))
    message = message.format(file=folder / "model.safetensors", config=folder / "config.json")
    assert_refused(folder, message)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    write_json(path, values)


def cut_off(path, count=100):
    path.write_bytes(path.read_bytes()[:-count])


def point_index(folder, name, file):
    edit(folder / INDEX, lambda values: values["weight_map"].update({name: file}))


def store_twice(folder):
    tensors = load((folder / SHARD_1).read_bytes())
    save_file(tensors | {"m.up.qweight": ONE_BYTE}, folder / SHARD_1)


INCOMPLETE = "file must be complete safetensors, got "
NAMES_ONLY = "{index}: weight_map must map tensor names to file names of the folder"
BAD_FILES = {
    "truncated": (lambda f: cut_off(f / SHARD_2), "{folder}/" + SHARD_2 + ": " + INCOMPLETE),
    "truncated in the header": (
        lambda f: (f / SHARD_1).write_bytes((f / SHARD_1).read_bytes()[:20]),
        "{folder}/" + SHARD_1 + ": " + INCOMPLETE,
    ),
    "empty": (lambda f: (f / SHARD_1).write_bytes(b""), "{folder}/" + SHARD_1 + ": " + INCOMPLETE),
    "not safetensors": (lambda f: (f / SHARD_1).write_bytes(b"PK" * 99), "{folder}/" + SHARD_1 + ": " + INCOMPLETE),
    "missing shard": (lambda f: (f / SHARD_2).unlink(), "{folder}/" + SHARD_2 + ": file must be there, got none"),
    "no weights": (lambda f: (f / INDEX).unlink(), "{folder}/model.safetensors: file must be there, got none"),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), "{index}: file must be JSON, got "),
    "index a list": (lambda f: (f / INDEX).write_text("[]"), "{index}: file must hold a JSON object, got list"),
    "index without weight_map": (lambda f: write_json(f / INDEX, {}), NAMES_ONLY),
    "index of numbers": (lambda f: point_index(f, "m.up.qweight", 7), NAMES_ONLY),
    "index out of the folder": (lambda f: point_index(f, "m.up.qweight", "../x.safetensors"), NAMES_ONLY),
    "index to a full path": (lambda f: point_index(f, "m.up.qweight", "/x.safetensors"), NAMES_ONLY),
    "index to the parent": (
        lambda f: point_index(f, "m.up.qweight", ".."),
        "{folder}/..: file must be there, got none",
    ),
    "index with a tensor too many": (
        lambda f: point_index(f, "m.gate.qweight", SHARD_1),
        "{index}: m.gate.qweight must be in " + SHARD_1 + ", got no such tensor",
    ),
    "index to the wrong shard": (
        lambda f: point_index(f, "m.down.qweight", SHARD_2),
        "{index}: m.down.qweight must be in " + SHARD_2 + ", got " + SHARD_1,
    ),
    "index beside a single file": (
        lambda f: (f / SHARD_1).rename(f / "model.safetensors"),
        "{folder}: folder must have model.safetensors or " + INDEX + ", got both",
    ),
    "stored twice": (
        store_twice,
        "{folder}/" + SHARD_2 + ": m.up.qweight must be stored once, got another in {folder}/" + SHARD_1,
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "{config}: file must be there, got none"),
    "config not JSON": (lambda f: (f / "config.json").write_text("bits: 4"), "{config}: file must be JSON, got "),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "{config}: file must be JSON, got "),
    "config a number": (
        lambda f: (f / "config.json").write_text("4"),
        "{config}: file must hold a JSON object, got int",
    ),
    "no quantization_config": (
        lambda f: write_json(f / "config.json", {}),
        "{config}: quantization_config must be an object, got None",
    ),
    "quantization_config a list": (
        lambda f: write_json(f / "config.json", {"quantization_config": [4]}),
        "{config}: quantization_config must be an object, got [4]",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage, message):
    folder = write_folder(tmp_path / "model", healthy(), config_values(), shards=2)
    damage(folder)
    message = message.format(folder=folder, index=folder / INDEX, config=folder / "config.json")
    assert_refused(folder, message)
