"""Perplexity of a model on a text file, by width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import utf8
from .linear import quantized_layers, set_bits
from .plots import new_axes, save


@dataclass(frozen=True)
class WidthResult:
    """One row of a table by width.

    Attributes:
        bits: served width.
        perplexity: of the text.
        nbytes: bytes that the model weighs cut to the width, its dense parts included.
    """

    bits: int
    perplexity: float
    nbytes: int


def read_tokens(path: str | Path, tokenizer: Any, tokens: int, sequence_length: int) -> Tensor:
    """The first ``tokens`` tokens of a text file in sequences: int64 ``(tokens / sequence_length, sequence_length)``.

    Raises:
        ValueError: the text is shorter, or ``tokens`` is not a positive multiple of ``sequence_length``.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
    if tokens <= 0 or tokens % sequence_length:
        raise ValueError(f"tokens must be a positive multiple of sequence_length = {sequence_length}, got {tokens}")
    with utf8(path):
        text = Path(path).read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < tokens:
        raise ValueError(f"tokens must be at most {len(ids)}, what {path} holds, got {tokens}")
    return torch.tensor(ids[:tokens]).view(-1, sequence_length)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, *, batch_size: int = 1, progress: str | None = None) -> float:
    """``exp(-mean log p(token | those before it in its sequence))``, over all but the first token of each sequence.

    Args:
        model: a causal language model; logits are taken to float32.
        tokens: int64 ``(sequences, sequence_length)``.
        batch_size: sequences a forward pass.
        progress: title of a progress bar; none where None.

    Raises:
        ValueError: ``batch_size`` is not positive.
    """
    if batch_size <= 0:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    device = next(p.device for p in (*model.parameters(), *model.buffers()))
    total = 0.0
    for batch in tqdm(tokens.split(batch_size), desc=progress, disable=progress is None, leave=False):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    mean = total / (tokens.numel() - len(tokens))
    return math.exp(mean) if mean < 700 else mean * math.inf  # beyond a float; NaN stays NaN


def model_bytes(model: nn.Module, bits: int | None = None) -> int:
    """Bytes of a model's weights with every quantised layer cut to ``bits`` (as served now where None).

    Dense parts count in the type they have in memory, tied ones once.
    """
    layers = quantized_layers(model)
    inside = {id(t) for layer in layers.values() for t in (*layer.parameters(), *layer.buffers())}
    dense = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    return dense + sum(layer.nbytes(layer.bits if bits is None else bits) for layer in layers.values())


def evaluate(
    model: nn.Module, tokens: Tensor, widths: Sequence[int], *, batch_size: int = 1, progress: bool = False
) -> list[WidthResult]:
    """Perplexity at each of ``widths``, widest first; the model is left at the widths it had.

    Raises:
        ValueError: the model has no quantised layers, or cannot serve a width.
    """
    before = {name: layer.bits for name, layer in quantized_layers(model).items()}
    results = []
    try:
        for bits in sorted(widths, reverse=True):
            set_bits(model, bits)
            title = f"{bits} bits" if progress else None
            value = perplexity(model, tokens, batch_size=batch_size, progress=title)
            results.append(WidthResult(bits, value, model_bytes(model)))
    finally:
        if before:
            set_bits(model, before)
    return results


def plot(results: Sequence[WidthResult], path: str | Path, *, dense: WidthResult | None = None) -> None:
    """Draw perplexity against size, a point a width, into an image file (the suffix chooses its type).

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes = new_axes(xlabel="weights (MB)", ylabel="perplexity", yscale="log")
    axes.plot([r.nbytes / 1e6 for r in results], [r.perplexity for r in results], "o-", label="MatGPTQ, one checkpoint")
    for r in results:
        axes.annotate(f"{r.bits} bits", (r.nbytes / 1e6, r.perplexity), xytext=(6, 6), textcoords="offset points")
    if dense is not None:
        axes.plot(dense.nbytes / 1e6, dense.perplexity, "s", color="black", label="dense")
    save(axes, [path])
