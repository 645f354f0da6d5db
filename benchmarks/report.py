"""Write the tables and plots of the documentation from the results files.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from matgptq.bench import plot as plot_speed
from matgptq.evaluate import WidthResult, plot

ROOT = Path(__file__).parents[1]
WIDTHS = ("8", "6", "4", "3", "2")


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


def gpu_table(report: dict[str, Any]) -> str:
    """Microseconds of a call and the speed-up over torch.matmul, by width and tokens."""
    rows = {(r["bits"], r["M"]): r for r in report["results"]}
    widths, batches = (sorted({key[i] for key in rows}) for i in (0, 1))
    shape = f"{report['results'][0]['N']} x {report['results'][0]['K']}"
    lines = [
        f"| {shape}, microseconds (times torch.matmul's speed) | " + " | ".join(f"M = {m}" for m in batches) + " |"
    ]
    lines.append("| --- |" + " --- |" * len(batches))
    for bits in widths:
        found = [rows[bits, m] for m in batches]
        cells = " | ".join(f"{r['us']:.1f} ({r['torch_us'] / r['us']:.2f})" for r in found)
        lines.append(f"| {bits} bits | {cells} |")
    return "\n".join(lines) + "\n"


def headline(report: dict[str, Any]) -> str:
    """The one number of the first screen."""
    (row,) = (r for r in report["results"] if r["bits"] == 4 and r["M"] == 1)
    speed = row["torch_us"] / row["us"]
    return (
        f"**{speed:.1f} times as fast as `torch.matmul` in float16**: a linear layer of {row['N']} x {row['K']}, "
        f"4 bits, one token,\n{report['device']} ({row['us']:.1f} against {row['torch_us']:.1f} microseconds, "
        f"`benchmarks/results/h200`).\n"
    )


def main() -> None:
    """Fill the pages and draw the plots."""
    path = ROOT / "benchmarks" / "results" / "h200" / "8192x8192_float16_packed.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    plot_speed(report, [ROOT / "assets" / "gpu_benchmark_8k.svg"], f"{report['device']}, 8192 x 8192, float16")
    fill(ROOT / "README.md", "headline", headline(report))
    fill(ROOT / "README.md", "gpu", gpu_table(report))
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
