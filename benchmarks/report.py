"""Write the tables and plots of the documentation from the results files.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from matgptq.bench import plot as plot_speed
from matgptq.bench import target_us
from matgptq.evaluate import WidthResult, plot
from matgptq.plots import new_axes, save

ROOT = Path(__file__).parents[1]
WIDTHS = ("8", "6", "4", "3", "2")
SHOWN = ((8192, 8192), (16384, 16384), (4096, 4096))  # shapes with a table of their own


def number(value: float | None) -> str:
    """A perplexity as a table shows it."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}".replace("e+0", "e")


def fill(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks called ``name`` of a Markdown page."""
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    content = page.read_text(encoding="utf-8")
    if not mark.search(content):
        raise ValueError(f"{page} must have the marks <!-- {name} --> and <!-- /{name} -->")
    page.write_text(mark.sub(lambda found: found[1] + text + found[2], content), encoding="utf-8")


def quality_table(quality: dict[str, Any]) -> str:
    """Perplexity by method and width."""
    lines = ["| perplexity | 8 bits | 6 | 4 | 3 | 2 |", "| --- | --- | --- | --- | --- | --- |"]
    lines.append(f"| dense | {number(quality['dense_perplexity'])} | | | | |")
    for row in quality["results"]:
        cells = " | ".join(number(row["perplexity"].get(bits)) for bits in WIDTHS)
        lines.append(f"| {row['method']} | {cells} |")
    return "\n".join(lines) + "\n"


def demo_table(demo: dict[str, Any]) -> str:
    """What ``make demo`` printed: perplexity, size and answer by width."""
    lines = ["| | perplexity | weights | what is the capital of France? |", "| --- | --- | --- | --- |"]
    lines.append(f"| dense | {number(demo['dense_perplexity'])} | {demo['dense_bytes'] / 1e6:.0f} MB | |")
    for bits, row in demo["widths"].items():
        answer = row["answer"].replace("|", "\\|")
        lines.append(f"| {bits} bits | {number(row['perplexity'])} | {row['bytes'] / 1e6:.0f} MB | {answer} |")
    return "\n".join(lines) + "\n"


def of_shape(report: dict[str, Any], N: int, K: int) -> dict[tuple[int, int], dict[str, Any]]:
    """The results of one shape by width and tokens: packed, fp16, groups of 128."""
    kind = {"N": N, "K": K, "dtype": "float16", "group_size": 128, "mode": "packed"}
    rows = (r for r in report["results"] if kind.items() <= r.items())
    return {(r["bits"], r["M"]): r for r in rows}


def gpu_table(report: dict[str, Any]) -> str:
    """Microseconds of a call and the speed-up over torch.matmul, by width and tokens."""
    rows = of_shape(report, 8192, 8192)
    batches = (1, 8, 16, 64)
    lines = ["| 8192 x 8192, microseconds (times torch.matmul's speed) | " + " | ".join(f"M = {m}" for m in batches)]
    lines[0] += " |\n| --- |" + " --- |" * len(batches)
    for bits in (2, 4, 8):
        found = [rows[bits, m] for m in batches]
        lines.append(f"| {bits} bits | " + " | ".join(f"{r['us']:.1f} ({ratio(r):.2f})" for r in found) + " |")
    return "\n".join(lines) + "\n"


def ratio(row: dict[str, Any], peer: str = "torch") -> float:
    """How many times as fast as torch.matmul, or as a peer."""
    return (row["torch_us"] if peer == "torch" else row["peers_us"][peer]) / row["us"]


def linear_tables(report: dict[str, Any]) -> str:
    """Microseconds by shape, width and tokens with the target in brackets, then how all points compare."""
    shapes = dict.fromkeys((r["N"], r["K"]) for r in report["results"])
    every = [r for shape in shapes for r in of_shape(report, *shape).values()]
    batches = sorted({r["M"] for r in every})
    parts = []
    for shape in SHOWN:
        rows = of_shape(report, *shape)
        lines = [f"| {shape[0]} x {shape[1]} | " + " | ".join(f"M = {m}" for m in batches) + " |"]
        lines.append("| --- |" + " --- |" * len(batches))
        for bits in sorted({bits for bits, _ in rows}):
            found = [rows.get((bits, m)) for m in batches]
            cells = [f"{r['us']:.1f} ({target_us(r):.1f})" if r else "" for r in found]
            lines.append(f"| {bits} bits | " + " | ".join(cells) + " |")
        for bits in sorted({bits for (bits, _), r in rows.items() if "humming" in r["peers_us"]}):
            found = [rows.get((bits, m), {}).get("peers_us", {}).get("humming") for m in batches]
            lines.append(f"| Humming, {bits} bits | " + " | ".join(f"{us:.1f}" if us else "" for us in found) + " |")
        torch_us = {m: r["torch_us"] for (_, m), r in rows.items()}
        lines.append("| cuBLAS | " + " | ".join(f"{torch_us[m]:.1f}" if m in torch_us else "" for m in batches) + " |")
        parts.append("\n".join(lines) + "\n")
    lines = ["| least / median / most | " + " | ".join(f"M = {m}" for m in batches) + " |"]
    lines.append("| --- |" + " --- |" * len(batches))
    for name, of, among in (
        ("speed-up over cuBLAS", ratio, every),
        ("speed-up over Humming", lambda r: ratio(r, "humming"), [r for r in every if "humming" in r["peers_us"]]),
        ("time / target", lambda r: r["us"] / target_us(r), every),
    ):
        by_batch = [[of(r) for r in among if r["M"] == m] for m in batches]
        cells = [f"{min(v):.2f} / {statistics.median(v):.2f} / {max(v):.2f}" if v else "" for v in by_batch]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*parts, "\n".join(lines) + "\n"])


def transformers_table(report: dict[str, Any]) -> str:
    """Tokens a second by width and loop; a change of width."""
    loops = list(dict.fromkeys(r["loop"] for r in report["results"]))
    batches = list(dict.fromkeys(b for r in report["results"] for b in r["tokens_per_second"]))
    columns = [(loop, batch) for loop in loops for batch in batches]
    found = {
        (r["bits"], r["loop"], batch): rate for r in report["results"] for batch, rate in r["tokens_per_second"].items()
    }
    lines = [
        f"{report['device']}, Transformers {report['transformers']}, torch {report['torch']}, {report['model']}, "
        f"{report['prompt_tokens']} tokens in, {report['new_tokens']} out; tokens a second (times dense).\n",
        "| | " + " | ".join(f"`{loop}`, batch {batch}" for loop, batch in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for bits in sorted({r["bits"] for r in report["results"]}):
        cells = []
        for column in columns:
            rate, dense = found.get((bits, *column)), found.get((16, *column))
            ratio = f" ({rate / dense:.2f})" if rate and dense and bits != 16 else ""
            cells.append(f"{rate:.0f}{ratio}" if rate else "")
        lines.append(f"| {'dense' if bits == 16 else f'{bits} bits'} | " + " | ".join(cells) + " |")
    first = [c["seconds"] * 1e3 for c in report["width_changes"][: len(report["width_changes"]) // 2]]
    again = [c["seconds"] * 1e3 for c in report["width_changes"][len(report["width_changes"]) // 2 :]]
    lines.append(
        f"\nA change to a width takes {min(first):.0f} to {max(first):.0f} ms the first time and {min(again):.0f} to "
        f"{max(again):.0f} ms later; the tokens of a width are the same when it comes back."
    )
    return "\n".join(lines) + "\n"


def vllm_table(report: dict[str, Any]) -> str:
    """Seconds of a run in vLLM and the speed-up over bf16, by linear layer and batch size."""
    (dense,) = (row for row in report["results"] if row["linear"] == "bf16")
    batches = list(dense["seconds"])
    lines = [
        f"{report['device']}, vLLM {report['vllm']}, {report['model']}. {report['method']} (times bf16's speed).\n",
        "| | GiB | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "| --- | --- |" + " --- |" * len(batches),
    ]
    for row in report["results"]:
        cells = [
            f"{row['seconds'][b]:.3f} ({dense['seconds'][b] / row['seconds'][b]:.2f})" if b in row["seconds"] else ""
            for b in batches
        ]
        lines.append(f"| {row['linear']} | {row['weights_gib']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_vllm(report: dict[str, Any], path: Path) -> None:
    """Draw the speed-up over bf16 in vLLM by batch size, a line a linear layer."""
    (dense,) = (row for row in report["results"] if row["linear"] == "bf16")
    batches = sorted(map(int, dense["seconds"]))
    title = f"{report['device']}, vLLM {report['vllm']}"
    axes = new_axes(xlabel="batch size", ylabel="speed-up over bf16", title=title, xscale="log")
    for row in report["results"]:
        if row.get("mode") == "resident":
            continue
        points = [(b, dense["seconds"][str(b)] / row["seconds"][str(b)]) for b in batches if str(b) in row["seconds"]]
        style = "o-" if "mode" in row else "--"
        axes.plot(*zip(*points, strict=True), style, label=row["linear"])
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.minorticks_off()
    save(axes, [path])


def headline(report: dict[str, Any]) -> str:
    """The one number of the first screen."""
    row = of_shape(report, 8192, 8192)[4, 1]
    return (
        f"**{ratio(row):.1f} times as fast as `torch.matmul` in float16**: a linear layer of {row['N']} x {row['K']}, "
        f"4 bits, one token,\n{report['device']} ({row['us']:.1f} against {row['torch_us']:.1f} microseconds, "
        f"`benchmarks/results/h200`).\n"
    )


def write_linear(report: dict[str, Any], root: Path) -> None:
    """Fill the pages and draw the plots of ``matgptq bench linear``: a plot for each square that was timed."""
    for size in (2048, 4096, 8192, 16384):
        rows = list(of_shape(report, size, size).values())
        if rows:
            title = f"{report['device']}, {size} x {size}, float16"
            plot_speed({**report, "results": rows}, [root / "assets" / f"gpu_benchmark_{size >> 10}k.svg"], title)
    fill(root / "README.md", "headline", headline(report))
    fill(root / "README.md", "gpu", gpu_table(report))
    fill(root / "docs" / "kernels.md", "linear", linear_tables(report))


def main() -> None:
    """Fill the pages and draw the plots."""
    path = ROOT / "benchmarks" / "results" / "h200" / "linear.json"
    write_linear(json.loads(path.read_text(encoding="utf-8")), ROOT)
    served = ROOT / "benchmarks" / "results" / "h200" / "vllm.json"
    if served.exists():
        report = json.loads(served.read_text(encoding="utf-8"))
        fill(ROOT / "docs" / "vllm.md", "vllm", vllm_table(report))
        plot_vllm(report, ROOT / "assets" / "vllm_speedups.svg")
    decoded = ROOT / "benchmarks" / "results" / "h200" / "transformers.json"
    if decoded.exists():
        fill(
            ROOT / "docs" / "transformers.md",
            "transformers",
            transformers_table(json.loads(decoded.read_text("utf-8"))),
        )
    results = ROOT / "benchmarks" / "results" / "cpu"
    quality = json.loads((results / "quality.json").read_text(encoding="utf-8"))
    demo = json.loads((results / "demo.json").read_text(encoding="utf-8"))
    fill(ROOT / "docs" / "quantizer.md", "quality", quality_table(quality))
    fill(ROOT / "README.md", "demo", demo_table(demo))
    rows = [WidthResult(int(bits), row["perplexity"], row["bytes"]) for bits, row in demo["widths"].items()]
    dense = WidthResult(16, demo["dense_perplexity"], demo["dense_bytes"])
    plot(rows, ROOT / "assets" / "perplexity_by_size.svg", dense=dense)


if __name__ == "__main__":
    main()
