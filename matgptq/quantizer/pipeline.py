"""Quantise a whole model, block by block, and write it as a model folder.

One block is on the device at a time, with the activations that enter it. A pass over the calibration tokens gives both
the Hessians of the block's layers and the (dense) activations that enter the next block, so calibration costs one
forward pass of the model. What is finished is kept in ``<out>.partial``: the same command goes on after the last
finished block.

With ``torch.distributed`` initialised, the batches of calibration tokens are spread over the ranks, the Hessians are
summed, and each rank quantises its share of the layers. Rank 0 writes.
"""

from __future__ import annotations

import dataclasses
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
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..config import QuantConfig
from ..export import insert_results, write_model
from ..folder import check_new, publish, write_json
from ..slicing import check_bits, group_count
from .calibration import calibration_tokens
from .distributed import barrier, rank, world
from .gptq import Method, QuantizedWeight, quantize_weight
from .hessian import HessianHooks
from .stages import BlockRunner, Stage, find_stages, left_dense

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
    stages = find_stages(dense, include, exclude, lm_head)
    for stage in stages:
        for name, linear in stage.linears.items():
            if linear.in_features % 16:
                raise ValueError(f"in_features must be a multiple of 16, got {linear.in_features} ({name}): exclude it")
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
        modules_to_not_convert=left_dense(dense, stages),
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
        runner = None if tokens is None else BlockRunner(dense, stages, tokens, batch_size, device)
        report.seconds |= {"calibrate": clock.lap(), "solve": 0.0}
        total = sum(len(stage.linears) for stage in stages)
        with tqdm(total=total, desc="quantize", unit="layer", disable=not progress or rank() > 0) as bar:
            for number, stage in enumerate(stages):
                _quantize_stage(stage, number, runner, method, partial, device, report, clock, bar)
    report.seconds["calibrate"] += clock.lap()

    if rank() == 0:
        for stage in stages:
            insert_results(dense, stage.results, config)
        dense.to(stored_dtype)
        finished = partial.folder / "model"
        shutil.rmtree(finished, ignore_errors=True)
        write_model(dense, config, model, tokenizer, finished)
        publish(finished, out)
        shutil.rmtree(partial.folder)
    barrier()
    report.seconds["write"] = clock.lap()
    return report


def _quantize_stage(
    stage: Stage,
    number: int,
    runner: BlockRunner | None,
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
        mine = turn % world() == rank()
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
    if rank() == 0:
        partial.save(number, stage.results)
    report.seconds["solve"] += clock.lap()


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
        barrier()
        if rank() == 0 and not written.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(written, arguments)
        barrier()

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


def _share(stage: Stage, groups: list[list[str]]) -> None:
    """Give every rank the layers that each has quantised, in the model's order."""
    if world() > 1:
        gathered: list[Any] = [None] * world()
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
