"""The parts of a model that are calibrated one after the other, and the activations that go through them."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..hf import is_linear
from .distributed import rank, world
from .gptq import QuantizedWeight


@dataclass
class Stage:
    """Linear layers that are calibrated in one pass: those of a decoder block, or the output layer."""

    name: str
    block: nn.Module | None
    linears: dict[str, nn.Linear]
    results: dict[str, QuantizedWeight] = field(default_factory=dict)


def find_stages(model: PreTrainedModel, include: Sequence[str], exclude: Sequence[str], lm_head: bool) -> list[Stage]:
    """The decoder's blocks, with the linear layers that the patterns choose, and the output layer on request."""
    blocks = find_blocks(model)
    names = {id(module): name for name, module in model.named_modules()}
    _check_patterns(model, include, exclude)
    stages = []
    for block in blocks:
        name = names[id(block)]
        linears = {f"{name}.{n}": m for n, m in block.named_modules() if is_linear(m)}
        chosen = {n: m for n, m in linears.items() if _matches(n, include) and not _matches(n, exclude)}
        stages.append(Stage(name, block, chosen))
    if not any(stage.linears for stage in stages):
        raise ValueError(
            f"include must match linear layers of the decoder, got {tuple(include)} without {tuple(exclude)}"
        )
    if lm_head:
        head = model.get_output_embeddings()
        if not is_linear(head):
            raise ValueError(f"lm_head must be a linear layer to be quantised, got {type(head).__name__}")
        name = names[id(head)]
        if model.config.get_text_config().tie_word_embeddings:
            head.weight = nn.Parameter(head.weight.detach().clone(), False)
        stages.append(Stage(name, None, {name: head}))
    return stages


def _check_patterns(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(name, [pattern]) for name in linears):
                raise ValueError(
                    f"{argument} must match linear layers of the model, got {pattern!r} which matches none"
                )


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's list of blocks: the longest ModuleList whose members are alike and hold linear layers.

    Raises:
        ValueError: there is none.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
        and any(isinstance(m, nn.Linear) for m in module[0].modules())
    ]
    if not lists:
        raise ValueError(f"model must have a list of decoder blocks with linear layers, got {type(model).__name__}")
    return max(lists, key=len)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"*.{p}") for p in patterns)


def left_dense(model: nn.Module, stages: Sequence[Stage]) -> tuple[str, ...]:
    """Names of the linear layers that no stage quantises."""
    chosen = {name for stage in stages for name in stage.linears}
    return tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in chosen)


class BlockRunner:
    """Carries the calibration activations through the model, stage by stage."""

    def __init__(
        self, model: PreTrainedModel, stages: Sequence[Stage], tokens: Tensor, batch_size: int, device: torch.device
    ) -> None:
        self._model, self._device = model, device
        self._hidden: list[Tensor] = []
        self._blocks = [stage.block for stage in stages if stage.block is not None]
        self._calls: dict[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {b: [] for b in self._blocks}
        batches = list(tokens.split(batch_size))
        if len(batches) < world():
            raise ValueError(f"samples must give every one of {world()} processes a batch, got {len(batches)} batches")
        self._batches = batches[rank() :: world()]
        handle = self._blocks[0].register_forward_hook(self._probe)
        with contextlib.suppress(_CaughtInputs):
            model(input_ids=tokens[:1, :1], use_cache=False)
        handle.remove()
        try:
            for block in self._blocks:
                block.forward = functools.partial(self._catch, block)
            for batch in self._batches:
                self._known: dict[int, tuple[Tensor, Tensor]] = {}
                with contextlib.suppress(_CaughtInputs):
                    model(input_ids=batch, use_cache=False)
        finally:
            for block in self._blocks:
                del block.forward
        del self._known

    def _probe(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._others = len(output) - 1 if isinstance(output, tuple) else None
        raise _CaughtInputs

    def _catch(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``block``: keeps what it is called with (its own mask and positions) and computes nothing."""
        if "hidden_states" in kwargs:
            hidden = kwargs.pop("hidden_states")
        else:
            hidden, *args = args  # type: ignore[assignment]
        if block is self._blocks[0]:
            self._hidden.append(hidden)
        calls = self._calls[block]
        call = (tuple(args), kwargs)
        calls.append(self._shared(call, calls[0]) if calls else call)
        if block is self._blocks[-1]:
            raise _CaughtInputs
        return self._returned(hidden)

    def _shared(self, value: Any, first: Any) -> Any:
        """``value`` with the tensors of the first batch in the place of those that equal them: masks are large."""
        if isinstance(value, Tensor):
            if id(value) not in self._known:  # blocks share tensors, each is compared once
                same = isinstance(first, Tensor) and value.dtype == first.dtype and torch.equal(value, first)
                self._known[id(value)] = (value, first if same else value)
            return self._known[id(value)][1]
        if isinstance(value, (tuple, list)):
            return type(value)(self._shared(*pair) for pair in zip(value, first, strict=True))
        if isinstance(value, dict):
            return {key: self._shared(item, first[key]) for key, item in value.items()}
        return value

    def _returned(self, hidden: Tensor) -> Any:
        """``hidden`` in the form in which the model's blocks return it."""
        return hidden if self._others is None else (hidden, *[None] * self._others)

    def run(self, stage: Stage) -> None:
        """Run one stage over all batches; what comes out of a block goes into the next."""
        if stage.block is None:
            (head,) = stage.linears.values()
            return self._run_head(head)
        block = stage.block.to(self._device)
        for i, call in enumerate(self._calls[stage.block]):
            args, kwargs = _move(call, self._device)
            output = block(self._hidden[i].to(self._device), *args, **kwargs)
            self._hidden[i] = (output[0] if isinstance(output, tuple) else output).to("cpu")
        block.to("cpu")

    def _run_head(self, head: nn.Linear) -> None:
        """Run what comes after the last block, up to the input of ``head``.

        The model itself does it, with its last block alone, which gives what the blocks gave and computes nothing.
        """
        blocks = find_blocks(self._model)
        others = list(blocks)[:-1]
        del blocks[:-1]
        (last,) = blocks
        handle = head.register_forward_pre_hook(_stop)  # the last of its hooks: its input has been seen
        self._model.to(self._device)
        try:
            for batch, hidden in zip(self._batches, self._hidden, strict=True):
                output = self._returned(hidden.to(self._device))
                last.forward = lambda *_, output=output, **__: output
                with contextlib.suppress(_CaughtInputs):
                    self._model(input_ids=batch.to(self._device), use_cache=False)
        finally:
            del last.forward
            handle.remove()
            self._model.to("cpu")
            for i, block in enumerate(others):
                blocks.insert(i, block)


def _stop(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise _CaughtInputs


class _CaughtInputs(Exception):
    """Ends a forward pass where its rest is of no use."""


def _move(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_move(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    return value
