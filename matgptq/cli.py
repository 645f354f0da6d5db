"""Command line: ``matgptq quantize | slice | convert | generate | eval | info | dummy | bench``.

Thin over the library. With ``--json`` the last line of the output is one JSON object. An error that the user can mend
is one line on standard error and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from . import __version__, bench_linear
from .config import QuantConfig, read_widths
from .folder import slice_folder
from .info import info_of
from .packed import check_device
from .slicing import MAX_BITS, RULES

WIDTHS = (8, 6, 4, 3, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        check_device(getattr(options, "device", None), "--device")
        result: dict[str, Any] = options.run(options)
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:  # the last one: disk full
        print(f"matgptq {options.command}: error: {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:  # a kernel's result was wrong
        print(f"matgptq {options.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"matgptq {options.command}: interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(result))
    return 0


def quantize(options: argparse.Namespace) -> dict[str, Any]:
    """``matgptq quantize``: a dense model to a nested one."""
    from .quantizer.gptq import Method
    from .quantizer.pipeline import quantize as run

    device = options.device
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by torchrun
        torch.distributed.init_process_group("gloo" if device == "cpu" else None)
        if device in (None, "cuda") and torch.cuda.is_available():  # a GPU for each process
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
    master_bits = MAX_BITS
    widths, lambdas = tuple(options.widths or (3, 4, 8)), options.lambdas and tuple(options.lambdas)
    if options.method != "matgptq":
        for name in ("widths", "lambdas"):
            if getattr(options, name):
                raise ValueError(f"--{name} goes with --method matgptq, got --method {options.method}")
        if options.method == "gptq":
            if options.bits is None:
                raise ValueError("--method gptq needs --bits, the one width to quantise for")
            master_bits = options.bits
        widths, lambdas = (master_bits,), None
        options.own_scales = options.own_scales or []
    method = Method(
        widths=widths,
        lambdas=lambdas,
        master_bits=master_bits,
        group_size=options.group_size,
        sym=not options.asym,
        rule=options.slicing,
        act_order=options.act_order,
        static_groups=not options.dynamic_groups,
        damping=options.damping,
        feedback=options.method != "rtn",
        own_scales=None if options.own_scales is None else tuple(options.own_scales),
    )
    report = run(
        options.model,
        options.out,
        method,
        bits=options.bits,
        calibration=options.calibration,
        samples=options.samples,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        include=options.include,
        exclude=options.exclude,
        lm_head=options.lm_head,
        device=device,
        seed=options.seed,
        progress=not options.quiet,
    )
    for name, damping in report.damping.items():
        print(f"{name}: Hessian singular, damped by {damping:g} of its mean diagonal", file=sys.stderr)
    if not options.quiet:
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
        print(f"wrote {report.out} ({stages})")
    return {"out": str(report.out), "seconds": report.seconds, "errors": report.errors, "damping": report.damping}


def slice_(options: argparse.Namespace) -> dict[str, Any]:
    """``matgptq slice``: a folder cut to a width, its bits packed."""
    bits = read_widths(options.bits_file) if options.bits_file else options.bits
    config = slice_folder(options.model, options.out, bits)
    before, after = _folder_bytes(options.model), _folder_bytes(options.out)
    print(f"wrote {options.out}: {after / 1e6:.1f} MB of weights, from {before / 1e6:.1f} MB")
    return {"out": str(options.out), "bytes": after, "source_bytes": before, "bits": config.bits}


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """``matgptq convert``: the published quantiser's raw output to a folder."""
    from .export import convert as run

    config = run(
        options.raw,
        options.model,
        options.out,
        bits=options.bits,
        widths=options.bits_file,
        master_bits=options.master_bits,
    )
    print(f"wrote {options.out}")
    return {"out": str(options.out), **config.to_dict()}


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """``matgptq generate``: the answer to a prompt, token by token as it comes."""
    from transformers import AutoTokenizer, TextStreamer

    from .decode import Decoder, prompt_ids
    from .hf import load

    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be positive, got {options.max_new_tokens}")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = load(options.model, options.bits, dtype=_dtype(options), device=options.device)
    ids = prompt_ids(tokenizer, options.prompt, chat=not options.raw)
    decoder = Decoder(model, max_length=ids.shape[1] + options.max_new_tokens, compile=options.compile)
    decoder.prepare()
    streamer = None if options.quiet else TextStreamer(tokenizer, skip_special_tokens=True)
    new: list[int] = []
    start = time.perf_counter()
    for token in decoder.stream(ids, eos_token_id=model.generation_config.eos_token_id):
        new.append(int(token))
        if streamer:
            streamer.put(token)
    seconds = time.perf_counter() - start
    if streamer:
        streamer.end()
        print(f"[{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} tokens/s]", file=sys.stderr)
    return {"answer": tokenizer.decode(new, skip_special_tokens=True), "tokens": len(new), "seconds": seconds}


def eval_(options: argparse.Namespace) -> dict[str, Any]:
    """``matgptq eval``: perplexity on a text file, by width."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .evaluate import WidthResult, evaluate, model_bytes, perplexity, plot, read_tokens
    from .hf import load
    from .plots import check_path

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = read_tokens(options.text, tokenizer, options.tokens, options.sequence_length)
    folder_bytes = info_of(options.model)["bytes_by_width"]
    widths = options.bits or [bits for bits in WIDTHS if str(bits) in folder_bytes]
    if not set(map(str, widths)) <= set(folder_bytes) or not widths:
        served = ", ".join(folder_bytes) or "no width: its layers are cut to different ones"
        raise ValueError(f"--bits must be among what all layers of {options.model} serve, {served}, got {widths}")
    if options.plot:
        check_path(options.plot)
    dense = None
    if options.dense:
        base = AutoModelForCausalLM.from_pretrained(options.dense, dtype="auto")
        size = model_bytes(base)
        base = base.to(_dtype(options, base.dtype)).to(options.device or "cpu")
        value = perplexity(base, tokens, batch_size=options.batch_size, progress=None if options.quiet else "dense")
        dense = WidthResult(16, value, size)
        del base
    model = load(options.model, dtype=_dtype(options), device=options.device)
    results = evaluate(model, tokens, widths, batch_size=options.batch_size, progress=not options.quiet)
    results = [WidthResult(r.bits, r.perplexity, folder_bytes.get(str(r.bits), r.nbytes)) for r in results]
    print(f"{'width':>7}  {'perplexity':>12}  {'weights (MB)':>12}")
    for row in (*([dense] if dense else []), *results):
        name = "dense" if row is dense else f"{row.bits} bits"
        print(f"{name:>7}  {row.perplexity:12.2f}  {row.nbytes / 1e6:12.1f}")
    if options.plot:
        plot(results, options.plot, dense=dense)
    return {
        "model": str(options.model),
        "dense_perplexity": dense and _finite(dense.perplexity),
        "dense_bytes": dense and dense.nbytes,
        "widths": {str(r.bits): {"perplexity": _finite(r.perplexity), "bytes": r.nbytes} for r in results},
    }


def info(options: argparse.Namespace) -> dict[str, Any]:
    """``matgptq info``: layers, widths and sizes, read from the headers alone."""
    result = info_of(options.model)
    if not options.json:
        for key in ("quantized_layers", "quantized_weights", "group_size", "sym", "slicing", "master_bits"):
            print(f"{key.replace('_', ' '):18} {result[key]}")
        for key, title in (("stored_bits", "stored bits"), ("bits", "served bits")):
            print(f"{title:18} " + ", ".join(f"{bits} ({count} layers)" for bits, count in result[key].items()))
        print(f"{'weights':18} {result['bytes'] / 1e6:.1f} MB, {result['dense_bytes'] / 1e6:.1f} MB of them dense")
        for bits, size in result["bytes_by_width"].items():
            print(f"{'  cut to ' + bits + ' bits':18} {size / 1e6:.1f} MB")
    if options.layers:
        for name, layer in result["layers"].items():
            shape = f"{layer['out_features']} x {layer['in_features']}"
            print(f"{name}  {shape}  {layer['bits']} of {layer['stored_bits']} bits")
    return result


def dummy(options: argparse.Namespace) -> dict[str, Any]:
    """``matgptq dummy``: a folder of a known geometry with random contents."""
    from .dummy import write_dummy

    quantization = None
    if options.dense and (options.packed or options.asym):
        raise ValueError("dense must not go with packed or asym, which say how to quantise, got both")
    if not options.dense:
        quantization = QuantConfig(bits=options.bits, group_size=options.group_size, sym=not options.asym)
    write_dummy(
        options.arch,
        options.out,
        quantization=quantization,
        stored_bits=options.bits if options.packed else None,
        dtype=getattr(torch, options.dtype),
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        seed=options.seed,
        config_only=options.config_only,
    )
    print(f"wrote {options.out}: {_folder_bytes(options.out) / 1e6:.1f} MB of weights")
    return {"out": str(options.out), "bytes": _folder_bytes(options.out)}


def _finite(value: float) -> float | None:
    """``value``, or None, which JSON has a word for, where it is infinite or not a number."""
    return value if math.isfinite(value) else None


def _folder_bytes(folder: str | Path) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _dtype(options: argparse.Namespace, stored: torch.dtype | None = None) -> torch.dtype | str:
    """Activation type: as asked; else float32 on a CPU, where 16 bits is slower, and the model's own on a GPU."""
    if options.dtype:
        return getattr(torch, options.dtype)  # type: ignore[no-any-return]
    if torch.device(options.device or "cpu").type == "cpu":
        return torch.float32
    return stored or "auto"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matgptq", description="Quantise, cut, run and measure nested-quantised language models."
    )
    parser.add_argument("--version", action="version", version=f"matgptq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
        return sub

    def computing(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--device", help="where to compute, such as cuda or cpu (the CPU if not given)")
        sub.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="type of activations")
        sub.add_argument("--quiet", action="store_true", help="no progress")

    sub = command("quantize", quantize, "Quantise a model folder to nested codes.")
    sub.add_argument("model", help="model folder, or name on the Hugging Face hub")
    sub.add_argument("--out", required=True, type=Path, help="folder to write; must be new")
    sub.add_argument("--method", choices=("matgptq", "gptq", "rtn"), default="matgptq", help="rtn: round to nearest")
    sub.add_argument("--widths", type=int, nargs="+", help="trained widths, bits (3 4 8)")
    sub.add_argument(
        "--lambdas", type=float, nargs="+", help="weight of each width's squared error (1; 512 for 8 bits)"
    )
    sub.add_argument("--bits", type=int, help="width served by default, bits (8); the one width of gptq")
    sub.add_argument("--group-size", type=int, default=128, help="weights that share a scale; -1: a whole row")
    sub.add_argument("--asym", action="store_true", help="a zero for each group, not the middle code for all")
    sub.add_argument("--slicing", choices=RULES, default="round", help="how a narrower code follows from a wider one")
    sub.add_argument("--act-order", action="store_true", help="quantise the columns that matter most first")
    sub.add_argument(
        "--dynamic-groups",
        action="store_true",
        help="scales from corrected weights; act order is stored as a permutation",
    )
    sub.add_argument("--damping", type=float, default=0.1, help="added to the Hessian diagonal, in its mean")
    sub.add_argument(
        "--own-scales", type=int, nargs="*", help="widths with scales of their own (2 3 4 6; rtn, gptq: none)"
    )
    sub.add_argument("--calibration", help="text file, JSONL file, or Hugging Face dataset name[:config][:split]")
    sub.add_argument("--samples", type=int, default=512, help="calibration sequences")
    sub.add_argument("--sequence-length", type=int, default=4096, help="tokens in a calibration sequence")
    sub.add_argument("--batch-size", type=int, default=1, help="sequences in a forward pass")
    sub.add_argument("--include", nargs="+", default=["*"], help="patterns of linear layers to quantise")
    sub.add_argument("--exclude", nargs="+", default=[], help="patterns of linear layers to leave dense")
    sub.add_argument("--lm-head", action="store_true", help="quantise the output layer too")
    sub.add_argument("--device", help="where to compute (a GPU if there is one)")
    sub.add_argument("--seed", type=int, default=0, help="draws the calibration sequences")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")

    sub = command("slice", slice_, "Write a folder cut to a width: only the bits that it serves, packed.")
    sub.add_argument("model", help="model folder")
    sub.add_argument("--out", required=True, type=Path, help="folder to write; must be new")
    width = sub.add_mutually_exclusive_group(required=True)
    width.add_argument("--bits", type=int, help="width, bits")
    width.add_argument("--bits-file", type=Path, help="text file of 'layer name: bits'; other layers keep theirs")

    sub = command("convert", convert, "Write the published quantiser's raw layer folders as a model folder.")
    sub.add_argument("raw", type=Path, help="folder of <layer name>/data.pt")
    sub.add_argument("--model", required=True, help="base model: folder, or name on the Hugging Face hub")
    sub.add_argument("--out", required=True, type=Path, help="folder to write; must be new")
    sub.add_argument("--bits", type=int, default=8, help="width served by default, bits")
    sub.add_argument("--bits-file", type=Path, help="text file of 'layer name: bits' for layers of other widths")
    sub.add_argument("--master-bits", type=int, default=8, help="width of the codes, bits")

    sub = command("generate", generate, "Answer a prompt, greedily.")
    sub.add_argument("model", help="quantised model folder, or name on the Hugging Face hub")
    sub.add_argument("--prompt", required=True, help="put into the model's chat template, if it has one")
    sub.add_argument("--raw", action="store_true", help="do not use the chat template")
    sub.add_argument("--bits", type=int, help="width, bits (the folder's own if not given)")
    sub.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, tokens")
    sub.add_argument("--compile", action="store_true", help="fuse the rest of the model: slow to start, then faster")
    computing(sub)

    sub = command("eval", eval_, "Measure perplexity on a text file at each width.")
    sub.add_argument("model", help="quantised model folder")
    sub.add_argument("--text", required=True, type=Path, help="text file that calibrated nothing")
    sub.add_argument("--bits", type=int, nargs="+", help="widths, bits (those of 8 6 4 3 2 that the folder serves)")
    sub.add_argument("--tokens", type=int, default=8192, help="tokens of the text to use, from its start")
    sub.add_argument("--sequence-length", type=int, default=1024, help="tokens in a sequence")
    sub.add_argument("--batch-size", type=int, default=1, help="sequences in a forward pass")
    sub.add_argument("--dense", help="the model before quantisation, to compare with")
    sub.add_argument("--plot", type=Path, help="draw perplexity against size into this image file")
    computing(sub)

    sub = command("info", info, "Tell a folder's layers, widths and sizes, and what each width would weigh.")
    sub.add_argument("model", help="quantised model folder")
    sub.add_argument("--layers", action="store_true", help="list every layer")

    sub = command("dummy", dummy, "Write a model folder of a known geometry with random weights, to measure speed.")
    sub.add_argument("--arch", required=True, help="llama-3.1-8b, qwen3-8b, ... or a folder with a config.json")
    sub.add_argument("--out", required=True, type=Path, help="folder to write; must be new")
    sub.add_argument("--bits", type=int, default=8, help="width served by default, bits")
    sub.add_argument("--packed", action="store_true", help="store the bits of that width alone")
    sub.add_argument("--dense", action="store_true", help="do not quantise")
    sub.add_argument("--group-size", type=int, default=128, help="weights that share a scale; -1: a whole row")
    sub.add_argument("--asym", action="store_true", help="a zero for each group, not the middle code for all")
    sub.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16", help="type of what is dense")
    sub.add_argument("--device", help="where to draw the numbers (a GPU if there is one)")
    sub.add_argument("--seed", type=int, default=0, help="of the random numbers")
    sub.add_argument("--config-only", action="store_true", help="config.json alone: vLLM makes up weights itself")

    sub = command("bench", bench_linear.run, "Verify, then time one quantised linear layer against torch.matmul.")
    bench_linear.add_options(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
