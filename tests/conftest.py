"""A tiny dense Llama and its tokenizer, built here: the tests need no network."""

import importlib.util

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# `make test-vllm` runs these where vLLM's CPU build is
on_cpu = importlib.util.find_spec("vllm") and not torch.cuda.is_available()
collect_ignore_glob = [] if on_cpu else ["test_vllm_*.py", "engines.py"]

torch.set_num_threads(1)  # tensors here are tiny: on busy cores, waking threads costs ten times the work

TEXT = """The river runs from the hills to the sea, and the town stands where it turns.
In spring the water is high and brown; in summer children cross it on the stones.
A mill stood here once. It ground the wheat of nine villages, and its wheel was made of oak.
Question: what is the capital of France? Answer: the capital of France is Paris.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def tiny_tokenizer():
    """A byte-level BPE tokenizer of at most 300 tokens, trained on `TEXT`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(seed=0, **changes):
    """A dense two-layer Llama with random weights, float32; ``changes`` go into its config."""
    values = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # at the usual 0.02 a random model of this size says nearly the same whatever its weights are
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**values | changes)).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny dense Llama in float16 with its tokenizer. Shared by all tests: read it only."""
    folder = tmp_path_factory.mktemp("tiny") / "dense"
    tiny_model().half().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    """A text file of a few hundred tokens, for calibration and perplexity."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8, encoding="utf-8")
    return path
