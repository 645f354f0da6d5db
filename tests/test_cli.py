"""The command line, run as a user runs it: in a process of its own, its last line read as JSON."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from matgptq import folder, slice_folder
from matgptq.cli import main

COMMON = ["--group-size", "16", "--samples", "4", "--sequence-length", "32", "--quiet"]


SIZES = ["--tokens", "128", "--sequence-length", "32", "--quiet", "--json"]


@pytest.fixture(scope="module")
def nested(tiny_folder, tmp_path_factory):
    """A tiny model quantised by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "text.txt"
    text.write_text("The river runs from the hills to the sea, and the town stands where it turns. " * 40)
    assert (
        main(["quantize", str(tiny_folder), "--out", str(folder / "nested"), "--calibration", str(text), *COMMON]) == 0
    )
    return folder / "nested"


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_it_runs_as_a_module_and_says_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "matgptq.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("matgptq 0.")


@pytest.mark.parametrize("command", ["quantize", "slice", "convert", "generate", "eval", "info", "bench"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "--json" in capsys.readouterr().out


def test_info_tells_what_each_width_weighs(nested, tmp_path, capsys):
    assert main(["info", str(nested), "--json"]) == 0
    told = last_line(capsys)
    assert told["quantized_layers"] == 14
    assert told["bits"] == {"8": 14}
    for bits in (2, 4, 8):
        assert main(["slice", str(nested), "--bits", str(bits), "--out", str(tmp_path / str(bits)), "--json"]) == 0
        header = 8 + int.from_bytes((tmp_path / str(bits) / "model.safetensors").read_bytes()[:8], "little")
        assert last_line(capsys)["bytes"] == told["bytes_by_width"][str(bits)] + header


def test_info_is_readable(nested, capsys):
    assert main(["info", str(nested), "--layers"]) == 0
    shown = capsys.readouterr().out
    assert "cut to 4 bits" in shown
    assert "model.layers.1.mlp.down_proj  64 x 96  8 of 8 bits" in shown


def test_slice_by_a_file_of_widths(nested, tmp_path, capsys):
    widths = tmp_path / "widths.txt"
    widths.write_text("# a layer of its own\nmodel.layers.0.mlp.up_proj: 3\n")
    assert main(["slice", str(nested), "--bits-file", str(widths), "--out", str(tmp_path / "out"), "--json"]) == 0
    assert main(["info", str(tmp_path / "out"), "--json"]) == 0
    assert last_line(capsys)["bits"] == {"8": 13, "3": 1}


def test_generate_gives_the_same_answer_every_time(nested, capsys):
    answers = []
    for _ in range(2):
        assert (
            main(["generate", str(nested), "--prompt", "The mill", "--bits", "4", "--max-new-tokens", "5", "--json"])
            == 0
        )
        answers.append(last_line(capsys)["answer"])
    assert answers[0] == answers[1]


def test_eval_measures_every_width_and_draws_it(nested, tiny_folder, text_file, tmp_path, capsys):
    plot = tmp_path / "plot.svg"
    options = ["--bits", "8", "2", "--dense", str(tiny_folder), "--plot", str(plot)]
    assert main(["eval", str(nested), "--text", str(text_file), *SIZES, *options]) == 0
    told = last_line(capsys)
    assert set(told["widths"]) == {"8", "2"}
    assert told["widths"]["8"]["perplexity"] == pytest.approx(told["dense_perplexity"], rel=0.05)
    assert told["widths"]["2"]["bytes"] < told["widths"]["8"]["bytes"] < told["dense_bytes"]
    assert "<svg" in plot.read_text()


def test_eval_takes_the_widths_that_a_cut_folder_serves(nested, text_file, tmp_path, capsys):
    slice_folder(nested, tmp_path / "cut", 4)
    assert main(["eval", str(tmp_path / "cut"), "--text", str(text_file), *SIZES]) == 0
    assert set(last_line(capsys)["widths"]) == {"4"}


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1000.0])
def test_a_perplexity_that_is_no_number_is_null(loss, nested, text_file, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *_, **__: torch.tensor(loss * 128))
    assert main(["eval", str(nested), "--bits", "8", "--text", str(text_file), *SIZES]) == 0
    assert last_line(capsys)["widths"]["8"]["perplexity"] is None


def test_a_full_disk_is_an_error_of_one_line(nested, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(folder, "save_file", full)
    assert main(["slice", str(nested), "--bits", "4", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == "matgptq slice: error: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "nowhere/config.json: file must be there, got none"),
        (["slice", "{nested}", "--bits", "9", "--out", "{tmp}/x"], "bits must be an integer from 2 to 8, got 9"),
        (["slice", "{nested}", "--bits", "4", "--out", "{nested}"], "out must be a new or an empty folder"),
        (["generate", "{nested}", "--prompt", "x", "--bits", "1"], "got 1"),
        (["generate", "{nested}", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be positive, got"),
        (
            ["generate", "{dense}", "--prompt", "x"],
            "model must have a quantization_config in its config.json, got none",
        ),
        (["generate", "{nested}", "--prompt", "x", "--device", "nope"], "--device must be one of torch's, such as"),
        (["generate", "nowhere", "--prompt", "x", "--device", "mps"], "--device must be there, got mps, and"),
        (["eval", "{nested}", "--text", "nowhere.txt"], "nowhere.txt"),
        (["eval", "{nested}", "--text", "{text}", "--tokens", "100"], "tokens must be a positive multiple of"),
        (["eval", "{nested}", "--text", "{text}", "--tokens", "1024000"], "tokens must be at most"),
        (["eval", "{nested}", "--text", "{text}", *SIZES, "--bits", "9"], "--bits must be among what all layers of"),
        (["eval", "{nested}", "--text", "{text}", *SIZES, "--plot", "x.y"], "plot must end in one of"),
        (["eval", "{nested}", "--text", "{text}", *SIZES, "--batch-size", "0"], "batch_size must be positive, got 0"),
        (["eval", "{nested}", "--text", "{nested}/model.safetensors", *SIZES], "model.safetensors: file must be UTF-8"),
        (["quantize", "{dense}", "--out", "{tmp}/x", "--method", "gptq"], "--method gptq needs --bits"),
        (["quantize", "{dense}", "--out", "{tmp}/x"], "calibration must name a text"),
        (["quantize", "{dense}", "--out", "{tmp}/x", "--method", "rtn", "--lambdas", "1"], "--lambdas goes with"),
        (["quantize", "{dense}", "--out", "{tmp}/x", "--method", "rtn", "--widths", "4"], "--widths goes with"),
        (
            ["quantize", "{dense}", "--out", "{tmp}/x", "--method", "rtn", "--own-scales", "4"],
            "with own_scales, got None",
        ),
        (["convert", "{tmp}", "--model", "{dense}", "--out", "{tmp}/x"], "folder must hold <layer name>/data.pt"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, nested, tiny_folder, text_file, tmp_path, capsys):
    places = {"nested": nested, "dense": tiny_folder, "text": text_file, "tmp": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith(f"matgptq {arguments[0]}: error: ")
    assert message in shown
