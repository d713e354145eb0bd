"""The rows of ``bench/results/runs.jsonl``, by cell."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from typing import Any

from bench.cells import Cell

Row = dict[str, Any]


class Results:
    """Rows by kind and cell, of the last run that has them."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.runs: dict[str, Row] = {}
        rows: dict[tuple[str, str], list[Row]] = {}
        for line in lines:
            row = json.loads(line)
            if row["kind"] == "run":
                self.runs[row["run"]] = row
                continue
            known = rows.setdefault((row["kind"], row["cell"]), [])
            if known and known[0]["run"] != row["run"]:
                known.clear()
            known.append(row)
        self._rows = rows

    def of(self, kind: str, cell: Cell) -> list[Row]:
        """Rows of a cell."""
        return self._rows.get((kind, cell.name), [])

    def moved(self, cell: Cell) -> list[Row]:
        """Moves of a cell that have succeeded."""
        return [row for row in self.of("move", cell) if row["outcome"] == "Succeeded"]

    def gap(self, cell: Cell) -> float | None:
        """Median client gap, milliseconds."""
        return median(row["gap_ms"] for row in self.moved(cell))

    def aside(self, cell: Cell, what: str) -> float | None:
        """Median milliseconds of another way."""
        found = [row for row in self.of("aside", cell) if row["what"] == what]
        return median(one for row in found for one in row["rounds_ms"])

    def used(self) -> set[str]:
        """Runs that the shown rows are from."""
        return {row["run"] for rows in self._rows.values() for row in rows}

    def clients_broken(self) -> int:
        """Connections that did not live, or had a wrong reply, in the rows that are shown."""
        return sum(
            not row["ok"] for (kind, _), rows in self._rows.items() if kind == "client"
            for row in rows
        )  # fmt: skip


def median(values: Iterable[float | None]) -> float | None:
    """None without values."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
