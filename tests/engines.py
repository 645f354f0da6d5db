"""Engines in this process: vLLM's CPU build, no compilation, a small cache. Run by ``make test-vllm``."""

import contextlib
import gc
import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
import vllm
from conftest import tiny_model, tiny_tokenizer
from vllm.distributed import cleanup_dist_env_and_memory

import matgptq
from matgptq.quantizer.pipeline import quantize

PROMPT = list(range(3, 35))
GEOMETRY = {"hidden_size": 128, "intermediate_size": 192}  # heads of 32, the least that vLLM serves on a CPU


@contextlib.contextmanager
def engine(folder, **arguments):
    """A `vllm.LLM` in this process, shut down at the end."""
    arguments = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 2,
        "kv_cache_memory_bytes": 1 << 24,
        "distributed_executor_backend": "uni",
        **arguments,
    }
    llm = None
    try:
        llm = vllm.LLM(model=str(folder), **arguments)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        gc.collect()
        cleanup_dist_env_and_memory()


def served(llm, prompt=PROMPT, count=16):
    """Greedy tokens of a running engine."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def expected(folder, bits=None, prompt=PROMPT, count=16):
    """Greedy tokens of Transformers on the CPU op."""
    model = matgptq.load(folder, bits=bits, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # as ignore_eos
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


def nested(out, method=None, dense=None, changes=None, **options):
    """A quantised tiny model in the folder ``out``, rounded to nearest unless ``method`` says otherwise."""
    source = out.with_name(f"{out.name}-dense")
    model = tiny_model(**GEOMETRY | (changes or {})) if dense is None else dense
    model.half().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    method = method or matgptq.Method(group_size=32, feedback=False)
    quantize(source, out, method, progress=False, **options)
    return out
