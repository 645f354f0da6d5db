"""Write the tables and plots of the documentation from the results files.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matgptq.bench import plot as plot_speed
from matgptq.bench import target_us
from matgptq.evaluate import WidthResult, plot
from matgptq.plots import new_axes, save

ROOT = Path(__file__).parents[1]
WIDTHS = ("8", "6", "4", "3", "2")
PAR = 0.98  # of cuBLAS's speed: no slower but for noise
SHOWN = ((8192, 8192), (16384, 16384), (4096, 4096), (28672, 4096), (4096, 14336))  # with a table of their own


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


def line(name: str, cells: Iterable[object]) -> str:
    """A line of a table."""
    return (f"| {name} | " if name else "| | ") + " | ".join(map(str, cells)) + " |"


def head(name: str, columns: Sequence[object]) -> list[str]:
    """The first lines of a table."""
    return [line(name, columns), line("---", ["---"] * len(columns))]


def of_tokens(batches: Iterable[int]) -> list[str]:
    """Columns by tokens."""
    return [f"M = {m}" for m in batches]


def quality_table(quality: dict[str, Any]) -> str:
    """Perplexity by method and width."""
    lines = ["| perplexity | 8 bits | 6 | 4 | 3 | 2 |", "| --- | --- | --- | --- | --- | --- |"]
    lines.append(f"| dense | {number(quality['dense_perplexity'])} | | | | |")
    for row in quality["results"]:
        lines.append(line(row["method"], (number(row["perplexity"].get(bits)) for bits in WIDTHS)))
    return "\n".join(lines) + "\n"


def demo_table(demo: dict[str, Any]) -> str:
    """What ``make demo`` printed: perplexity, size and answer by width."""
    lines = head("", ("perplexity", "weights", "what is the capital of France?"))
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


def shapes_of(report: dict[str, Any]) -> list[tuple[int, int]]:
    """out_features and in_features of the layers, in the order of the report."""
    return list(dict.fromkeys((r["N"], r["K"]) for r in report["results"]))


def gpu_table(report: dict[str, Any]) -> str:
    """Microseconds of a call and the speed-up over torch.matmul, by width and tokens."""
    rows = of_shape(report, 8192, 8192)
    batches = [m for m in (1, 8, 16, 32, 64, 256) if (4, m) in rows]
    lines = head("8192 x 8192, microseconds (times torch.matmul's speed)", of_tokens(batches))
    for bits in (2, 4, 8):
        found = [rows[bits, m] for m in batches]
        lines.append(line(f"{bits} bits", map(with_ratio, found)))
    return "\n".join(lines) + "\n"


Peers = dict[tuple[int, int, int, int], float]  # microseconds of Humming by N, K, bits, M


def read_peers(peers: dict[str, Any]) -> Peers:
    """Humming's times from a file that has a row a kernel, shape and width."""
    return {
        (r["N"], r["K"], r["bits"], int(m)): us
        for r in peers["results"]
        if r["kernel"].startswith("humming")
        for m, us in r["us_by_M"].items()
    }


def ratio(row: dict[str, Any]) -> float:
    """How many times as fast as torch.matmul."""
    return row["torch_us"] / row["us"]


def with_ratio(row: dict[str, Any]) -> str:
    """A result as a table shows it, with its speed-up over torch.matmul."""
    return f"{row['us']:.1f} ({ratio(row):.2f})"


def timed(row: dict[str, Any] | None) -> str:
    """A result as a table shows it, with its target if it has one."""
    if row is None:
        return ""
    return f"{row['us']:.1f}" + (f" ({target_us(row):.1f})" if row["M"] <= 64 else "")


def linear_tables(report: dict[str, Any], peers: Peers, batches: Sequence[int], bits: Sequence[int]) -> str:
    """Microseconds by shape, width and tokens, then how all points compare."""
    parts = []
    batches = [m for m in batches if any(r["M"] == m for r in report["results"])]
    for N, K in SHOWN:
        rows = of_shape(report, N, K)
        if not rows:
            continue
        lines = head(f"{N} x {K}", of_tokens(batches))
        for b in bits:
            lines.append(line(f"{b} bits", (timed(rows.get((b, m))) for m in batches)))
        names = " / ".join(str(b) for b in bits)
        theirs = [[peers.get((N, K, b, m)) for b in bits] for m in batches]
        lines.append(line(f"Humming, {names} bits", (" / ".join(f"{us:.1f}" for us in each if us) for each in theirs)))
        torch_us = {m: r["torch_us"] for (_, m), r in rows.items()}
        lines.append(line("cuBLAS", (f"{torch_us[m]:.1f}" if m in torch_us else "" for m in batches)))
        parts.append("\n".join(lines) + "\n")
    lines = head("least / median / most", of_tokens(batches))
    every = [r for shape in shapes_of(report) for r in of_shape(report, *shape).values()]
    both = [(r, peers[key]) for r in every if (key := (r["N"], r["K"], r["bits"], r["M"])) in peers]
    for name, values in (
        ("speed-up over cuBLAS", [(r["M"], ratio(r)) for r in every]),
        ("speed-up over Humming", [(r["M"], us / r["us"]) for r, us in both]),
        ("time / target", [(r["M"], r["us"] / target_us(r)) for r in every if r["M"] <= 64]),
    ):
        by_batch = [[value for M, value in values if m == M] for m in batches]
        cells = [f"{min(v):.2f} / {statistics.median(v):.2f} / {max(v):.2f}" if v else "" for v in by_batch]
        lines.append(line(name, cells))
    return "\n".join([*parts, "\n".join(lines) + "\n"])


def counts(report: dict[str, Any]) -> str:
    """How many of the points meet the target, and how many are no slower than cuBLAS, by tokens and by shape."""
    every = [r for shape in shapes_of(report) for r in of_shape(report, *shape).values()]

    def counted(name: str, rows: list[dict[str, Any]], batches: list[int]) -> str:
        return line(name, (sum(r["M"] == m for r in rows) for m in batches))

    few, many, large = (
        [r for r in every if least <= r["M"] <= most] for least, most in ((1, 64), (32, math.inf), (1024, math.inf))
    )
    batches = sorted({r["M"] for r in few})
    lines = head("points", of_tokens(batches))
    lines.append(counted("timed", few, batches))
    lines.append(counted("within the target", [r for r in few if r["us"] <= target_us(r)], batches))
    lines.append(counted("within 1.05 times it", [r for r in few if r["us"] <= 1.05 * target_us(r)], batches))
    batches = sorted({r["M"] for r in many})
    slower = [r for r in many if ratio(r) < PAR]
    lines += ["", *head("points", of_tokens(batches)), counted("timed", many, batches)]
    lines.append(counted("no slower than cuBLAS (2 %)", [r for r in many if ratio(r) >= PAR], batches))
    lines.append(f"\nFrom M = 32 on {len(many) - len(slower)} of {len(many)} points are no slower than cuBLAS (2 %).")
    if slower:
        by_shape = sorted(((sum((r["N"], r["K"]) == s for r in slower), s) for s in shapes_of(report)), reverse=True)
        where = ", ".join(f"{n} of {N} x {K}" for n, (N, K) in by_shape if n)
        lines[-1] += f" Slower are {where}; at worst {min(map(ratio, slower)):.2f} times its speed."
    if large:
        ahead, par = (sum(ratio(r) >= least for r in large) for least in (1, PAR))
        lines.append(f"From M = 1024 on {ahead} of {len(large)} are no slower, {par} within 2 %.")
    return "\n".join(lines) + "\n"


def models_table(report: dict[str, Any]) -> str:
    """Microseconds and the speed-up over cuBLAS at 4 bits, by shape and tokens."""
    batches = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    lines = head("4 bits", of_tokens(batches))
    layers = {shape: of_shape(report, *shape) for shape in shapes_of(report)}
    for (N, K), rows in layers.items():
        lines.append(line(f"{N} x {K}", (with_ratio(rows[4, m]) for m in batches)))
    medians = [statistics.median(ratio(rows[4, m]) for rows in layers.values()) for m in batches]
    lines.append(line("median", (f"({median:.2f})" for median in medians)))
    return "\n".join(lines) + "\n"


def gated_table(report: dict[str, Any]) -> str:
    """Microseconds of two layers alone, with gate.cu after them, and gated."""
    batches = sorted({M for M, *_ in report["results"]})
    lines = head("", of_tokens(batches))
    for N, K in dict.fromkeys((N, K) for _, N, K, *_ in report["results"]):
        ways = {M: times for M, n, k, bits, times in report["results"] if (n, k, bits) == (N, K, 4)}
        lines.append(line(f"2 x {N} x {K}", (", ".join(f"{us:.1f}" for us in ways[M].values()) for M in batches)))
    return "\n".join(lines) + "\n"


def chain_table(report: dict[str, Any]) -> str:
    """Microseconds of a model's layers in a chain by number of tokens, before and after a change."""
    times = {(model, bits, M): (before, after) for model, M, bits, before, after in report["results"]}
    batches = sorted({M for *_, M in times})
    lines = head("", of_tokens(batches))
    for model, bits in sorted({key[:2] for key in times}):
        cells = (times.get((model, bits, M), ()) for M in batches)
        lines.append(line(f"{model}, {bits} bits", (", ".join(f"{us:.1f}" for us in cell) for cell in cells)))
    return "\n".join(lines) + "\n"


def older_table(report: dict[str, Any], here: dict[str, Any]) -> str:
    """Microseconds of linear.cu's and many.cu's fastest tiles; of another run, of this GPU's own kernel and cuBLAS."""
    times: dict[tuple[int, int, int], dict[str, float]] = {}
    for M, N, K, bits, kernel, _, us in report["results"]:
        best = times.setdefault((N, K, M), {})
        if bits == 4:
            best[kernel] = min(best.get(kernel, us), us)
    batches = sorted({M for *_, M in times})
    lines = head("4 bits", of_tokens(batches))
    for N, K in dict.fromkeys((N, K) for N, K, _ in times):
        for kernel in ("linear", "many"):
            lines.append(line(f"{N} x {K}, {kernel}.cu", (f"{times[N, K, M][kernel]:.1f}" for M in batches)))
        rows = of_shape(here, N, K)
        for name, key in (("hopper.cu", "us"), ("cuBLAS", "torch_us")):
            lines.append(line(name, (f"{rows[4, M][key]:.1f}" for M in batches)))
    return "\n".join(lines) + "\n"


def span(values: Sequence[float]) -> str:
    """The least and the most of them."""
    least, most = f"{min(values):.0f}", f"{max(values):.0f}"
    return least if least == most else f"{least} to {most}"


def transformers_table(report: dict[str, Any]) -> str:
    """Tokens a second by width and loop; a change of width."""
    loops = list(dict.fromkeys(r["loop"] for r in report["results"]))
    batches = list(dict.fromkeys(b for r in report["results"] for b in r["tokens_per_second"]))
    columns = [(loop, batch) for loop in loops for batch in batches]
    found = {
        (r["bits"], r["loop"], batch): rate for r in report["results"] for batch, rate in r["tokens_per_second"].items()
    }
    times_dense = " (times dense)" if any(r["bits"] == 16 for r in report["results"]) else ""
    lines = [
        f"{report['device']}, Transformers {report['transformers']}, torch {report['torch']}, {report['model']}, "
        f"{report['prompt_tokens']} tokens in, {report['new_tokens']} out; tokens a second{times_dense}.\n",
        *head("", [f"`{loop}`, batch {batch}" for loop, batch in columns]),
    ]
    for bits in sorted({r["bits"] for r in report["results"]}):
        cells = []
        for column in columns:
            rate, dense = found.get((bits, *column)), found.get((16, *column))
            ratio = f" ({rate / dense:.2f})" if rate and dense and bits != 16 else ""
            cells.append(f"{rate:.0f}{ratio}" if rate else "")
        lines.append(line("dense" if bits == 16 else f"{bits} bits", cells))
    first = [c["seconds"] * 1e3 for c in report["width_changes"][: len(report["width_changes"]) // 2]]
    again = [c["seconds"] * 1e3 for c in report["width_changes"][len(report["width_changes"]) // 2 :]]
    lines.append(
        f"\nA change to a width takes {span(first)} ms the first time and {span(again)} ms later; "
        "the tokens of a width are the same when it comes back."
    )
    return "\n".join(lines) + "\n"


def vllm_table(report: dict[str, Any], *others: dict[str, Any]) -> str:
    """Seconds of runs in vLLM and the speed-up over bf16 of the same run, by linear layer and batch size."""
    batches = list(report["results"][0]["seconds"])
    lines = [
        f"{report['device']}, vLLM {report['vllm']}, {report['model']}. {report['method']} (times bf16's speed).\n",
        *head("", ["GiB", *(f"batch {batch}" for batch in batches)]),
    ]
    for name, weights, seconds, dense in vllm_rows(report, *others):
        cells = [f"{seconds[b]:.3f} ({dense[b] / seconds[b]:.2f})" if b in seconds else "" for b in batches]
        lines.append(line(name, [f"{weights:.2f}", *cells]))
    return "\n".join(lines) + "\n"


VllmRow = tuple[str, float, dict[str, float], dict[str, float]]  # name, GiB, seconds, seconds of bf16 in the same run


def vllm_rows(*runs: dict[str, Any]) -> Iterator[VllmRow]:
    """The rows of runs with one engine or another."""
    for number, run in enumerate(runs, start=1):
        where = f", run {number}" if number > 1 else ""
        (dense,) = (row["seconds"] for row in run["results"] if row["linear"] == "bf16")
        for row in run["results"]:
            yield row["linear"] + where, row["weights_gib"], row["seconds"], dense


def plot_vllm(path: Path, report: dict[str, Any], *others: dict[str, Any]) -> None:
    """Draw the speed-up over bf16 in vLLM by batch size, a line a linear layer."""
    title = f"{report['device']}, vLLM {report['vllm']}"
    axes = new_axes(xlabel="batch size", ylabel="speed-up over bf16", title=title, xscale="log")
    for name, _, seconds, dense in vllm_rows(report, *others):
        if seconds is dense:
            continue
        points = sorted((int(b), dense[b] / value) for b, value in seconds.items() if b in dense)
        axes.plot(*zip(*points, strict=True), "o-" if name.startswith("matgptq") else "--", label=name)
    batches = sorted(map(int, report["results"][0]["seconds"]))
    axes.axhline(1, color="black", linewidth=1, linestyle=":")
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


def write_linear(report: dict[str, Any], peers: Peers, root: Path) -> None:
    """Fill the pages and draw the plots of ``matgptq bench linear``: a plot for each square that was timed."""
    for size in (2048, 4096, 8192, 16384):
        rows = list(of_shape(report, size, size).values())
        if rows:
            title = f"{report['device']}, {size} x {size}, float16"
            plot_speed({**report, "results": rows}, [root / "assets" / f"gpu_benchmark_{size >> 10}k.svg"], title)
    fill(root / "README.md", "headline", headline(report))
    fill(root / "README.md", "gpu", gpu_table(report))
    page = root / "docs" / "kernels.md"
    fill(page, "linear", linear_tables(report, peers, (1, 2, 4, 8, 16), (2, 3, 4, 6, 8)))
    fill(page, "counts", counts(report))
    fill(page, "many", linear_tables(report, peers, (24, 32, 64, 128, 256, 512, 1024, 4096, 8192), (2, 4, 8)))


def main() -> None:
    """Fill the pages and draw the plots."""

    def read(name: str) -> Any:
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8"))

    docs, linear = ROOT / "docs", read("h200/linear")
    write_linear(linear, read_peers(read("h200/peers")), ROOT)
    fill(docs / "kernels.md", "models", models_table(read("h200/linear_models")))
    fill(docs / "kernels.md", "gated", gated_table(read("h200/gated_tiles")))
    fill(docs / "kernels.md", "chain", chain_table(read("h200/chain_steps")))
    fill(docs / "kernels.md", "without wgmma", older_table(read("h200/many_tiles"), linear))
    served = [read(f"h200/{name}") for name in ("vllm", "vllm_first", "vllm_resident")]
    fill(docs / "vllm.md", "vllm", vllm_table(*served))
    plot_vllm(ROOT / "assets" / "vllm_speedups.svg", served[0])
    fill(docs / "transformers.md", "transformers", transformers_table(read("h200/transformers")))
    fill(docs / "transformers.md", "packed", transformers_table(read("h200/transformers_packed")))
    demo = read("cpu/demo")
    fill(docs / "quantizer.md", "quality", quality_table(read("cpu/quality")))
    fill(ROOT / "README.md", "demo", demo_table(demo))
    rows = [WidthResult(int(bits), row["perplexity"], row["bytes"]) for bits, row in demo["widths"].items()]
    dense = WidthResult(16, demo["dense_perplexity"], demo["dense_bytes"])
    plot(rows, ROOT / "assets" / "perplexity_by_size.svg", dense=dense)


if __name__ == "__main__":
    main()
