"""The plots of docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import cells
from bench.cells import Cell
from bench.measured import Results

TITLES = {
    "gap-by-memory": "Client gap by memory and rate of writes",
    "gap-by-memory-1gbit": "Client gap by memory and rate of writes, 1 Gbit/s",
    "beside": "Redis beside other ways",
}


def draw(results: Results, directory: Path) -> None:
    """One SVG file per title."""
    import pygal  # puts an importer of its own before all others

    directory.mkdir(exist_ok=True)
    for name, link in (("gap-by-memory", 0), ("gap-by-memory-1gbit", 1000)):
        chart = _chart(pygal, "Line", name, y_title="ms, median", x_title="MiB of memory")
        chart.x_labels = [str(megabytes) for megabytes in cells.MEMORY]
        for rate in cells.DIRTY_RATES:
            gaps = [results.gap(Cell("dirtier", size, rate, link)) for size in cells.MEMORY]
            if any(gap is not None for gap in gaps):
                chart.add(f"{rate} MiB/s written" if rate else "idle", gaps)
        chart.render_to_file(str(directory / f"{name}.svg"))
    chart = _chart(pygal, "Bar", "beside", y_title="ms, median", x_title="MiB of Redis data")
    shown = (cells.DEMO, cells.MAIN, cells.LARGE)
    chart.x_labels = [str(cell.megabytes) for cell in shown]
    chart.add("Godwit, client gap", [results.gap(cell) for cell in shown])
    ways = ("runc and CRIU, lazy pages", "runc and CRIU, whole image",
            "podman checkpoint, copy, restore")  # fmt: skip
    for what in ways:
        chart.add(what, [results.aside(cell, what) for cell in shown])
    chart.render_to_file(str(directory / "beside.svg"))


def _chart(pygal: Any, kind: str, name: str, **settings: str) -> Any:
    """Without scripts, and the same bytes for the same data."""
    return getattr(pygal, kind)(
        title=TITLES[name], js=(), no_prefix=True, width=720, height=400, show_dots=True,
        range_min=None, include_x_axis=True, legend_at_bottom=True,
        style=pygal.style.CleanStyle, **settings,
    )  # fmt: skip
