"""`slice_folder`: what a cut folder holds, bit for bit, and what a failed cut leaves behind."""

import json
import os
import re

import pytest
import torch
from folders import config_values, healthy, layer_tensors, read_tensors, write_folder

from matgptq import CheckpointError, QuantConfig, slice_codes, slice_folder
from matgptq import folder as writing
from matgptq.checkpoint import check_folder
from matgptq.planes import pack_planes

RULES = ("round", "prefix")
INDEX = "model.safetensors.index.json"


def planes_of(codes, bits, rule):
    return pack_planes(slice_codes(codes, bits, rule), bits)


def stored_bits(folder):
    return {name: layer.stored_bits for name, layer in check_folder(folder)[1].items()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_cut_stores_the_slices_and_everything_else_as_it_was(tmp_path, bits, rule):
    tensors = healthy() | layer_tensors("m.gate", perm=True, bias=True)
    folder = write_folder(tmp_path / "model", tensors, config_values(slicing=rule))
    (folder / "tokenizer.json").write_text("{}")
    for name in ("old.bin", "old.h5", "old.onnx", ".hidden"):
        (folder / name).write_text("weights of another format")
    config = slice_folder(folder, tmp_path / "cut", bits)
    cut = read_tensors(tmp_path / "cut")
    assert cut.keys() == tensors.keys()
    for name, tensor in tensors.items():
        want = planes_of(tensor, bits, rule) if name.endswith("qweight") else tensor
        assert torch.equal(cut[name], want), name
    assert check_folder(tmp_path / "cut")[0] == config == QuantConfig(bits=bits, group_size=32, slicing=rule)
    written = sorted(file.name for file in (tmp_path / "cut").iterdir())
    assert written == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("rule", RULES)
def test_zeros_are_kept(tmp_path, rule):
    tensors = layer_tensors("m.up", zeros=torch.float16)
    folder = write_folder(tmp_path / "model", tensors, config_values(sym=False, slicing=rule))
    slice_folder(folder, tmp_path / "cut", 3)
    assert torch.equal(read_tensors(tmp_path / "cut")["m.up.zeros"], tensors["m.up.zeros"])


def test_a_published_folder_is_cut_into_ours(tmp_path):
    published = {"quant_method": "matgptq_quant", "group_size": 32, "master_bitwidth": 8, "inference_bitwidth": 4}
    folder = write_folder(tmp_path / "model", healthy(), published)
    slice_folder(folder, tmp_path / "cut", 3)
    values = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert values["model_type"] == "llama"
    assert values["quantization_config"] == QuantConfig(bits=3, group_size=32, modules_to_not_convert=()).to_dict()


@pytest.mark.parametrize(
    ("stored", "asked", "widths"),
    [
        ({}, {"*.up": 3}, {"m.up": 3, "m.down": 6}),
        ({}, {}, {"m.up": 6, "m.down": 6}),
        ({"m.up": 4}, {"*": 2}, {"m.up": 2, "m.down": 2}),  # what is asked now goes before the layer's old entry
        ({"m.up": 4, "*": 5}, {"m.down": 2}, {"m.up": 4, "m.down": 2}),
        ({"*.down": 4}, {"*.up": 8}, {"m.up": 8, "m.down": 4}),
    ],
)
def test_a_map_cuts_the_layers_that_it_names_and_leaves_the_others_their_width(tmp_path, stored, asked, widths):
    tensors = healthy()
    folder = write_folder(tmp_path / "model", tensors, config_values(bits=6, bits_per_layer=stored))
    slice_folder(folder, tmp_path / "cut", asked)
    assert stored_bits(tmp_path / "cut") == widths
    cut = read_tensors(tmp_path / "cut")
    for name, bits in widths.items():
        assert torch.equal(cut[f"{name}.qweight"], planes_of(tensors[f"{name}.qweight"], bits, "round"))


def test_shards_and_their_index_are_kept(tmp_path):
    folder = write_folder(tmp_path / "model", healthy(), config_values(), shards=2)
    slice_folder(folder, tmp_path / "cut", 4)
    index = json.loads((tmp_path / "cut" / INDEX).read_text())
    assert index["weight_map"] == json.loads((folder / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(tmp_path / "cut").values())
    assert stored_bits(tmp_path / "cut") == {"m.up": 4, "m.down": 4}


@pytest.mark.parametrize(
    ("rule", "bits", "kept"),
    [
        ("round", 4, {"scales": "scales_4"}),  # a cut that serves one width calls its one set of scales "scales"
        ("round", 3, {"scales": "scales_3"}),
        ("round", 5, {"scales": "scales"}),
        ("round", 8, {"scales": "scales", "scales_3": "scales_3", "scales_4": "scales_4", "scales_6": "scales_6"}),
        ("prefix", 4, {"scales": "scales", "scales_3": "scales_3", "scales_4": "scales_4"}),
        ("prefix", 2, {"scales": "scales"}),
    ],
)
def test_a_cut_keeps_the_scales_of_the_widths_that_it_serves(tmp_path, rule, bits, kept):
    tensors = layer_tensors("m.up", own=(3, 4, 6))
    folder = write_folder(tmp_path / "model", tensors, config_values(slicing=rule))
    slice_folder(folder, tmp_path / "cut", bits)
    cut = read_tensors(tmp_path / "cut")
    assert {name for name in cut if "scales" in name} == {f"m.up.{new}" for new in kept}
    for new, old in kept.items():
        assert torch.equal(cut[f"m.up.{new}"], tensors[f"m.up.{old}"])


@pytest.mark.parametrize("rule", RULES)
def test_bytes_foretold_are_bytes_written(tmp_path, rule):
    tensors = layer_tensors("m.up", own=(3, 4), perm=True, bias=True)
    folder = write_folder(tmp_path / "model", tensors, config_values(slicing=rule))
    config, layers, headers = check_folder(folder)
    for bits in range(2, 9):
        slice_folder(folder, tmp_path / str(bits), bits)
        written = sum(t.nbytes for t in read_tensors(tmp_path / str(bits)).values())
        assert layers["m.up"].nbytes_at(bits, config, headers) == written


@pytest.mark.parametrize(("rule", "first"), [("prefix", 8), ("prefix", 5), ("round", 8)])
def test_a_cut_that_holds_a_narrower_one_can_be_cut_to_it(tmp_path, rule, first):
    folder = write_folder(tmp_path / "model", healthy(), config_values(slicing=rule))
    slice_folder(folder, tmp_path / "first", first)
    for bits in range(2, first + 1):
        slice_folder(tmp_path / "first", tmp_path / f"twice-{bits}", bits)
        slice_folder(folder, tmp_path / f"once-{bits}", bits)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / f"twice-{bits}" / file).read_bytes() == (tmp_path / f"once-{bits}" / file).read_bytes()


def test_a_rounded_cut_cannot_be_cut_further(tmp_path):
    folder = write_folder(tmp_path / "model", healthy(), config_values())
    slice_folder(folder, tmp_path / "four", 4)
    message = "bits must be 4: a slice cut by the rule 'round' serves its own width only, got 3 (m.down)"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        slice_folder(tmp_path / "four", tmp_path / "three", 3)
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (9, "bits must be an integer from 2 to 8, got 9"),
        ({"m.up": 9}, "bits_per_layer must be an integer from 2 to 8, got 9 (m.up)"),
        ({"m.gate": 4}, "bits_per_layer must name quantised layers, got 'm.gate'"),
    ],
)
def test_a_wrong_width_is_refused(tmp_path, bits, message):
    folder = write_folder(tmp_path / "model", healthy(), config_values())
    with pytest.raises(ValueError, match=re.escape(message)):
        slice_folder(folder, tmp_path / "cut", bits)
    assert list(tmp_path.iterdir()) == [folder]


def test_codes_above_the_master_width_are_refused_by_file_and_tensor(tmp_path):
    tensors = layer_tensors("m.up", top=16)
    tensors["m.up.qweight"][2, 3] = 16
    folder = write_folder(tmp_path / "model", tensors, config_values(master_bits=4, bits=4))
    message = f"{folder}/model.safetensors: m.up.qweight must hold codes below 16, got 16"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        slice_folder(folder, tmp_path / "cut", 3)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("there", ["file", "full folder"])
def test_what_is_there_already_is_not_written_over_and_no_work_is_done(tmp_path, monkeypatch, there):
    monkeypatch.setattr(writing, "save_file", lambda *_, **__: pytest.fail("began to write"))
    folder, out = write_folder(tmp_path / "model", healthy(), config_values()), tmp_path / "cut"
    if there == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match=re.escape(f"out must be a new or an empty folder, got {out}")):
        slice_folder(folder, out, 4)
    assert (out if there == "file" else out / "mine").read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [out, folder]


def test_an_empty_folder_is_filled(tmp_path):
    folder = write_folder(tmp_path / "model", healthy(), config_values())
    (tmp_path / "cut").mkdir()
    slice_folder(folder, tmp_path / "cut", 4)
    assert stored_bits(tmp_path / "cut") == {"m.up": 4, "m.down": 4}


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    folder = write_folder(tmp_path / "model", healthy(), config_values())
    (tmp_path / "there").mkdir()
    (tmp_path / "cut").symlink_to(tmp_path / "there")
    slice_folder(folder, tmp_path / "cut", 4)
    assert (tmp_path / "cut").is_symlink()
    assert stored_bits(tmp_path / "there") == {"m.up": 4, "m.down": 4}


@pytest.mark.parametrize(("out", "kind"), [(".", "the working folder"), ("mounted", "a mount point")])
def test_a_folder_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch, out, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda path: path.name == "mounted")
    with pytest.raises(FileExistsError, match=f"out must be a folder that can be replaced, got {kind}"):
        writing.check_new(out)


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path):
    folder = write_folder(tmp_path / "model", healthy(), config_values())
    (folder / "config.json").chmod(0o600)
    before = os.umask(0o027)
    slice_folder(folder, tmp_path / "cut", 4)
    os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "cut", *(tmp_path / "cut").iterdir())}
    assert modes == {"cut": 0o750, "model.safetensors": 0o640, "config.json": 0o640}


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_cut_that_fails_half_way_leaves_nothing_and_tells_the_cause(tmp_path, monkeypatch, error):
    folder = write_folder(tmp_path / "model", healthy(), config_values(), shards=2)
    save, calls = writing.save_file, []

    def fail_at_the_second_file(tensors, path, **options):
        calls.append(path)
        if len(calls) == 2:
            raise error
        save(tensors, path, **options)

    monkeypatch.setattr(writing, "save_file", fail_at_the_second_file)
    with pytest.raises(type(error)) as caught:
        slice_folder(folder, tmp_path / "cut", 4)
    assert caught.value is error  # not a complaint about the source
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == [folder]


def test_the_source_is_left_as_it_was(tmp_path):
    folder = write_folder(tmp_path / "model", healthy(), config_values(), shards=2)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    slice_folder(folder, tmp_path / "cut", {"*": 2})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
