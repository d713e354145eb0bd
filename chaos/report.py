"""The table of docs/reliability.md from ``chaos/results/rows.jsonl``: the last run of each row."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chaos import rows as matrix
from chaos.run import RESULTS
from lab.marks import between

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- results: make chaos-report -->", "<!-- end of results -->"


def render(lines: Iterable[str]) -> str:
    """A row per fault, a column per boundary; what was not run is said so."""
    last: dict[str, dict[str, Any]] = {}
    for line in lines:
        row = json.loads(line)
        last[row["row"]] = row
    known = {row.name for row in matrix.rows()}
    boundaries = [boundary.name for boundary in matrix.BOUNDARIES]
    table = [["fault", *boundaries], ["---"] * (len(boundaries) + 1)]
    for fault in matrix.FAULTS:
        names = [f"{boundary}/{fault}" for boundary in boundaries]
        table.append([fault, *(_cell(name, last, known) for name in names)])
    text = "\n".join("| " + " | ".join(line) + " |" for line in table)
    ran = [row for name, row in last.items() if name in known]
    wrong = [row for row in ran if row["violations"]]
    said = f"{len(ran)} of {len(known)} rows run, {len(wrong)} with a violation."
    details = "\n".join(
        f"- `{row['row']}`: {'; '.join(row['violations'])} ({row['phase']}, {row['reason']})"
        for row in wrong
    )
    return f"{said}\n\n{text}\n\n{details}".rstrip()


def _cell(name: str, last: dict[str, dict[str, Any]], known: set[str]) -> str:
    if name not in known:
        return ""
    if name not in last:
        return "not run"
    row = last[name]
    mark = "**wrong** " if row["violations"] else ""
    outcome = {"Succeeded": "moved", "Aborted": "stayed", "Deleted": "cancelled"}.get(
        row["phase"], str(row["phase"])
    )
    gap = f" {row['gap_ms']:.0f}" if row["connection"] else ""
    return f"{mark}{outcome}{gap}"


def main() -> None:
    """Rewrite the page."""
    text = render(RESULTS.read_text().splitlines())
    PAGE.write_text(between(PAGE.read_text(), BEGIN, END, text))


if __name__ == "__main__":
    main()
