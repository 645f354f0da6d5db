"""The published quantiser's raw output: what is read, what is refused, and the folder that it becomes."""

import os
import pickle
import re

import pytest
import torch
from folders import read_tensors

import matgptq
from matgptq import CheckpointError, convert, dequantize, hf, quantized_layers
from matgptq.checkpoint import check_folder
from matgptq.export import read_raw

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
SHAPES = {UP: (96, 64), DOWN: (64, 96)}
GROUP = 32


def raw_layer(name, seed=0, zero=None, perm=False):
    """What data.pt of a layer holds; ``zero``: None, "middle" or "random"."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = SHAPES[name]
    scale = (torch.rand(rows, columns // GROUP, generator=random) * 0.01 + 0.001).half()
    zeros = {
        None: None,
        "middle": torch.full_like(scale, 128),
        "random": torch.randint(64, 192, scale.shape, generator=random).half() + 0.5,
    }
    return {
        "qweight": torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=random),
        "scale": scale,
        "zero": zeros[zero],
        "perm": torch.randperm(columns, generator=random) if perm else None,
    }


def write_raw(folder, layers):
    for name, values in layers.items():
        (folder / name).mkdir(parents=True)
        torch.save(values, folder / name / "data.pt")
    return folder


def test_layers_are_read_by_folder_name(tmp_path):
    layers = {UP: raw_layer(UP, zero="random", perm=True), DOWN: raw_layer(DOWN)}
    got = read_raw(write_raw(tmp_path, layers))
    assert got.keys() == layers.keys()
    for name, values in layers.items():
        assert torch.equal(got[name].codes, values["qweight"])
        assert torch.equal(got[name].scales, values["scale"])
    assert torch.equal(got[UP].zeros, layers[UP]["zero"])
    assert torch.equal(got[UP].perm.long(), layers[UP]["perm"])
    assert got[DOWN].zeros is None
    assert got[DOWN].perm is None


GOOD = raw_layer(UP)
BAD_RAW = {
    "a list": ([1, 2], "file must hold qweight and scale, got list"),
    "a tensor": (torch.zeros(2), "file must hold qweight and scale, got Tensor"),
    "no scale": ({"qweight": GOOD["qweight"]}, "file must hold qweight and scale, got ['qweight']"),
    "qweight is None": (GOOD | {"qweight": None}, "qweight must have two dimensions, got None"),
    "qweight is a list": (GOOD | {"qweight": [1]}, "qweight must be torch.uint8, got list"),
    "qweight of another type": (
        GOOD | {"qweight": GOOD["qweight"].int()},
        "qweight must be torch.uint8, got torch.int32",
    ),
    "qweight of one dimension": (
        GOOD | {"qweight": GOOD["qweight"][0]},
        "qweight must have two dimensions, got torch.Size([64])",
    ),
    "scale of another type": (
        GOOD | {"scale": GOOD["scale"].int()},
        "scale must be torch.float16 or torch.bfloat16 or torch.float32, got torch.int32",
    ),
    "scale of other rows": (
        GOOD | {"scale": GOOD["scale"][:5]},
        "scale must have shape (96, groups of a multiple of 16 that make up 64), got (5, 2)",
    ),
    "scale of one dimension": (
        GOOD | {"scale": GOOD["scale"][0]},
        "scale must have shape (96, groups of a multiple of 16 that make up 64), got (2,)",
    ),
    "no groups": (
        GOOD | {"scale": GOOD["scale"][:, :0]},
        "scale must have shape (96, groups of a multiple of 16 that make up 64), got (96, 0)",
    ),
    "groups that do not divide": (
        GOOD | {"scale": torch.ones(96, 3)},
        "scale must have shape (96, groups of a multiple of 16 that make up 64), got (96, 3)",
    ),
    "groups of 8": (
        GOOD | {"scale": torch.ones(96, 8)},
        "scale must have shape (96, groups of a multiple of 16 that make up 64), got (96, 8)",
    ),
    "zero of another shape": (GOOD | {"zero": torch.ones(96, 1)}, "zero must have shape (96, 2), got (96, 1)"),
    "zero of another type": (
        GOOD | {"zero": torch.ones(96, 2).int()},
        "zero must be torch.uint8 or torch.float16 or torch.bfloat16 or torch.float32, got torch.int32",
    ),
    "perm of another shape": (GOOD | {"perm": torch.arange(96)}, "perm must have shape (64,), got (96,)"),
    "perm of another type": (
        GOOD | {"perm": torch.zeros(64)},
        "perm must be torch.int32 or torch.int64, got torch.float32",
    ),
}


@pytest.mark.parametrize(("values", "message"), BAD_RAW.values(), ids=BAD_RAW)
def test_a_wrong_raw_file_is_refused_by_file_key_rule_and_value(tmp_path, values, message):
    write_raw(tmp_path, {UP: values})
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{tmp_path}/{UP}/data.pt: {message}')}$"):
        read_raw(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not a pickle"])
def test_a_raw_file_that_is_no_archive_is_refused_by_name(tmp_path, content):
    (tmp_path / UP).mkdir()
    (tmp_path / UP / "data.pt").write_bytes(content)
    message = f"{tmp_path}/{UP}/data.pt: file must be a readable data.pt of tensors, got "
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}"):
        read_raw(tmp_path)


class Unsafe:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_raw_file_is_refused_and_not_run(tmp_path, writer):
    (tmp_path / UP).mkdir()
    writer({"qweight": Unsafe(f"touch {tmp_path}/ran")}, tmp_path / UP / "data.pt")
    message = f"{tmp_path}/{UP}/data.pt: file must be a readable data.pt of tensors, got "
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}"):
        read_raw(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_raw_files_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    message = f"{tmp_path / name}: folder must hold <layer name>/data.pt, got none"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        read_raw(tmp_path / name)


def test_a_converted_folder_holds_the_raw_tensors_and_widths(tmp_path, tiny_folder):
    layers = {UP: raw_layer(UP, zero="random", perm=True), DOWN: raw_layer(DOWN, seed=1)}
    raw = write_raw(tmp_path / "raw", layers)
    (tmp_path / "widths.txt").write_text(f"{DOWN}: 3\n")
    config = convert(raw, tiny_folder, tmp_path / "out", bits=4, widths=tmp_path / "widths.txt")
    assert (config.bits, config.group_size, config.sym, config.slicing) == (4, GROUP, False, "round")
    assert dict(config.bits_per_layer) == {DOWN: 3}
    assert "lm_head" in config.modules_to_not_convert
    read, stored, _ = check_folder(tmp_path / "out")
    assert read == config
    assert stored.keys() == layers.keys()
    tensors, dense = read_tensors(tmp_path / "out"), read_tensors(tiny_folder)
    for name, values in layers.items():
        assert torch.equal(tensors[f"{name}.qweight"], values["qweight"])
        assert torch.equal(tensors[f"{name}.scales"], values["scale"])
    assert torch.equal(tensors[f"{UP}.zeros"], layers[UP]["zero"])
    assert (tensors[f"{DOWN}.zeros"] == 128).all()  # it has none, and the other layer makes the folder asymmetric
    assert torch.equal(tensors[f"{UP}.perm"].long(), layers[UP]["perm"])
    assert f"{DOWN}.perm" not in tensors
    kept = [name for name in dense if name.removesuffix(".weight") not in layers]
    assert len(kept) == len(dense) - 2
    for name in kept:
        assert torch.equal(tensors[name], dense[name])
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_folder_loads_and_computes_with_the_raw_weights(tmp_path, tiny_folder, dtype):
    layers = {UP: raw_layer(UP, zero="random", perm=True), DOWN: raw_layer(DOWN, seed=1)}
    convert(write_raw(tmp_path / "raw", layers), tiny_folder, tmp_path / "out", bits=4)
    model = matgptq.load(tmp_path / "out", dtype=dtype)
    loaded = quantized_layers(model)
    assert loaded.keys() == layers.keys()
    for name, values in layers.items():
        columns = SHAPES[name][1]
        weights = dequantize(values["qweight"], values["scale"], values["zero"], bits=4, group_size=GROUP)
        order = torch.arange(columns) if values["perm"] is None else values["perm"]
        assert torch.equal(loaded[name](torch.eye(columns)).t()[:, order], weights)


def test_a_raw_output_layer_unties_the_embeddings(tmp_path, tiny_folder):
    layer = {"qweight": torch.full((300, 64), 130, dtype=torch.uint8), "scale": torch.ones(300, 2).half()}
    convert(write_raw(tmp_path / "raw", {"lm_head": layer}), tiny_folder, tmp_path / "out")
    model = matgptq.load(tmp_path / "out")
    assert (model.lm_head(torch.eye(64)) == 2).all()
    assert torch.equal(model.model.embed_tokens.weight, read_tensors(tiny_folder)["model.embed_tokens.weight"])


def test_a_folder_that_could_not_be_loaded_is_not_left_behind(tmp_path, tiny_folder, monkeypatch):
    raw = write_raw(tmp_path / "raw", {UP: GOOD})
    monkeypatch.setattr(hf, "insert_layers", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="model must load with its linear layers quantised, got ZeroDivisionError: "):
        convert(raw, tiny_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [raw]


def test_zeros_at_the_middle_code_are_none(tmp_path, tiny_folder):
    raw = write_raw(tmp_path / "raw", {UP: raw_layer(UP, zero="middle"), DOWN: raw_layer(DOWN)})
    assert convert(raw, tiny_folder, tmp_path / "out").sym
    assert not any(name.endswith(".zeros") for name in read_tensors(tmp_path / "out"))


def test_one_group_a_row_is_written_as_such(tmp_path, tiny_folder):
    layers = {name: raw_layer(name) for name in SHAPES}
    for values in layers.values():
        values["scale"] = values["scale"][:, :1].clone()
    config = convert(write_raw(tmp_path / "raw", layers), tiny_folder, tmp_path / "out")
    assert config.group_size == -1
    assert check_folder(tmp_path / "out")[0] == config


ODD = "model.layers.0.mlp.up"
BAD_LAYERS = {
    "no such layer": (
        {ODD: GOOD},
        "",
        "{raw}/" + ODD + ": folder must be named after a linear layer of {model}, got " + ODD,
    ),
    "another shape": (
        {DOWN: GOOD},
        "",
        "{raw}/" + DOWN + "/data.pt: qweight must have shape (64, 96), got (96, 64)",
    ),
    "two group sizes": (
        {UP: GOOD, DOWN: raw_layer(DOWN) | {"scale": torch.ones(64, 2)}},
        "",
        "{raw}: scale must have one group size for all layers, got [32, 48]",
    ),
    "NaN scale": (
        {UP: GOOD | {"scale": GOOD["scale"] * float("nan")}},
        "",
        "{raw}/" + UP + "/data.pt: " + UP + ".scales must be finite, got a NaN or an infinity",
    ),
    "a column twice": (
        {UP: GOOD | {"perm": torch.zeros(64, dtype=torch.int64)}},
        "",
        "{raw}/" + UP + "/data.pt: " + UP + ".perm must be a permutation of 0 to 63, got repeated or missing columns",
    ),
    "a width for another layer": (
        {UP: GOOD},
        DOWN + ": 4",
        "{widths}: lines must name layers of {raw}, got '" + DOWN + "'",
    ),
    "a width out of range": ({UP: GOOD}, UP + ": 12", "{widths}, line 1: bits must be an integer from 2 to 8, got 12"),
}


@pytest.mark.parametrize(("layers", "widths", "message"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_raw_layers_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, tiny_folder, layers, widths, message):
    raw, file = write_raw(tmp_path / "raw", layers), tmp_path / "widths.txt"
    file.write_text(widths)
    message = message.format(raw=raw, model=tiny_folder, widths=file)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convert(raw, tiny_folder, tmp_path / "out", widths=file)
    assert sorted(tmp_path.iterdir()) == [raw, file]


def test_codes_above_the_master_width_are_refused(tmp_path, tiny_folder):
    raw = write_raw(tmp_path / "raw", {UP: GOOD})
    with pytest.raises(CheckpointError, match=re.escape(f"{UP}.qweight must hold codes below 16, got 255")):
        convert(raw, tiny_folder, tmp_path / "out", bits=4, master_bits=4)


def test_a_folder_that_is_there_is_not_written_over(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match=re.escape(f"out must be a new or an empty folder, got {out}")):
        convert(tmp_path / "raw", "nowhere", out)  # found before anything is read
    assert (out / "mine").read_text() == "mine"
