"""``make support``: the table of docs/support.md from what the tests have recorded.

The tests append a line per move to ``tests/e2e/results/support.jsonl``. A
workload whose test has failed leaves lines too, so the table is written only
after all tests have passed.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from lab.cluster import ROOT
from lab.marks import between

RESULTS = ROOT / "tests" / "e2e" / "results" / "support.jsonl"
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def table(lines: list[dict[str, Any]]) -> str:
    """One row per workload, in the order of their first lines."""
    rows = [
        "| workload | moves | freeze, median (ms) | longest (ms) | client gap (ms) | MB a move |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for workload in dict.fromkeys(line["workload"] for line in lines):
        mine = [line for line in lines if line["workload"] == workload]
        freezes = [line["freeze_ms"] for line in mine]
        megabytes = statistics.median(line["bytes"] for line in mine) / 1e6
        rows.append(
            f"| {workload} | {len(mine)} | {statistics.median(freezes):.0f} "
            f"| {max(freezes):.0f} | {max(line['gap_ms'] for line in mine):.0f} | {megabytes:.0f} |"
        )
    return "\n".join(rows)


def page(text: str, results: Path) -> str:
    """``text`` with the table between its marks."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return between(text, BEGIN, END, table(lines))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), RESULTS))
