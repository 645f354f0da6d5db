"""Quality and time of the quantiser on a real model: MatGPTQ, plain GPTQ for one width, and round-to-nearest slices.

    python benchmarks/quality.py build/SmolLM2-135M-Instruct --out benchmarks/results/cpu/quality.json

Every method quantises the same model with the same calibration text by the same code; perplexity is of the first 8,192
tokens of a text that calibrated nothing, in float32. Note that this model's weights were 4-bit once already.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import matgptq
from matgptq.bench import measured_commit
from matgptq.evaluate import evaluate, perplexity, read_tokens

DATA = Path(__file__).parents[1] / "examples" / "data"
GROUP = 64


def methods() -> dict[str, tuple[matgptq.Method, tuple[int, ...]]]:
    """Name -> method and the widths at which it is measured."""

    def one(bits: int, **options: Any) -> matgptq.Method:
        return matgptq.Method(
            widths=(bits,), master_bits=bits, group_size=GROUP, own_scales=(), static_groups=False, **options
        )

    every = (8, 6, 4, 3, 2)
    own = (6, 4, 3, 2)
    found: dict[str, tuple[matgptq.Method, tuple[int, ...]]] = {
        "round to nearest, sliced": (matgptq.Method(group_size=GROUP, feedback=False), every),
        "round to nearest, sliced, scales of their own": (
            matgptq.Method(group_size=GROUP, feedback=False, own_scales=own),
            every,
        ),
        "MatGPTQ": (matgptq.Method(group_size=GROUP), every),
        "MatGPTQ, lambda 1 1 1": (matgptq.Method(group_size=GROUP, lambdas=(1.0, 1.0, 1.0)), (8, 4, 3)),
        "MatGPTQ, shared scales only": (matgptq.Method(group_size=GROUP, own_scales=()), (8, 4, 3)),
        "MatGPTQ, asymmetric": (matgptq.Method(group_size=GROUP, sym=False), (8, 4, 3)),
    }
    for bits in (4, 3):
        found[f"GPTQ, {bits} bits"] = (one(bits, damping=0.01), (bits,))
        found[f"GPTQ, {bits} bits, act order"] = (one(bits, act_order=True), (bits,))
        found[f"GPTQ, {bits} bits, act order, asymmetric"] = (one(bits, act_order=True, sym=False), (bits,))
    return found


def main() -> None:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a dense model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of 1,024 tokens")
    parser.add_argument("--only", nargs="+", choices=list(methods()), help="measure these again, keep the other rows")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = read_tokens(DATA / "evaluation.txt", tokenizer, 8192, 1024)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    results: dict[str, Any] = {
        "model": options.model.name,
        "date": date.today().isoformat(),
        "commit": measured_commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "group_size": GROUP,
        "calibration_tokens": options.samples * 1024,
        "evaluation_tokens": tokens.numel(),
        "dense_perplexity": perplexity(dense, tokens),
        "results": [],
    }
    if options.only and options.out.exists():
        results["results"] = json.loads(options.out.read_text(encoding="utf-8"))["results"]
    del dense
    print(f"dense {results['dense_perplexity']:.2f}", flush=True)
    for name, (method, widths) in methods().items():
        if options.only and name not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model"
            report = matgptq.quantize(
                options.model,
                out,
                method,
                calibration=DATA / "calibration.txt",
                samples=options.samples,
                sequence_length=1024,
                progress=False,
            )
            measured = evaluate(matgptq.load(out, dtype=torch.float32), tokens, widths)
        errors = {b: math.exp(_mean(math.log(e[b]) for e in report.errors.values() if b in e)) for b in widths}
        by_width = {str(r.bits): r.perplexity for r in measured}
        row = {
            "method": name,
            "commit": results["commit"],
            "perplexity": by_width,
            "relative_output_error": {str(b): error for b, error in errors.items()} if method.needs_hessian else None,
            "seconds": report.seconds,
        }
        kept = {other["method"]: other for other in results["results"]} | {name: row}
        results["results"] = [kept[other] for other in methods() if other in kept]
        line = ", ".join(f"{b} bits {value:.2f}" for b, value in by_width.items())
        print(f"{name}: {line}; {sum(report.seconds.values()):.0f} s", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


if __name__ == "__main__":
    main()
