"""Greedy decoding with a static cache gives the tokens of Transformers' own loop."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BatchEncoding

import matgptq
from matgptq.attention import NAME, attend, attending
from matgptq.decode import Decoder, _largest, prompt_ids
from matgptq.packed import pack
from matgptq.quantizer.pipeline import quantize

IDS = torch.arange(3, 20).view(1, -1)


@pytest.fixture(scope="module")
def model(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode") / "nested"
    quantize(tiny_folder, folder, matgptq.Method(group_size=16, feedback=False), progress=False)
    return matgptq.load(folder, dtype=torch.float32)


def expected(model, ids, count, **options):
    return model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_tokens_are_those_of_transformers(model, bits):
    matgptq.set_bits(model, bits)
    assert torch.equal(Decoder(model, max_length=40).generate(IDS, 12), expected(model, IDS, 12))


def test_a_batch_and_a_decoder_used_twice(model):
    ids = torch.cat([IDS, IDS.flip(1)])
    decoder = Decoder(model, batch_size=2, max_length=64)
    for prompt in (ids, ids[:, :5]):
        assert torch.equal(decoder.generate(prompt, 9), expected(model, prompt, 9))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_queries_that_share_a_key_head_are_attention_of_several(batch, compiled):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 6, 1, 16, generator=generator)
    key, value = torch.randn(2, batch, 2, 9, 16, generator=generator)
    mask = (torch.arange(9) < 7).view(1, 1, 1, 9)
    if compiled:  # the other way to compute it; a number added where none attends is a mask too
        call = torch.compile(attend, backend="eager", fullgraph=True)
        mask = mask if batch == 1 else torch.zeros(1, 1, 1, 9).masked_fill(~mask, -torch.inf)
    else:
        call = attend
    got, weights = call(torch.nn.Module(), query, key, value, mask, scaling=0.3, dropout=0.0)
    repeated = (tensor.repeat_interleave(3, 1)[:, :, :7].double() for tensor in (key, value))
    keys, values = repeated
    want = (query.double() @ keys.mT * 0.3).softmax(-1) @ values
    assert weights is None
    torch.testing.assert_close(got.double(), want.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_only_few_key_heads_are_left_to_the_compiler():
    calls = []

    def backend(graph, inputs):
        calls.append(any("scaled_dot_product" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    for batch in (7, 8):  # sequences of two key heads
        query, key, mask = torch.randn(batch, 4, 1, 8), torch.randn(batch, 2, 5, 8), torch.ones(1, 1, 1, 5) > 0
        torch.compile(attend, backend=backend, fullgraph=True, dynamic=False)(torch.nn.Module(), query, key, key, mask)
    assert calls == [False, True]


def test_other_attention_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr("matgptq.attention.sdpa_attention_forward", lambda *arguments, **options: "theirs")
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    for others in ({"softcap": 30.0}, {"position_bias": mask}, {"dropout": 0.1}):
        assert attend(torch.nn.Module(), query, key, key, mask, scaling=1.0, **others) == "theirs"
    assert attend(torch.nn.Module(), query, key, key, None) == "theirs"
    assert attend(torch.nn.Module(), query, key, key, mask.expand(1, 4, 1, 5)) == "theirs"
    assert attend(torch.nn.Module(), query.repeat(1, 1, 2, 1), key, key, mask) == "theirs"
    assert attend(torch.nn.Module(), query, key, key, mask)[0].shape == (1, 1, 4, 8)


def test_a_model_attends_otherwise_only_while_it_decodes(model):
    assert model.config._attn_implementation == "sdpa"
    with attending(model.config):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = "eager"
    with attending(model.config):
        assert model.config._attn_implementation == "eager"
    model.config._attn_implementation = "sdpa"


@pytest.mark.parametrize("size", [1, 7, 256, 1280, 1003])
def test_the_largest_is_the_first_of_the_largest(size):
    logits = torch.randint(5, (4, size), generator=torch.Generator().manual_seed(size)).float()
    assert torch.equal(_largest(logits), logits.argmax(-1, keepdim=True))


def test_the_answer_fills_the_room_by_default(model):
    assert Decoder(model, max_length=IDS.shape[1] + 4).generate(IDS).shape == (1, 4)


def test_decoding_ends_when_all_sequences_have(model):
    ids = torch.cat([IDS, IDS.flip(1)])
    free = Decoder(model, batch_size=2, max_length=40).generate(ids, 10)
    first, second = free[0, 2].item(), free[1, 4].item()
    got = Decoder(model, batch_size=2, max_length=40).generate(ids, 10, [first, second])
    for row, whole in zip(got, free, strict=True):
        end = next(i for i, token in enumerate(whole.tolist()) if token in (first, second))
        assert torch.equal(row[: end + 1], whole[: end + 1])
        assert (row[end:] == whole[end]).all()
    assert got.shape[1] <= 5


def test_any_kind_of_integer_ends_a_sequence(model):
    decoder = Decoder(model, max_length=40)
    token = decoder.generate(IDS, 1)[0, 0]
    for end in (token, token.numpy(), token.numpy()[()], token.view(1), {token.item()}):
        assert decoder.generate(IDS, 4, end).tolist() == [[token]]


def test_the_stream_can_be_left(model):
    decoder = Decoder(model, max_length=40)
    for _ in decoder.stream(IDS, 10):
        break
    assert torch.equal(decoder.generate(IDS, 6), expected(model, IDS, 6))


def test_compiled_code_serves_all_widths(tiny_folder, text_file, tmp_path):
    method = matgptq.Method(group_size=16, own_scales=(2, 4))
    options = {"calibration": text_file, "samples": 2, "sequence_length": 16, "progress": False}
    quantize(tiny_folder, tmp_path / "nested", method, **options)
    model = matgptq.load(tmp_path / "nested", dtype=torch.float32).to(torch.bfloat16)
    pack(model)
    compilations = 0

    def backend(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    decoder = Decoder(model, max_length=40, compile=True)
    decoder._compute = torch.compile(decoder._next, fullgraph=True, dynamic=False, backend=backend)
    plain = Decoder(model, max_length=40)
    answers = []
    for bits in (8, 4, 2, 4):
        matgptq.set_bits(model, bits)
        answers.append(decoder.generate(IDS, 8))
        assert torch.equal(answers[-1], plain.generate(IDS, 8))
    assert compilations == 1
    assert torch.equal(answers[1], answers[3])
    assert not torch.equal(answers[0], answers[2])
    exported = torch.export.export(model.model.layers[0].mlp, (torch.randn(1, 1, 64, dtype=torch.bfloat16),))
    assert "packed_linear" in str(exported)
    assert "packed_linear_at" not in str(exported)  # to others the width is a constant, as before


def test_any_number_of_decoders_compiles(model):
    for batch_size in range(1, torch._dynamo.config.recompile_limit + 2):
        decoder = Decoder(model, batch_size=batch_size, max_length=40, compile=True)
        decoder._compute = torch.compile(decoder._next, fullgraph=True, dynamic=False, backend="eager")
        assert decoder.generate(IDS.repeat(batch_size, 1), 3).shape == (batch_size, 3)


def test_graphs_are_told_apart_by_the_widths_of_all_layers(model):
    decoder = Decoder(model, max_length=40)  # its layers are not packed, as those of a float32 model on a GPU
    seen = set()
    for bits in (8, 4, {"*.down_proj": 3}):
        matgptq.set_bits(model, bits)
        seen.add(decoder._widths())
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size must be positive, got 0"), ({"max_length": -1}, "max_length must be positive")],
)
def test_bad_sizes(model, options, message):
    with pytest.raises(ValueError, match=message):
        Decoder(model, **options)


def test_beyond_a_sliding_window(tmp_path):
    config = AutoConfig.for_model(
        "mistral", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=99, sliding_window=8, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert torch.equal(Decoder(model, max_length=40).generate(IDS, 12), expected(model, IDS, 12))
    with pytest.raises(ValueError, match="compile must be off beyond the sliding window of 8, got max_length 40"):
        Decoder(model, max_length=40, compile=True)


def test_models_that_keep_other_state_are_refused():
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    config = AutoConfig.for_model("lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"got LinearAttentionLayer \(Lfm2ForCausalLM\): use model.generate"):
        Decoder(model)


def test_a_prompt_takes_the_form_of_a_chat(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])

    def prompt(**options):
        return tokenizer.decode(prompt_ids(tokenizer, "Why?", **options)[0])

    assert prompt() == "<s>user: Why?</s><s>assistant: "  # one BOS, the template's own
    assert prompt(chat=False) == "<s>Why?"
    tokenizer.chat_template = None
    assert prompt() == "<s>Why?"


def test_bad_prompts(model):
    decoder = Decoder(model, max_length=20)
    with pytest.raises(ValueError, match=r"input_ids must have shape \(1, length\), got \(2, 17\)"):
        next(decoder.stream(torch.cat([IDS, IDS])))
    with pytest.raises(ValueError, match=r"max_new_tokens must be 1 to 3, .* got 4"):
        next(decoder.stream(IDS, 4))
    with pytest.raises(ValueError, match="input_ids must be shorter than max_length 17, got 17"):
        next(Decoder(model, max_length=17).stream(IDS))
    with pytest.raises(TypeError, match="input_ids must be a tensor, got BatchEncoding"):
        next(decoder.stream(BatchEncoding({"input_ids": IDS})))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_graphs_on_a_gpu_give_the_tokens_of_the_cpu(model, tiny_folder, tmp_path, compile):
    quantize(tiny_folder, tmp_path / "nested", matgptq.Method(group_size=16, feedback=False), progress=False)
    on_gpu = matgptq.load(tmp_path / "nested", device="cuda")
    decoder = Decoder(on_gpu, max_length=40, compile=compile)
    for bits in (8, 4, 8):
        matgptq.set_bits(on_gpu, bits)
        matgptq.set_bits(model, bits)
        assert torch.equal(decoder.generate(IDS, 12), expected(model, IDS, 12))
    assert len(decoder._graphs) == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_that_is_not_the_current_one(model, tiny_folder, tmp_path, compile):
    quantize(tiny_folder, tmp_path / "nested", matgptq.Method(group_size=16, feedback=False), progress=False)
    on_gpu = matgptq.load(tmp_path / "nested", device="cuda:1")
    decoder = Decoder(on_gpu, max_length=40, compile=compile)
    for bits in (8, 4, 8):
        matgptq.set_bits(on_gpu, bits)
        matgptq.set_bits(model, bits)
        assert torch.equal(decoder.generate(IDS, 12), expected(model, IDS, 12))
    assert torch.cuda.current_device() == 0
    assert len(decoder._graphs) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_layers_that_are_not_packed_on_a_gpu(model, tiny_folder, tmp_path):
    quantize(tiny_folder, tmp_path / "nested", matgptq.Method(group_size=16, feedback=False), progress=False)
    on_gpu = matgptq.load(tmp_path / "nested", device="cuda", dtype=torch.float32)
    decoder = Decoder(on_gpu, max_length=40)
    for bits in (8, 2):
        matgptq.set_bits(on_gpu, bits)
        matgptq.set_bits(model, bits)
        assert torch.equal(decoder.generate(IDS, 12), expected(model, IDS, 12))
