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
import fcntl
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..checkpoint import CheckpointError, open_weights, read_json
from ..config import QuantConfig
from ..export import insert_results, write_model
from ..folder import WEIGHT_SUFFIXES, check_new, publish, write_json
from ..slicing import check_bits, group_count
from .calibration import calibration_tokens
from .distributed import barrier, rank, world
from .gptq import Method, QuantizedWeight, quantize_weight
from .hessian import HessianHooks
from .stages import BlockRunner, Stage, find_stages, left_dense

logger = logging.getLogger(__name__)
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
        FileExistsError: ``out`` is there already, or another run writes it.
        ValueError: an argument does not fit the model, or an unfinished run with other arguments, or with weights that
            have changed since, is in the way.
    """
    method = method or Method()
    if batch_size <= 0:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    check_new(out)
    report, clock = Report(Path(out)), _Clock()
    out = Path(out).resolve()
    bits = method.master_bits if bits is None else check_bits(bits, most=method.master_bits)
    if method.needs_hessian and calibration is None:
        needs = "feedback" if method.feedback else "act_order" if method.act_order else "own_scales"
        raise ValueError(f"calibration must name a text for a method with {needs}, got None")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

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
        "weight files": _weight_files(model) or getattr(dense.config, "_commit_hash", None),
        "tokens": None if tokens is None else [list(tokens.shape), int(tokens.sum()), batch_size],
    }
    with _Partial(out, arguments) as partial:
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


def _weight_files(model: str | Path) -> list[list[Any]]:
    """Name, size and time of each weight file of a folder; nothing for a name on the hub."""
    files = sorted(Path(model).iterdir()) if Path(model).is_dir() else []
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.suffix in WEIGHT_SUFFIXES]


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
        return _report(stage, method, report)
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
    _report(stage, method, report)
    if rank() == 0:
        partial.save(number, stage.results)
    report.seconds["solve"] += clock.lap()


def _report(stage: Stage, method: Method, report: Report) -> None:
    for name, result in stage.results.items():
        report.errors[name] = result.errors
        if result.damping > method.damping:
            report.damping[name] = result.damping


class _Partial:
    """The folder of an unfinished run: the arguments it was started with, and a file for each finished stage.

    Rank 0 holds a lock on it while it is entered; the system takes the lock back from a process that ends.
    """

    def __init__(self, out: Path, arguments: dict[str, Any]) -> None:
        self.folder = out.with_name(f"{out.name}.partial")
        self._arguments: dict[str, Any] = json.loads(json.dumps(arguments))

    def __enter__(self) -> _Partial:
        with contextlib.ExitStack() as undo:
            if rank() == 0:
                undo.callback(self._lock().close)
                self._check_arguments()
            barrier()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _lock(self) -> TextIO:
        """Make the folder if it is not there, and lock it."""
        lock = self.folder / "matgptq.lock"
        if self.folder.exists() and not lock.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise FileExistsError(f"out must leave {self.folder} to the unfinished run, got something else there")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise FileExistsError(f"out must not be written by another run, got one that holds {lock}") from None
        except OSError as error:
            logger.warning("%s: two runs at once would not be noticed, this file system has no locks: %s", lock, error)
        return file

    def _check_arguments(self) -> None:
        """Refuse to go on with finished stages of other arguments; without a finished stage, begin anew."""
        written = self.folder / "arguments.json"
        if any(self.folder.glob("stage-*.safetensors")):
            before = read_json(written)
            changed = [key for key, value in self._arguments.items() if before.get(key) != value]
            if changed:
                raise ValueError(
                    f"out must not have an unfinished run with other arguments: {self.folder} differs in "
                    f"{', '.join(changed)}; remove it or choose another folder"
                )
        else:
            write_json(written, self._arguments)

    def _path(self, number: int) -> Path:
        return self.folder / f"stage-{number:04}.safetensors"

    def save(self, number: int, results: dict[str, QuantizedWeight]) -> None:
        """Keep a finished stage; the file appears whole or not at all."""
        tensors = {f"{name}.{key}": t for name, result in results.items() for key, t in result.tensors().items()}
        temporary = self._path(number).with_suffix(".tmp")
        measured = {name: json.dumps([result.errors, result.damping]) for name, result in results.items()}
        save_file(tensors, temporary, metadata=measured)
        temporary.rename(self._path(number))

    def load(self, number: int) -> dict[str, QuantizedWeight] | None:
        """A stage that a run before has finished, or None."""
        path = self._path(number)
        if not path.exists():
            return None
        parts: dict[str, dict[str, Tensor]] = {}
        try:
            with open_weights(path) as handle:
                measured = handle.metadata()
                for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    name, _, part = key.rpartition(".")
                    parts.setdefault(name, {})[part] = handle.get_tensor(key)
        except CheckpointError as error:
            logger.warning("%s: its layers are quantised again", error)
            return None
        results = {name: QuantizedWeight.from_tensors(tensors) for name, tensors in parts.items()}
        for name, result in results.items():
            errors, result.damping = json.loads(measured[name])
            result.errors = {int(bits): error for bits, error in errors.items()}
        return results


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
