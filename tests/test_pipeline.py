"""Quantising whole (tiny) models: what is written, interrupted runs, patterns, other architectures, two processes."""

import fcntl
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.falcon.modeling_falcon import FalconLinear

import matgptq
from matgptq.hf import is_linear
from matgptq.quantizer import pipeline
from matgptq.quantizer.hessian import HessianHooks
from matgptq.quantizer.pipeline import quantize
from matgptq.quantizer.stages import BlockRunner, find_blocks, find_stages

METHOD = matgptq.Method(group_size=16)
ROUNDED = matgptq.Method(group_size=16, feedback=False)
SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
TOKENS = {"samples": 4, "sequence_length": 32, "progress": False}


def run(model, out, text, method=METHOD, **options):
    return quantize(model, out, method, calibration=text, **{**TOKENS, **options})


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def save(model, folder):
    model.half().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def qwen2():
    return Qwen2ForCausalLM(
        Qwen2Config(
            **GROUPED,
            tie_word_embeddings=False,
        )
    )


def opt():
    return OPTForCausalLM(
        OPTConfig(
            **SIZES,
            ffn_dim=96,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
        )
    )


def gemma3():
    """Blocks of two masks and two ropes: a window of 8 tokens, and all of them."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **GROUPED,
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            initializer_range=0.3,
        )
    )


def test_every_linear_layer_of_the_blocks_is_quantised(tiny_folder, text_file, tmp_path):
    report = run(tiny_folder, tmp_path / "out", text_file)
    layers = matgptq.quantized_layers(matgptq.load(tmp_path / "out"))
    assert len(layers) == 2 * 7
    assert set(layers) == set(report.errors)
    assert all(errors[4] < errors[3] < errors[2] < 0.6 and errors[8] < 0.1 for errors in report.errors.values())
    assert not (tmp_path / "out.partial").exists()


def test_weights_are_close_to_the_dense_ones(tiny_folder, text_file, tmp_path):
    run(tiny_folder, tmp_path / "out", text_file, matgptq.Method(widths=(8,), group_size=16))
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    ids = torch.arange(3, 35).view(1, -1)
    want = dense(ids).logits
    got = matgptq.load(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert (got - want).norm() < 0.02 * want.norm()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tiny_folder, text_file, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tiny_folder, tmp_path / name, text_file, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["model.safetensors"] != contents(tmp_path / "c")["model.safetensors"]


@pytest.fixture
def unfinished(tiny_folder, text_file, tmp_path, monkeypatch):
    """What a run that was stopped in its second block has left; the model is ``dense`` beside it."""

    def stop_in_the_second(weight, *args, where, **kwargs):
        if "layers.1" in where:
            raise KeyboardInterrupt
        return matgptq.quantizer.quantize_weight(weight, *args, where=where, **kwargs)

    shutil.copytree(tiny_folder, tmp_path / "dense")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_weight", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "dense", tmp_path / "out", text_file)
    assert not (tmp_path / "out").exists()
    return tmp_path / "out.partial"


@pytest.mark.parametrize("size", [None, 0, 1000], ids=["whole", "empty", "truncated"])
def test_an_interrupted_run_goes_on_after_its_last_finished_block(unfinished, size, text_file, tmp_path, monkeypatch):
    if size is not None:
        os.truncate(unfinished / "stage-0000.safetensors", size)
    done = []

    def watched(weight, *args, where, **kwargs):
        done.append(where)
        return matgptq.quantizer.quantize_weight(weight, *args, where=where, **kwargs)

    monkeypatch.setattr(pipeline, "quantize_weight", watched)
    report = run(tmp_path / "dense", tmp_path / "out", text_file)
    assert len(done) == (7 if size is None else 14)
    assert all("layers.1" in name for name in done[-7:])
    assert report.errors == run(tmp_path / "dense", tmp_path / "again", text_file).errors
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_an_unfinished_run_with_other_arguments_is_not_mixed_in(unfinished, text_file, tmp_path):
    os.utime(tmp_path / "dense" / "model.safetensors")
    message = r"unfinished run with other arguments: .*out.partial differs in method, config, weight files; remove it"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "dense", tmp_path / "out", text_file, matgptq.Method(group_size=32))
    (unfinished / "arguments.json").write_text("")
    with pytest.raises(ValueError, match=r"out.partial/arguments.json: file must be JSON"):
        run(tmp_path / "dense", tmp_path / "out", text_file)


def test_a_run_without_a_finished_block_does_not_stand_in_the_way(unfinished, tmp_path):
    (unfinished / "stage-0000.safetensors").unlink()
    (unfinished / "arguments.json").write_text("")
    quantize(tmp_path / "dense", tmp_path / "out", ROUNDED, progress=False)
    assert not unfinished.exists()


def test_two_runs_do_not_share_a_folder(unfinished, text_file, tmp_path):
    with (unfinished / "matgptq.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match=r"out must not be written by another run, got one that holds .*lock"):
            run(tmp_path / "dense", tmp_path / "out", text_file)
    run(tmp_path / "dense", tmp_path / "out", text_file)


def test_a_folder_of_something_else_is_not_taken_for_an_unfinished_run(tiny_folder, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(FileExistsError, match=r"out must leave .*out.partial to the unfinished run"):
        quantize(tiny_folder, tmp_path / "out", ROUNDED, progress=False)
    assert (tmp_path / "out.partial" / "mine").exists()


def test_two_processes_give_the_codes_of_one(tiny_folder, text_file, tmp_path):
    arguments = ["matgptq.cli", "quantize", str(tiny_folder), "--calibration", str(text_file), "--group-size", "16"]
    arguments += ["--samples", "6", "--sequence-length", "32", "--device", "cpu", "--quiet", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [sys.executable, "-m", *arguments, str(tmp_path / "one")]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments]
    subprocess.run(one, check=True, env=environment)
    subprocess.run([*two, str(tmp_path / "two")], check=True, env=environment)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_round_to_nearest_needs_no_text(tiny_folder, tmp_path):
    quantize(tiny_folder, tmp_path / "out", ROUNDED, progress=False)
    assert matgptq.load(tmp_path / "out", bits=4)


def test_plain_gptq_stores_its_own_width_only(tiny_folder, text_file, tmp_path):
    run(tiny_folder, tmp_path / "out", text_file, matgptq.Method(widths=(3,), master_bits=3, group_size=16))
    layer = next(iter(matgptq.quantized_layers(matgptq.load(tmp_path / "out")).values()))
    assert layer.bits == layer.master_bits == 3
    assert layer.qweight.max() < 8
    with pytest.raises(ValueError, match="bits must be at most 3, the stored width, got 4"):
        layer.bits = 4


def test_the_output_layer_on_request_unties_the_embeddings(tiny_folder, text_file, tmp_path):
    report = run(tiny_folder, tmp_path / "out", text_file, lm_head=True)
    assert report.errors["lm_head"][8] < 0.05
    model = matgptq.load(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert isinstance(model.lm_head, matgptq.MatGPTQLinear)
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "build", [lambda: tiny_model(tie_word_embeddings=False), opt, gemma3], ids=["llama", "opt", "gemma3"]
)
def test_the_output_layer_is_calibrated_on_what_reaches_it(build, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    tokens = torch.randint(3, 300, (6, 16))
    head = model.get_output_embeddings()
    seen = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(tokens)
    handle.remove()
    (x,) = (part.flatten(0, 1) for part in seen)
    stages = find_stages(model, ["*"], [], lm_head=True)
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        runner = BlockRunner(model, stages, tokens, 2, torch.device("cpu"))
        for stage in stages[:-1]:
            runner.run(stage)
        with HessianHooks(stages[-1].linears) as hooks:
            runner.run(stages[-1])
    (name,) = stages[-1].linears
    torch.testing.assert_close(hooks.hessian(name), 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in model.named_modules()] == names


def test_patterns_choose_layers(tiny_folder, text_file, tmp_path):
    run(tiny_folder, tmp_path / "out", text_file, include=["*.mlp.*", "q_proj"], exclude=["down_proj"])
    model = matgptq.load(tmp_path / "out")
    names = {name.rpartition(".")[2] for name in matgptq.quantized_layers(model)}
    assert names == {"gate_proj", "up_proj", "q_proj"}
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)


@pytest.mark.parametrize("build", [qwen2, opt])
@pytest.mark.parametrize(
    "method",
    [
        matgptq.Method(group_size=32, act_order=True, sym=False),
        matgptq.Method(group_size=-1, rule="prefix", widths=(4, 8)),
    ],
    ids=["act-order-asym", "prefix-rows"],
)
def test_other_decoders_with_biases(build, method, text_file, tmp_path):
    torch.manual_seed(0)
    folder = save(build().eval(), tmp_path / "dense")
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for module in dense.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_()
        save(dense, folder)
        dense.float()
    run(folder, tmp_path / "out", text_file, method)
    model = matgptq.load(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 35).view(1, -1)
    want = dense(ids).logits
    assert (model(ids).logits - want).norm() < 0.1 * want.norm()
    assert any(layer.bias is not None for layer in matgptq.quantized_layers(model).values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 10**6}, ValueError, r"samples must be at most \d+, the sequences of 32 tokens in .*, got 1000000"),
        ({"samples": 0}, ValueError, "samples must be positive, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be positive, got 0"),
        ({"include": ["*", "no"]}, ValueError, "include must match linear layers of the model, got 'no' which matches"),
        ({"exclude": ["no"]}, ValueError, "exclude must match linear layers of the model, got 'no' which matches none"),
        ({"exclude": ["*"]}, ValueError, r"include must match linear layers of the decoder, got \('\*',\) without"),
        (
            {"method": matgptq.Method(group_size=128)},
            ValueError,
            r"group_size must divide in_features = 64, got 128 \(model",
        ),
        ({"bits": 9}, ValueError, "bits must be an integer from 2 to 8, got 9"),
        ({"text": None}, ValueError, "calibration must name a text for a method with feedback"),
        ({"text": "missing.txt"}, FileNotFoundError, "calibration must be a file or a dataset name, got missing.txt"),
    ],
)
def test_bad_arguments_are_refused(options, error, message, tiny_folder, text_file, tmp_path):
    options = {"text": text_file, **options}
    with pytest.raises(error, match=message):
        run(tiny_folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(tiny_folder, text_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(FileExistsError, match="out must be a new or an empty folder"):
        run(tiny_folder, tmp_path / "out", text_file)


def test_a_quantised_model_is_not_quantised_again(tiny_folder, text_file, tmp_path):
    run(tiny_folder, tmp_path / "out", text_file)
    with pytest.raises(ValueError, match="model must not be quantised already"):
        run(tmp_path / "out", tmp_path / "again", text_file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            b'{"text": "fine"}\n{"texts": "not"}\n',
            "x.jsonl, line 2: lines must be JSON objects with a string",
        ),
        ("x.jsonl", b"\xff", "x.jsonl: file must be UTF-8 text, got 'utf-8' codec"),
        ("x.txt", b"\xff", "x.txt: file must be UTF-8 text, got 'utf-8' codec"),
    ],
)
def test_a_broken_calibration_file_is_refused_by_name(name, content, message, tiny_folder, tmp_path):
    text = tmp_path / name
    text.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(tiny_folder, tmp_path / "out", text)


def test_a_dataset_name_is_read_with_its_config_and_split(tiny_folder, tmp_path, monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return [{"text": "The river runs to the sea. " * 20}] * 20

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    run(tiny_folder, tmp_path / "a", "wiki:raw:test")
    run(tiny_folder, tmp_path / "b", "wiki")
    assert asked[0] == (("wiki", "raw"), {"split": "test", "streaming": True})
    assert asked[1] == (("wiki", None), {"split": "train", "streaming": True})


def test_a_dataset_needs_its_package(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"calibration wiki is no file, .* needs: pip install datasets"):
        run(tiny_folder, tmp_path / "out", "wiki")


def test_linear_layers_that_route_to_experts_stay_dense(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "intermediate_size_mlp": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Llama4TextConfig(**sizes, **heads, num_hidden_layers=1, num_local_experts=2, pad_token_id=0)
    folder = save(Llama4ForCausalLM(config), tmp_path / "dense")
    quantize(folder, tmp_path / "out", ROUNDED, progress=False)
    model = matgptq.load(tmp_path / "out", dtype=torch.float32)
    assert model.model.layers[0].feed_forward.router.weight.dtype == torch.float32
    with torch.no_grad():
        assert model(torch.arange(3, 35).view(1, -1)).logits.isfinite().all()


def test_a_model_that_fills_the_weights_of_its_linear_layers_loads(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 64, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1}
    folder = save(Mamba2ForCausalLM(Mamba2Config(**sizes, num_hidden_layers=1)), tmp_path / "dense")
    quantize(folder, tmp_path / "out", ROUNDED, progress=False)
    assert len(matgptq.quantized_layers(matgptq.load(tmp_path / "out"))) == 2


def test_linear_layers_that_spell_out_the_product_are_quantised():
    assert is_linear(FalconLinear(16, 16))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="model must have a list of decoder blocks"):
        find_blocks(tiny_model().lm_head)
