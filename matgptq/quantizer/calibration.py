"""Calibration text: from a file or a Hugging Face dataset to equal sequences of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import utf8


def read_texts(source: str | Path) -> Iterator[str]:
    """The documents of ``source``.

    Args:
        source: a ``.jsonl`` or ``.json`` file of one object a line with the key ``text``; any other file, which is
            one document; or a Hugging Face dataset, ``name``, ``name:split`` or ``name:config:split`` (column
            ``text``, split ``train`` where not given; needs the package ``datasets``).

    Raises:
        FileNotFoundError: ``source`` looks like a path and no such file is there.
        ValueError: the file is not UTF-8, a line is no JSON object with a text, or the dataset has no text column.
        ImportError: a dataset is named and ``datasets`` is not installed.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            with utf8(path):
                yield path.read_text(encoding="utf-8")
            return
        with utf8(path), path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_text(line, f"{path}, line {number}")
        return
    if path.suffix in (".txt", ".md", ".jsonl", ".json") or path.is_dir():
        raise FileNotFoundError(f"calibration must be a file or a dataset name, got {source} which is no file")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"calibration {source} is no file, and reading it as a Hugging Face dataset needs: pip install datasets"
        ) from None
    name, *rest = str(source).split(":")
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else "train")
    for row in load_dataset(name, config, split=split, streaming=True):
        if "text" not in row:
            raise ValueError(f"calibration dataset {source} must have a column 'text', got {', '.join(row)}")
        yield row["text"]


def _json_text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{where}: lines must be JSON objects with a string 'text', got {line.strip()[:60]!r}")
    return text


def calibration_tokens(
    source: str | Path, tokenizer: Any, *, samples: int, sequence_length: int, seed: int = 0
) -> Tensor:
    """``samples`` sequences drawn without overlap: int64 ``(samples, sequence_length)``, the same for the same seed.

    Documents are joined by the end-of-sequence token; of a dataset no more is read than four times what is needed.

    Raises:
        ValueError: samples or sequence_length is not positive, or the text is too short.
    """
    for name, value in (("samples", samples), ("sequence_length", sequence_length)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    enough = 4 * samples * sequence_length
    ids: list[int] = []
    for text in read_texts(source):
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) >= enough:
            break
    windows = len(ids) // sequence_length
    if windows < samples:
        raise ValueError(
            f"samples must be at most {windows}, the sequences of {sequence_length} tokens in {source}, got {samples}"
        )
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.tensor(ids[: windows * sequence_length]).view(windows, sequence_length)[order]
