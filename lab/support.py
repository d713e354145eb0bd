"""``make support``: the tables of docs/support.md from what tests and ``lab.beside`` have recorded.

``tests/e2e/results/support.jsonl`` has a line per move, per checkpoint, per start and per
workload under podman. A workload whose test has failed leaves lines too, so the tables are
written only after all tests have passed.
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
Line = dict[str, Any]
_LONGEST = 160  # characters of an error


def moves(lines: list[Line]) -> str:
    """One row per workload, in the order of their first lines."""
    rows = [
        "| workload | moves | freeze, median (ms) | longest (ms) | client gap (ms) | MB a move "
        "| podman checkpoint, restore |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    beside = {line["podman"]: line for line in lines if "podman" in line}
    moved = [line for line in lines if "workload" in line]
    for workload in dict.fromkeys(line["workload"] for line in moved):
        mine = [line for line in moved if line["workload"] == workload]
        freezes = [line["freeze_ms"] for line in mine]
        gaps = [line["gap_ms"] for line in mine if line["gap_ms"] is not None]
        megabytes = statistics.median(line["bytes"] for line in mine) / 1e6
        # a workload that we move in several ways is one for podman
        other = next((beside[name] for name in beside if workload.startswith(name)), None)
        rows.append(
            f"| {workload} | {len(mine)} | {statistics.median(freezes):.0f} | {max(freezes):.0f} "
            f"| {f'{max(gaps):.0f}' if gaps else '–'} | {megabytes:.0f} | {podman(other)} |"
        )
    return "\n".join(rows)


def podman(line: Line | None) -> str:
    """What became of a workload there."""
    if line is None:
        return "–"
    if not line["works"]:
        return _short(f"{line['stage']} fails: {line['error']}")
    restored = f"restored in {line['took_s']:.1f} s"
    if line["client"]:
        return _short(f"{restored}; client: {line['client']}")
    return restored if line["client"] is None else f"{restored}; all well"


def _short(text: str) -> str:
    plain = " ".join(text.replace("|", "/").split())
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 1]}…"


def starts(lines: list[Line]) -> str:
    """Restored beside started, and what a checkpoint costs the running pod."""
    rows = [
        "| first answer of | after `PodRestore` (s) | after a fresh start (s) |",
        "| --- | --- | --- |",
        *(
            f"| {line['start']} | {line['restored_s']:.1f} | {line['started_s']:.1f} |"
            for line in lines
            if "start" in line
        ),
        "",
        "| checkpoint that leaves the pod running | freeze (ms) | client gap (ms) | archive (MB) |",
        "| --- | --- | --- | --- |",
        *(
            f"| {line['checkpoint']} | {line['freeze_ms']:.0f} | {line['gap_ms']:.0f} "
            f"| {line['bytes'] / 1e6:.0f} |"
            for line in lines
            if "checkpoint" in line
        ),
    ]
    return "\n".join(rows)


def page(text: str, results: Path) -> str:
    """``text`` with the tables between their marks."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for name, table in (("results", moves(lines)), ("starts", starts(lines))):
        text = between(text, f"<!-- {name}: begin -->", f"<!-- {name}: end -->", table)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), RESULTS))
