"""Folders of random contents load, serve every width, and have the geometry that was asked for."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import matgptq
from matgptq.checkpoint import check_folder
from matgptq.cli import main
from matgptq.dummy import ARCHITECTURES, write_dummy

ALL = (2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize(("sym", "stored_bits", "widths"), [(True, None, ALL), (True, 3, (3,)), (False, None, ALL)])
def test_a_dummy_loads_and_answers(tiny_folder, tmp_path, sym, stored_bits, widths):
    config = matgptq.QuantConfig(bits=4, group_size=16, sym=sym)
    written = write_dummy(tiny_folder, tmp_path / "dummy", quantization=config, stored_bits=stored_bits)
    check_folder(tmp_path / "dummy")
    model = matgptq.load(tmp_path / "dummy", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    layers = matgptq.quantized_layers(model)
    assert set(layers) == {n for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert {layer.widths for layer in layers.values()} == {widths}
    assert {layer.bits for layer in layers.values()} == {written.bits}
    logits = model(torch.arange(3, 20).view(1, -1)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
    first = next(iter(layers.values()))
    weight = matgptq.linear(
        torch.eye(first.in_features), first.qweight, first.served_scales, first.zeros, bits=first.bits, group_size=16
    )
    deviation = model.config.initializer_range
    assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert abs(weight.mean().item()) < (0.3 if first.zeros is not None else 0.1) * deviation


def test_the_same_seed_gives_the_same_bytes(tiny_folder, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_dummy(tiny_folder, tmp_path / name, quantization=matgptq.QuantConfig(group_size=16), seed=seed)
    a, b, c = ((tmp_path / name / "model-00001.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_dense_dummy_is_not_quantised(tiny_folder, tmp_path):
    assert write_dummy(tiny_folder, tmp_path / "dense") is None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not matgptq.quantized_layers(model)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_known_geometries(arch, tmp_path):
    write_dummy(arch, tmp_path / "dummy", quantization=matgptq.QuantConfig(bits=3, group_size=64), config_only=True)
    assert [file.name for file in (tmp_path / "dummy").iterdir()] == ["config.json"]
    values = json.loads((tmp_path / "dummy" / "config.json").read_text())
    assert values["quantization_config"]["bits"] == 3
    assert values["architectures"][0].endswith("ForCausalLM")
    config = AutoConfig.from_pretrained(tmp_path / "dummy")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    size = arch.rpartition("-")[2]
    want = float(size[:-1]) * {"b": 1e9, "m": 1e6}[size[-1]]
    assert abs(count / want - 1) < 0.25, count


def test_command_line(tiny_folder, tmp_path, capsys):
    argv = ["dummy", "--arch", str(tiny_folder), "--out", str(tmp_path / "d"), "--bits", "3", "--group-size", "16"]
    assert main([*argv, "--packed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] > 0
    assert main(argv) == 2
    assert "out must be a new or an empty folder" in capsys.readouterr().err
    fine = ["dummy", "--arch", "smollm2-135m", "--out", str(tmp_path / "f"), "--config-only"]
    assert main(fine) == 2  # groups of 128
    assert (
        "group_size must divide in_features = 576, got 128 (model.layers.0.self_attn.q_proj)" in capsys.readouterr().err
    )
    assert main([*fine, "--dense", "--asym"]) == 2
    assert "dense must not go with packed or asym" in capsys.readouterr().err
    assert main(["dummy", "--arch", "gpt-9", "--out", str(tmp_path / "e")]) == 2
    assert "arch must be a folder with a config.json, or one of llama-3.2-1b" in capsys.readouterr().err
