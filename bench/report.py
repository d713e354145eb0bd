"""Tables and plots of docs/performance.md from ``bench/results/runs.jsonl``.

Every figure is a median of single measurements of the last run that has the cell; what is
between the marks in the page is replaced, what is around them is written by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench import cells, plots, together
from bench.cells import Cell
from bench.measured import Results, median
from bench.run import RESULTS
from lab.marks import between

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- results: make bench-report -->", "<!-- end of results -->"
FIRST_NAMED = "0d535b4"
"""Commit since which a run names its own."""


def shown(value: float | None, unit: str = "", digits: int = 0) -> str:
    """A figure, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def aims(results: Results) -> str:
    """What the figures must show, and what they show."""
    gap = results.gap
    idle = cells.IDLE
    loaded = Cell("dirtier", 2048, 50, 1000)
    total = median(row["total_s"] for row in results.moved(idle))
    line_s = 2048 * cells.MEBIBYTE * 8 / 1e9
    over = median(row["gap_ms"] - row["freeze_ms"] for row in results.moved(cells.MAIN))
    at_once = results.of("together", together.CELL)
    worst = max((row["gap_ms"] for row in at_once), default=None)
    grown = [
        node["peak_bytes"] / cells.MEBIBYTE
        for cell in (cells.LARGE, Cell("dirtier", 4096))
        for row in results.moved(cell)
        for node in row["agents"].values()
    ]
    stock = results.aside(cells.MAIN, "runc and CRIU, lazy pages")
    rows = [
        ("client gap, Redis 512 MiB under light writes", gap(cells.MAIN), "ms", 100.0, 0),
        ("the same / stock CRIU by hand on one node", _ratio(gap(cells.MAIN), stock), "×", 0.9, 2),
        ("the same at 4 GiB / at 64 MiB", _ratio(gap(cells.LARGE), gap(cells.SMALL)), "×", 1.25, 2),
        ("client gap minus freeze", over, "ms", 10.0, 1),
        ("2 GiB, 1 Gbit/s: gap at 50 MiB/s written / idle",
         _ratio(gap(loaded), gap(idle)), "×", 2.0, 2),
        ("total time, 2 GiB idle, 1 Gbit/s / memory / bandwidth",
         _ratio(total, line_s), "×", 1.3, 2),
        ("10 pods of 128 MiB at once: worst client gap", worst, "ms", 1000.0, 0),
        ("agent's own memory while 4 GiB move, largest", max(grown, default=None), "MiB", 200.0, 0),
        ("requests lost to pre-copy, 2 GiB at 1 Gbit/s, one asked every millisecond",
         _lost(results, idle), "%", 15.0, 0),
        ("the same, Redis asked as fast as it answers (busy)",
         _lost(results, cells.BUSY_UNLIMITED), "%", 15.0, 0),
        ("the same, copy limited to 100 MB/s", _lost(results, cells.BUSY), "%", 15.0, 0),
    ]  # fmt: skip
    return table(
        ["figure", "measured", "aim: at most", "reached"],
        [
            [what, shown(value, f" {unit}", digits), shown(aim, f" {unit}", min(digits, 2)),
             "–" if value is None else "yes" if value <= aim else "**no**"]
            for what, value, unit, aim, digits in rows
        ],
    )  # fmt: skip


def _busy(cell: Cell) -> str:
    return "busy" if cell.limit else "busy, copy unlimited"


def _lost(results: Results, cell: Cell) -> float | None:
    """Percent of a client's requests per second while its server was copied."""
    kept = median(
        row["requests_per_s"]["copying"] / row["requests_per_s"]["before"]
        for row in results.moved(cell)
        if row["requests_per_s"]["copying"] and row["requests_per_s"]["before"]
    )
    return None if kept is None else (1 - kept) * 100


def grid(results: Results) -> str:
    """Every cell that has been measured."""
    lines = []
    for cell in cells.full():
        rows = results.of("move", cell)
        if not rows:
            continue
        moved = results.moved(cell)
        wrong = [row["wrong_pages"] for row in rows if row["wrong_pages"] is not None]
        outcomes = "; ".join(sorted({row["outcome"] for row in rows if row not in moved}))
        gaps = [row["gap_ms"] for row in moved]
        sent = median(row["transferred_bytes"] + row.get("post_copy_bytes", 0) for row in moved)
        lines.append(
            [
                _workload(cell),
                str(cell.megabytes),
                str(cell.dirty_rate or "–"),
                f"{cell.link_mbit / 1000:g} Gbit/s" if cell.link_mbit else "–",
                f"{len(moved)} of {len(rows)}" + (f" ({outcomes})" if outcomes else ""),
                shown(median(gaps)) + (f" ({max(gaps):.0f})" if gaps else ""),
                shown(median(row["freeze_ms"] for row in moved)),
                shown(median(row["predicted_freeze_ms"] for row in rows)),
                shown(median(row["rounds"] for row in moved)),
                shown(median(row["total_s"] for row in moved), digits=1),
                shown(sent / cells.MEBIBYTE if sent is not None else None),
                "–" if not wrong else str(sum(wrong)),
            ]
        )
    head = ["workload", "MiB", "MiB/s written", "link", "moved", "gap ms (largest)", "freeze ms",
            "predicted ms", "rounds", "total s", "MiB sent", "wrong pages"]  # fmt: skip
    return table(head, lines)


def _workload(cell: Cell) -> str:
    how = {_busy(cell): not cell.interval_ms, "post-copy": cell.post_copy}
    return ", ".join([cell.workload, *(name for name, applies in how.items() if applies)])


def beside(results: Results) -> str:
    """Other ways with the same container."""
    lines = []
    for cell in (cells.DEMO, cells.MAIN, cells.LARGE):
        ways: list[tuple[str, float | None]] = [("Godwit, client gap", results.gap(cell))]
        kinds = dict.fromkeys(row["what"] for row in results.of("aside", cell))
        ways += [(what, results.aside(cell, what)) for what in kinds]
        lines += [[f"{cell.megabytes} MiB", what, shown(value, " ms")] for what, value in ways
                  if value is not None]  # fmt: skip
    return table(["Redis", "way", "median"], lines)


def parts(results: Results) -> str:
    """What the freeze of the main line consists of."""
    rows = [row["timings_us"] for row in results.moved(cells.MAIN) if row.get("timings_us")]
    names = sorted({name for row in rows for name in row})
    values = {name: median(row.get(name) for row in rows) or 0.0 for name in names}
    order = sorted(names, key=lambda name: -values[name])
    return table(["part", "median ms"], [[n, shown(values[n] / 1e3, digits=1)] for n in order])


def machines(results: Results) -> str:
    """Where the shown runs were made."""
    lines = []
    for at in sorted(results.used()):
        run = results.runs[at]
        gigabytes = (run["memory_bytes"] or 0) / 2**30
        lines.append(
            f"- {at}: Godwit {run.get('commit', 'before ' + FIRST_NAMED)}, "
            f"{run['processors']} processors ({run['model']}), {gigabytes:.0f} GiB, "
            f"Linux {run['kernel']}, Kubernetes {run['kubernetes']}, " + ", ".join(run["versions"])
        )
    return "\n".join(lines)


def render(results: Results) -> str:
    """The part of the page between the marks."""
    sections: list[tuple[str, Callable[[Results], str]]] = [
        ("The figures", aims),
        ("Beside other ways, same machine, same run", beside),
        ("Every cell", grid),
        ("What the freeze consists of", parts),
        ("Machines", machines),
    ]
    text = "\n\n".join(f"## {title}\n{make(results)}" for title, make in sections)
    pictures = "\n".join(
        f"![{title}](performance/{name}.svg)" for name, title in plots.TITLES.items()
    )
    broken = results.clients_broken()
    said = f"Connections that broke or got a wrong reply, in all of this: {broken}."
    return f"{text}\n\n{said}\n\n{pictures}"


def main() -> int:
    """Command line entry."""
    results = Results(RESULTS.read_text().splitlines())
    PAGE.write_text(between(PAGE.read_text(), BEGIN, END, render(results)))
    plots.draw(results, PAGE.parent / "performance")
    return 0


if __name__ == "__main__":
    sys.exit(main())
