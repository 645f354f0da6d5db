"""vLLM serves what Transformers serves: same folders, same tokens. On vLLM's CPU build, by ``make test-vllm``."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from engines import GEOMETRY, engine, expected, nested, served
from safetensors.torch import load_file, save_file
from transformers import Phi3Config, Phi3ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import matgptq
import vllm_matgptq
import vllm_matgptq.compiler
import vllm_matgptq.linear
from matgptq.overlap import WaitFirst

MIXED = {"*.q_proj": 3, "*.k_proj": 4, "*.v_proj": 4, "*.gate_proj": 6, "*.up_proj": 2, "*": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A nested tiny model. Shared by all tests: read it only."""
    return nested(tmp_path_factory.mktemp("nested") / "model")


@pytest.fixture
def changed(folder, tmp_path):
    """``changed(tensors, config)``: the folder again, after these two functions changed it."""

    def change(tensors=None, config=None):
        out = shutil.copytree(folder, tmp_path / "changed")
        stored, values = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
        if tensors:
            tensors(stored)
        if config:
            config(values["quantization_config"])
        save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(values))
        return out

    return change


@pytest.mark.parametrize("bits", [8, 4, 3, MIXED], ids=["8", "4", "3", "mixed"])
def test_a_width_gives_the_tokens_of_transformers(folder, bits):
    with engine(folder, **vllm_matgptq.engine_args(bits)) as llm:
        assert served(llm) == expected(folder, bits)


def test_the_widths_of_the_folder_are_the_default(changed):
    out = changed(config=lambda values: values.update(bits=4, bits_per_layer={"model.layers.0.*": 6}))
    with engine(out) as llm:
        assert served(llm) == expected(out)


@pytest.mark.parametrize("quantization", [None, "matgptq", "matgptq_quant"])
def test_the_published_layout_is_served(changed, quantization):
    def published(values):
        group_size = values["group_size"]
        values.clear()
        values.update(quant_method="matgptq_quant", group_size=group_size, master_bitwidth=8, inference_bitwidth=4)
        values.update(quant_dtype="float16", modules_to_not_convert=["lm_head", "norm"])

    out = changed(config=published)
    with engine(out, quantization=quantization) as llm:
        assert served(llm) == expected(out, 4)


@pytest.mark.parametrize(
    ("method", "model", "options", "bits"),
    [
        ({"rule": "prefix", "sym": False}, {}, {}, 4),
        ({"act_order": True, "static_groups": False}, {"attention_bias": True, "mlp_bias": True}, {}, MIXED),
        ({"own_scales": (3, 4)}, {"tie_word_embeddings": False}, {"exclude": ["*.o_proj"]}, MIXED),
        ({"group_size": -1}, {"tie_word_embeddings": False, "vocab_size": 301}, {"lm_head": True}, 4),
        ({"master_bits": 6}, {"num_key_value_heads": 4}, {}, 3),
    ],
    ids=["prefix and zeros", "act order and biases", "own scales and dense layers", "lm_head", "6-bit codes"],
)
def test_what_a_folder_can_hold_is_served(tmp_path, text_file, method, model, options, bits):
    method = {"group_size": 32, "widths": (3, method.get("master_bits", 8)), **method}
    calibration = {"calibration": text_file, "samples": 2, "sequence_length": 64}
    out = nested(tmp_path / "model", matgptq.Method(**method), **calibration, **options, changes=model)
    with engine(out, **vllm_matgptq.engine_args(bits)) as llm:
        assert served(llm) == expected(out, bits)


@pytest.mark.parametrize("rule", ["round", "prefix"])
def test_a_folder_cut_to_mixed_widths_is_served(folder, changed, tmp_path, rule):
    whole = changed(config=lambda values: values.update(slicing=rule))
    matgptq.slice_folder(whole, tmp_path / "cut", MIXED)
    with engine(tmp_path / "cut") as llm:
        assert served(llm) == expected(whole, MIXED)


def test_layers_that_the_checkpoint_fuses_are_served(tmp_path):
    sizes = {**GEOMETRY, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0, initializer_range=0.1, max_position_embeddings=128))
    out = nested(tmp_path / "phi", dense=model)
    with engine(out, **vllm_matgptq.engine_args({"*.qkv_proj": 4, "*": 3})) as llm:
        assert served(llm) == expected(out, {"*.qkv_proj": 4, "*": 3})


def test_two_ranks_give_the_tokens_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    changes = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "vocab_size": 301}
    out = nested(
        tmp_path / "model", matgptq.Method(group_size=32, feedback=False, sym=False), lm_head=True, changes=changes
    )
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(out, **options, **vllm_matgptq.engine_args(MIXED)) as llm:
        assert served(llm) == expected(out, MIXED)


def test_dummy_weights_need_no_files(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16"}
    with engine(tmp_path, **options, **vllm_matgptq.engine_args(MIXED)) as llm:
        assert len(set(served(llm))) > 1
        (name,) = llm.apply_model(finite_logits)
        assert name


def finite_logits(model):
    """Whether all logits of a model are finite and not all alike."""
    logits = model.compute_logits(torch.randn(4, model.config.hidden_size, dtype=torch.bfloat16))
    return bool(torch.isfinite(logits).all()) and float(logits.std()) > 0


def test_the_width_of_a_running_engine_changes(folder):
    with engine(folder, **vllm_matgptq.engine_args(8, resident=True)) as llm:
        for bits in (8, 3, MIXED, {"*.down_proj": 4}, 8):
            if bits != {"*.down_proj": 4}:
                want = expected(folder, bits)
            else:
                want = expected(folder, {"*.down_proj": 4, **MIXED})
            assert vllm_matgptq.set_bits(llm, bits) >= 0
            assert served(llm) == want
        for bits, message in [
            (9, r"bits must be one of 2, 3, 4, 5, 6, 7, 8 for model.layers.0.self_attn.q_proj, got 9"),
            ({"*.nothing": 4}, r"bits must name quantised layers of the model, got '\*.nothing' which matches none"),
        ]:
            with pytest.raises((ValueError, RuntimeError), match=message):  # from another process: a RuntimeError
                vllm_matgptq.set_bits(llm, bits)
        assert served(llm) == expected(folder, 8)


def test_the_width_is_fixed_unless_the_weights_are_resident(folder):
    arguments = {**vllm_matgptq.engine_args(8), "worker_extension_cls": "vllm_matgptq.WidthExtension"}
    with (
        engine(folder, **arguments) as llm,
        pytest.raises((ValueError, RuntimeError), match="resident must be true to change the width"),
    ):
        vllm_matgptq.set_bits(llm, 3)


def test_compiled_code_does_not_hold_the_width(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    # with the options that a Hopper GPU is given: here they change nothing, but are hashed, copied and called
    monkeypatch.setattr(vllm_matgptq.compiler, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    graphs = []
    monkeypatch.setattr(WaitFirst, "__call__", lambda self, nodes: graphs.append(len(nodes)) or nodes)
    arguments = {"enforce_eager": False, "max_num_seqs": 1, "compilation_config": {"cudagraph_capture_sizes": []}}

    def check(bits):
        with engine(folder, **arguments, **vllm_matgptq.engine_args(bits, resident=True)) as llm:
            assert served(llm) == expected(folder, bits)
            vllm_matgptq.set_bits(llm, 3)
            assert served(llm) == expected(folder, 3)

    check(4)
    assert list(tmp_path.rglob("*.cpp"))  # it was compiled
    assert graphs
    check(MIXED)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 9}, "bits must be an integer from 2 to 8, got 9"),
        ({"bits": 4, "groups": 64}, "keys must be among .*, got 'groups'"),
        ({"resident": 1}, "resident must be true or false, got 1"),
        ({"bits_per_layer": {"*.nothing": 4}}, r"bits_per_layer must name quantised layers, got '\*.nothing'"),
        ({"group_size": 64}, r"down_proj.scales must have shape \(128, 3\), got \(128, 6\)"),
    ],
)
def test_a_wrong_override_is_an_error(folder, values, message):
    overrides = {"quantization_config": {"quant_method": "matgptq", **values}}
    with pytest.raises(ValueError, match=message), engine(folder, hf_overrides=overrides):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.scales"), "up_proj.scales must have shape .*, got no such tensor"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(96, 128, dtype=torch.uint8)}),
            "up_proj.scales must have shape",
        ),
        (
            lambda t: t["model.layers.0.mlp.down_proj.scales"].fill_(float("nan")),
            "down_proj.scales must be finite, got a NaN",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.perm": torch.zeros(128, dtype=torch.int32)}),
            "k_proj.perm must be a permutation",
        ),
    ],
    ids=["missing", "shape", "values", "perm"],
)
def test_a_wrong_tensor_is_an_error(changed, change, message):
    out = changed(change)
    with pytest.raises(ValueError, match=message), engine(out):
        pass


def test_layers_fused_by_vllm_must_all_be_quantised(tmp_path):
    out = nested(tmp_path / "model", exclude=["*.k_proj"])
    with (
        pytest.raises(ValueError, match=r"must all be quantised or all be dense, got .*q_proj.* and .*k_proj dense"),
        engine(out),
    ):
        pass


def test_quantised_experts_are_an_error(tmp_path):
    sizes = {**GEOMETRY, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 300, "num_experts": 4}
    sizes["num_key_value_heads"] = 4
    config = Qwen2MoeConfig(**sizes, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "matgptq", "group_size": 32}
    values["architectures"] = [Qwen2MoeForCausalLM.__name__]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with (
        pytest.raises(ValueError, match="experts must be stored dense"),
        engine(tmp_path, load_format="dummy", skip_tokenizer_init=True),
    ):
        pass


def test_a_dense_model_is_not_quantised_by_asking(folder):
    match = "must have a quantization_config in its config"
    with pytest.raises(ValueError, match=match), engine(folder.with_name("model-dense"), quantization="matgptq"):
        pass
