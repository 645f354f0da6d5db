"""Quantise a whole model, block by block, and write it as a model folder.

One block is on the device at a time, with the activations that enter it. A pass over the calibration tokens gives both
the Hessians of the block's layers and the (dense) activations that enter the next block, so calibration costs one
forward pass of the model. What is finished is kept in ``<out>.partial``: the same command goes on after the last
finished block.

With ``torch.distributed`` initialised, the batches of calibration tokens are spread over the ranks, the Hessians are
summed, and each rank quantises its share of the layers. Rank 0 writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..checkpoint import check_new, publish, write_json
from ..config import QuantConfig
from ..export import insert_results, write_model
from ..slicing import check_bits, group_count
from .calibration import calibration_tokens
from .gptq import Method, QuantizedWeight, quantize_weight
from .hessian import HessianHooks

LM_HEAD = "lm_head"
REPORT_WIDTHS = (8, 6, 4, 3, 2)


@dataclass
class Report:
    """What `quantize` did.

    Attributes:
        out: the folder written.
        seconds: wall time of each stage: ``load``, ``calibrate`` (forward passes and Hessians), ``solve``, ``write``.
        errors: layer -> width -> relative squared error of the layer's output on calibration data.
        damping: layers whose Hessian needed more damping than was asked for -> what they got.
    """

    out: Path
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)


def quantize(
    model: str | Path,
    out: str | Path,
    method: Method | None = None,
    *,
    bits: int | None = None,
    calibration: str | Path | None = None,
    samples: int = 512,
    sequence_length: int = 4096,
    batch_size: int = 1,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    lm_head: bool = False,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Quantise ``model`` and write the folder ``out``.

    Args:
        model: folder or hub name of a causal language model in 16 or 32 bits.
        out: the new folder; must not exist, or be empty.
        method: how weights become codes; ``Method()`` where None.
        bits: width that the folder serves by default; ``method.master_bits`` where None.
        calibration: text (`matgptq.quantizer.calibration.read_texts`); not needed for round-to-nearest.
        samples: calibration sequences.
        sequence_length: tokens a sequence.
        batch_size: sequences a forward pass.
        include: shell-style patterns of the linear layers of the decoder's blocks to quantise.
        exclude: patterns of layers to leave as they are.
        lm_head: quantise the output layer too; tied embeddings are untied by it.
        device: where to compute; a GPU if there is one. On the CPU activations are float32.
        seed: draws the calibration sequences. The same seed on the same machine gives the same bytes.
        progress: show a progress bar with the layer, its error by width and the time left.

    Raises:
        FileExistsError: ``out`` is there already.
        ValueError: an argument does not fit the model, or an unfinished run with other arguments is in the way.
    """
    method = method or Method()
    out = Path(out)
    check_new(out)
    bits = method.master_bits if bits is None else check_bits(bits, most=method.master_bits)
    if method.needs_hessian and calibration is None:
        raise ValueError("calibration must name a text unless the method is round-to-nearest, got None")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report, clock = Report(out), _Clock()

    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if getattr(dense.config, "quantization_config", None) is not None:
        raise ValueError(f"model must not be quantised already, got {model} with a quantization_config")
    stored_dtype = dense.dtype
    scale_dtype = stored_dtype if stored_dtype in (torch.float16, torch.bfloat16) else torch.float16
    method = dataclasses.replace(method, scale_dtype=scale_dtype)
    if device.type == "cpu":
        dense.float()
    dense.eval().requires_grad_(False)
    stages = _stages(dense, include, exclude, lm_head)
    for stage in stages:
        for name, linear in stage.linears.items():
            group_count(linear.in_features, method.group_size, where=name)
    report.seconds["load"] = clock.lap()

    tokens = None
    if method.needs_hessian:
        assert calibration is not None
        tokens = calibration_tokens(calibration, tokenizer, samples=samples, sequence_length=sequence_length, seed=seed)
    config = QuantConfig(
        bits=bits,
        master_bits=method.master_bits,
        group_size=method.group_size,
        sym=method.sym,
        slicing=method.rule,
        modules_to_not_convert=_left_dense(dense, stages),
    )
    arguments = {
        "model": str(model),
        "method": {k: str(v) for k, v in dataclasses.asdict(method).items()},
        "config": config.to_dict(),
        "layers": [name for stage in stages for name in stage.linears],
        "tokens": None if tokens is None else [list(tokens.shape), int(tokens.sum()), batch_size],
    }
    partial = _Partial(out, arguments)
    with torch.no_grad():
        runner = None if tokens is None else _BlockRunner(dense, stages, tokens, batch_size, device)
        report.seconds |= {"calibrate": clock.lap(), "solve": 0.0}
        total = sum(len(stage.linears) for stage in stages)
        with tqdm(total=total, desc="quantize", unit="layer", disable=not progress or _rank() > 0) as bar:
            for number, stage in enumerate(stages):
                _quantize_stage(stage, number, runner, method, partial, device, report, clock, bar)
    report.seconds["calibrate"] += clock.lap()

    if _rank() == 0:
        for stage in stages:
            insert_results(dense, stage.results, config)
        dense.to(stored_dtype)
        if lm_head:
            dense.config.tie_word_embeddings = False
        finished = partial.folder / "model"
        shutil.rmtree(finished, ignore_errors=True)
        write_model(dense, config, model, tokenizer, finished)
        publish(finished, out)
        shutil.rmtree(partial.folder)
    _barrier()
    report.seconds["write"] = clock.lap()
    return report


@dataclass
class _Stage:
    """Linear layers that are calibrated in one pass: those of a decoder block, or the output layer."""

    name: str
    block: nn.Module | None
    linears: dict[str, nn.Linear]
    results: dict[str, QuantizedWeight] = field(default_factory=dict)


def _stages(model: PreTrainedModel, include: Sequence[str], exclude: Sequence[str], lm_head: bool) -> list[_Stage]:
    """The decoder's blocks, with the linear layers that the patterns choose, and the output layer on request."""
    blocks = find_blocks(model)
    names = {id(module): name for name, module in model.named_modules()}
    stages = []
    for block in blocks:
        name = names[id(block)]
        linears = {f"{name}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        chosen = {n: m for n, m in linears.items() if _matches(n, include) and not _matches(n, exclude)}
        stages.append(_Stage(name, block, chosen))
    if not any(stage.linears for stage in stages):
        raise ValueError(
            f"include must match linear layers of the decoder, got {tuple(include)} without {tuple(exclude)}"
        )
    if lm_head:
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"lm_head must be a linear layer to be quantised, got {type(head).__name__}")
        name = names[id(head)]
        if model.config.get_text_config().tie_word_embeddings:
            head.weight = nn.Parameter(head.weight.detach().clone(), False)
        stages.append(_Stage(name, None, {name: head}))
    return stages


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


def _left_dense(model: nn.Module, stages: Sequence[_Stage]) -> tuple[str, ...]:
    """Names of the linear layers that no stage quantises."""
    chosen = {name for stage in stages for name in stage.linears}
    return tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in chosen)


def _quantize_stage(
    stage: _Stage,
    number: int,
    runner: _BlockRunner | None,
    method: Method,
    partial: _Partial,
    device: torch.device,
    report: Report,
    clock: _Clock,
    bar: tqdm[Any],
) -> None:
    """Calibrate one stage and quantise its layers, unless a run before has done so."""
    saved = partial.load(number)
    hooks = HessianHooks({} if saved is not None else stage.linears)
    if runner is not None:
        with hooks:
            runner.run(stage)
        hooks.reduce()
        report.seconds["calibrate"] += clock.lap()
    if saved is not None:
        stage.results = saved
        bar.update(len(saved))
        return
    lookup = method.lookup().to(device)
    groups = hooks.groups() if runner is not None else {name: [name] for name in stage.linears}
    missing = [name for name in stage.linears if not any(name in group for group in groups.values())]
    if missing:
        raise ValueError(f"include must match layers that the calibration text reaches, got {missing[0]}, never called")
    for turn, (leader, group) in enumerate(groups.items()):
        mine = turn % _world() == _rank()
        hessian = hooks.hessian(leader) if runner is not None and mine else None
        for name in group:
            if mine:
                weight = stage.linears[name].weight.to(device)
                widths = [b for b in REPORT_WIDTHS if b <= method.master_bits]
                result = quantize_weight(weight, hessian, method, lookup=lookup, report_widths=widths, where=name)
                stage.results[name] = _to_cpu(result)
                errors = ", ".join(f"{b} bits {error:.1e}" for b, error in result.errors.items())
                bar.set_postfix_str(f"{name}: {errors}" if errors else name)
            bar.update()
    _share(stage, list(groups.values()))
    for name, result in stage.results.items():
        report.errors[name] = result.errors
        if result.damping > method.damping:
            report.damping[name] = result.damping
    if _rank() == 0:
        partial.save(number, stage.results)
    report.seconds["solve"] += clock.lap()


class _BlockRunner:
    """Carries the calibration activations through the model, stage by stage."""

    def __init__(
        self, model: PreTrainedModel, stages: Sequence[_Stage], tokens: Tensor, batch_size: int, device: torch.device
    ) -> None:
        self._model, self._device = model, device
        self._hidden: list[Tensor] = []
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        batches = list(tokens.split(batch_size))
        if len(batches) < _world():
            raise ValueError(f"samples must give every one of {_world()} processes a batch, got {len(batches)} batches")
        first = stages[0].block
        assert first is not None
        handle = first.register_forward_pre_hook(self._catch, with_kwargs=True)
        for batch in batches[_rank() :: _world()]:
            with contextlib.suppress(_CaughtInputs):
                model(input_ids=batch, use_cache=False)
        handle.remove()

    def _catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        self._hidden.append(hidden)
        self._calls.append((_move(args[1:], self._device), _move(kwargs, self._device)))
        raise _CaughtInputs

    def run(self, stage: _Stage) -> None:
        """Run one stage over all batches; what comes out of a block goes into the next."""
        if stage.block is None:
            return self._run_head()
        block = stage.block.to(self._device)
        for i, (args, kwargs) in enumerate(self._calls):
            output = block(self._hidden[i].to(self._device), *args, **kwargs)
            self._hidden[i] = (output[0] if isinstance(output, tuple) else output).to("cpu")
        block.to("cpu")

    def _run_head(self) -> None:
        """The output layer sees what the model does after its last block: run it with no blocks at all."""
        blocks = find_blocks(self._model)
        kept = list(blocks)
        del blocks[:]
        try:
            for hidden in self._hidden:
                self._model(inputs_embeds=hidden, use_cache=False)
        finally:
            blocks.extend(kept)


class _CaughtInputs(Exception):
    """Ends a forward pass at the first block."""


class _Partial:
    """The folder of an unfinished run: the arguments it was started with, and a file for each finished stage."""

    def __init__(self, out: Path, arguments: dict[str, Any]) -> None:
        self.folder = out.with_name(f"{out.name}.partial")
        written = self.folder / "arguments.json"
        if written.exists():
            before = json.loads(written.read_text(encoding="utf-8"))
            changed = [key for key, value in arguments.items() if before.get(key) != json.loads(json.dumps(value))]
            if changed:
                raise ValueError(
                    f"out must not have an unfinished run with other arguments: {self.folder} differs in "
                    f"{', '.join(changed)}; remove it or choose another folder"
                )
        _barrier()
        if _rank() == 0 and not written.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(written, arguments)
        _barrier()

    def _path(self, number: int) -> Path:
        return self.folder / f"stage-{number:04}.safetensors"

    def save(self, number: int, results: dict[str, QuantizedWeight]) -> None:
        """Keep a finished stage; the file appears whole or not at all."""
        tensors = {f"{name}.{key}": t for name, result in results.items() for key, t in result.tensors().items()}
        temporary = self._path(number).with_suffix(".tmp")
        save_file(tensors, temporary)
        temporary.rename(self._path(number))

    def load(self, number: int) -> dict[str, QuantizedWeight] | None:
        """A stage that a run before has finished, or None."""
        if not self._path(number).exists():
            return None
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(self._path(number)).items():
            name, _, part = key.rpartition(".")
            parts.setdefault(name, {})[part] = tensor
        return {name: QuantizedWeight.from_tensors(tensors) for name, tensors in parts.items()}


def _to_cpu(result: QuantizedWeight) -> QuantizedWeight:
    moved = QuantizedWeight.from_tensors({name: tensor.cpu() for name, tensor in result.tensors().items()})
    return dataclasses.replace(moved, errors=result.errors, damping=result.damping)


def _share(stage: _Stage, groups: list[list[str]]) -> None:
    """Give every rank the layers that each has quantised, in the model's order."""
    if _world() > 1:
        gathered: list[Any] = [None] * _world()
        dist.all_gather_object(gathered, stage.results)
        stage.results = {name: result for part in gathered for name, result in part.items()}
    stage.results = {name: stage.results[name] for name in stage.linears}


class _Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        start, self._start = self._start, time.perf_counter()
        return self._start - start


def _move(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_move(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    return value


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
