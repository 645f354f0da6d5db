"""Transformers reads and writes our folders, and the published layout, and serves any width."""

import json

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import matgptq
from matgptq import hf
from matgptq.quantizer.pipeline import quantize

IDS = torch.arange(3, 35).view(1, -1)


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A nested tiny model: round-to-nearest codes, group 16."""
    out = tmp_path_factory.mktemp("nested") / "model"
    quantize(tiny_folder, out, matgptq.Method(group_size=16, feedback=False), progress=False)
    return out


def copy(folder, out, change_tensors=None, change_config=None):
    """The folder again, its tensors and its quantization_config changed."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if change_tensors:
        change_tensors(tensors)
    if change_config:
        change_config(config["quantization_config"])
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def dense_twin(folder, bits):
    """A plain dense model that carries the weights of the nested one at a width (or a map of widths)."""
    tensors = load_file(folder / "model.safetensors")
    model = tiny_model()
    for name, module in model.named_modules():
        if f"{name}.qweight" in tensors:
            width = bits[name] if isinstance(bits, dict) else bits
            codes, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
            module.weight.data = matgptq.dequantize(codes, scales, bits=width, group_size=16)
        elif f"{name}.weight" in tensors:
            module.weight.data = tensors[f"{name}.weight"].float()
    return model


@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 3, 2])
def test_logits_are_those_of_the_dequantised_weights(folder, bits):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matgptq.set_bits(model, bits)
    torch.testing.assert_close(model(IDS).logits, dense_twin(folder, bits)(IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_width_is_chosen_at_load(folder):
    by_load = matgptq.load(folder, bits=3)
    with pytest.warns(UserWarning, match="loading attributes"):
        by_config = AutoModelForCausalLM.from_pretrained(folder, quantization_config=matgptq.MatGPTQConfig(bits=3))
    for model in (by_load, by_config):
        assert {layer.bits for layer in matgptq.quantized_layers(model).values()} == {3}
    assert by_config.config.quantization_config.to_dict()["bits"] == 3
    for wrong in (9, {"*": 9}):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 9"):
            matgptq.MatGPTQConfig(bits=wrong)


def test_float64_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="dtype must be float16, bfloat16 or float32, got float64"):
        matgptq.load(folder, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"model must be .* float32 to be saved, got torch\.float64"):
        matgptq.load(folder).double().save_pretrained(tmp_path)


def test_what_from_pretrained_takes_is_passed_on(folder, tmp_path, monkeypatch):
    copy(folder, tmp_path / "inner").joinpath("model.safetensors").rename(tmp_path / "inner/model.fp16.safetensors")
    places, read = [], AutoConfig.from_pretrained
    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", lambda *a, **k: places.append(k.copy()) or read(*a, **k))
    where = {"subfolder": "inner", "revision": "v2", "token": "x", "trust_remote_code": False}
    model = matgptq.load(tmp_path, variant="fp16", torch_dtype=torch.bfloat16, **where)
    assert model.dtype == torch.bfloat16
    assert all(place.items() >= where.items() for place in places)
    config = read(folder, attention_dropout=0.5)
    assert matgptq.load(folder, config=config).model.layers[0].self_attn.attention_dropout == 0.5


def test_a_map_of_widths_is_served_layer_by_layer(folder):
    model = matgptq.load(folder, {"*.mlp.*": 3, "model.layers.0.self_attn.q_proj": 6}, dtype=torch.float32)
    widths = {name: layer.bits for name, layer in matgptq.quantized_layers(model).items()}
    assert widths["model.layers.1.mlp.up_proj"] == 3
    assert widths["model.layers.0.self_attn.q_proj"] == 6
    assert widths["model.layers.0.self_attn.k_proj"] == 8
    torch.testing.assert_close(model(IDS).logits, dense_twin(folder, widths)(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_keep_their_type_whatever_the_activations(folder, dtype):
    model = matgptq.load(folder, dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    stored = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.scales"]
    assert torch.equal(layer.scales, stored)
    assert layer.scales.dtype == stored.dtype
    assert model(IDS).logits.dtype == dtype


def test_generate_is_greedy_decoding_of_the_logits(folder):
    model = matgptq.load(folder, bits=4, dtype=torch.float32)
    output = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    ids = IDS
    for _ in range(8):
        ids = torch.cat([ids, dense_twin(folder, 4)(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(output, ids)


def test_continuous_batching_gives_the_same_tokens(folder):
    model = matgptq.load(folder, bits=4, dtype=torch.float32)
    prompts = [IDS[0, :5].tolist(), IDS[0, 7:16].tolist(), IDS[0, 20:23].tolist()]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    answers = model.generate_batch(prompts, generation_config=config, progress_bar=False)
    got = sorted((answer.prompt_ids, answer.generated_tokens) for answer in answers.values())
    for prompt, tokens in got:
        ids = torch.tensor([prompt])
        want = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, len(prompt) :]
        assert tokens == want.tolist()
    assert len(got) == 3


def test_save_pretrained_keeps_codes_and_the_widths_served(folder, tmp_path):
    model = matgptq.load(folder, {"*.down_proj": 6, "*": 4})
    matgptq.set_bits(model, {"*.0.mlp.up_proj": 3})
    model.save_pretrained(tmp_path / "saved")
    again = matgptq.load(tmp_path / "saved")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    widths = {name: layer.bits for name, layer in matgptq.quantized_layers(model).items()}
    assert widths == {name: layer.bits for name, layer in matgptq.quantized_layers(again).items()}
    assert set(widths.values()) == {3, 4, 6}


def test_a_model_without_quantised_layers_is_not_saved_as_a_quantised_one(folder, tmp_path):
    model = matgptq.load(folder)
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(
        ValueError, match="model must have MatGPTQLinear layers to be saved as a quantised one, got none"
    ):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_a_folder_cut_to_a_width_serves_the_same_model(folder, tmp_path, bits):
    matgptq.slice_folder(folder, tmp_path / "cut", bits)
    cut = matgptq.load(tmp_path / "cut", dtype=torch.float32)
    whole = matgptq.load(folder, bits, dtype=torch.float32)
    assert torch.equal(cut(IDS).logits, whole(IDS).logits)
    assert next(iter(matgptq.quantized_layers(cut).values())).qweight.shape[0] == bits


def test_a_cut_folder_refuses_widths_that_it_does_not_hold(folder, tmp_path):
    matgptq.slice_folder(folder, tmp_path / "cut", 4)
    with pytest.raises(ValueError, match=r"bits must be one of 4 for model.layers.0.self_attn.q_proj, got 8"):
        matgptq.load(tmp_path / "cut", bits=8)


def published(folder, out):
    """The folder's codes in the published layout, written by hand from its description."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "matgptq_quant",
        "group_size": 16,
        "master_bitwidth": 8,
        "inference_bitwidth": 4,
        "quant_dtype": "float16",
        "modules_to_not_convert": ["lm_head", "norm"],
    }
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        shards[sorted(shards)[i % 2]][name] = tensor
    out.mkdir()
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    for file, part in shards.items():
        save_file(part, out / file, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(out)
    return out


def test_the_published_layout_gives_the_same_tokens_as_ours(folder, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(published(folder, tmp_path / "published"), dtype=torch.float32)
    ours = matgptq.load(folder, bits=4, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(folder)("The river runs", return_tensors="pt", add_special_tokens=False)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(theirs.generate(inputs["input_ids"], **options), ours.generate(inputs["input_ids"], **options))
    matgptq.set_bits(theirs, 8)
    matgptq.set_bits(ours, 8)
    assert torch.equal(theirs(IDS).logits, ours(IDS).logits)


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.scales"), rf"{LAYER}.scales must have shape \(96, 4\), got no such tensor"),
        (lambda t: t.pop(f"{LAYER}.qweight"), f"{LAYER} must have a qweight or a weight, got neither"),
        (
            lambda t: t.update(
                {f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:32], f"{LAYER}.scales": t[f"{LAYER}.scales"][:32]}
            ),
            rf"{LAYER}.qweight must hold \(96, 64\) codes for this model, got \(32, 64\)",
        ),
        (
            lambda t: t.update({f"{LAYER}.bias": torch.zeros(96)}),
            rf"{LAYER}.bias must be absent, got a bias",
        ),
        (
            lambda t: t[f"{LAYER}.scales"].fill_(float("inf")),
            rf"{LAYER}.scales must be finite, got a NaN or an infinity",
        ),
        (
            lambda t: t.update(
                {
                    "model.layers.1.mlp.side_proj.qweight": t[f"{LAYER}.qweight"].clone(),
                    "model.layers.1.mlp.side_proj.scales": t[f"{LAYER}.scales"].clone(),
                }
            ),
            "model.layers.1.mlp.side_proj.qweight must belong to a linear layer of the model, got none",
        ),
    ],
    ids=["no-scales", "no-codes", "other-shape", "bias", "infinite", "no-place"],
)
def test_folders_that_do_not_fit_the_model_are_refused(folder, tmp_path, change, message):
    bad = copy(folder, tmp_path / "bad", change)
    with pytest.raises(matgptq.CheckpointError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(bad)
    assert str(bad) in str(caught.value)


def test_a_dense_model_is_not_loaded_as_a_nested_one(tiny_folder):
    with pytest.raises(ValueError, match="model must have a quantization_config"):
        matgptq.load(tiny_folder, bits=4)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=matgptq.MatGPTQConfig(bits=4))


@pytest.mark.parametrize("device", ["meta", "cuda:99", torch.device("xpu")])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(device):
    with pytest.raises(ValueError, match=f"device must be there, got {device}, and torch finds"):
        matgptq.load("nowhere", device=device)


def test_a_compiled_model_has_no_graph_breaks(folder):
    model = matgptq.load(folder, bits=4, dtype=torch.float32)
    assert model.hf_quantizer.is_compileable
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS).logits)


def test_a_missing_dense_tensor_is_not_made_up(folder, tmp_path):
    bad = copy(folder, tmp_path / "bad", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(matgptq.CheckpointError, match=r"model.norm.weight must be stored, got no such tensor"):
        matgptq.load(bad)


def test_an_index_does_not_lead_out_of_the_folder(folder, tmp_path):
    out = copy(folder, tmp_path / "copy")
    names = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, f"../{folder.name}/model.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(matgptq.CheckpointError, match="weight_map must map tensor names to file names of the folder"):
        matgptq.load(out)
