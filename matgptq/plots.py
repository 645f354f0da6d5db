"""Plots that come out the same for the same data. Needs matplotlib, which is an optional dependency."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def new_axes(**labels: Any) -> Any:
    """Axes of a new figure with a light grid; ``labels`` are passed to ``Axes.set``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'matgptq[bench]'") from None
    axes = Figure(figsize=(6, 4), layout="constrained").add_subplot()
    axes.grid(alpha=0.3)
    axes.set(**labels)
    return axes


def check_path(path: str | Path) -> None:
    """Raise a ValueError unless `save` knows the image type that ``path`` ends in, before what is drawn is computed."""
    types = new_axes().figure.canvas.get_supported_filetypes()
    if Path(path).suffix[1:] not in types:
        raise ValueError(f"plot must end in one of {', '.join(types)}, got {path}")


def save(axes: Any, paths: Iterable[str | Path]) -> None:
    """Write the figure of ``axes`` into image files, whose suffixes choose their types; folders are made."""
    import matplotlib

    axes.legend()
    with matplotlib.rc_context({"svg.hashsalt": "matgptq"}):
        for path in map(Path, paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            axes.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
