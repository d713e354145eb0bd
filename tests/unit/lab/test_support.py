"""The tables of docs/support.md say what was recorded, and nothing about what was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab import support


def move(workload: str, freeze_ms: float, gap_ms: float | None) -> dict[str, Any]:
    return {"workload": workload, "freeze_ms": freeze_ms, "gap_ms": gap_ms, "bytes": 2_000_000}


def row(table: str, begin: str) -> list[str]:
    (found,) = (line for line in table.splitlines() if line.startswith(f"| {begin}"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_a_row_has_all_moves_of_its_workload() -> None:
    table = support.moves(
        [move("Redis", 100, 50), move("Redis", 300, 60), move("a shell", 1, None)]
    )
    assert row(table, "Redis") == ["Redis", "2", "200", "300", "60", "2", "–"]
    assert row(table, "a shell")[4] == "–"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"works": True, "took_s": 1.25, "client": ""}, "restored in 1.2 s; all well"),
        ({"works": True, "took_s": 1, "client": None}, "restored in 1.0 s"),
        (
            {"works": True, "took_s": 2, "client": "ConnectionResetError: x|y"},
            "restored in 2.0 s; client: ConnectionResetError: x/y",
        ),
        (
            {"works": False, "stage": "checkpoint", "error": "a\nb"},
            "checkpoint fails: a b",
        ),
    ],
)
def test_what_podman_did(line: dict[str, Any], said: str) -> None:
    lines = [move("Redis (one way)", 1, 1), {"podman": "Redis", **line}]
    assert row(support.moves(lines), "Redis")[-1] == said


def test_long_errors_are_cut() -> None:
    line = {"works": False, "stage": "restore", "error": "x" * 1000}
    assert len(support.podman(line)) < 200


def test_pages_have_both_tables(tmp_path: Path) -> None:
    results = tmp_path / "results"
    lines = [
        move("Redis", 1, 1),
        {"start": "WildFly", "restored_s": 1.25, "started_s": 9.5},
        {"checkpoint": "WildFly", "freeze_ms": 100, "gap_ms": 110.5, "bytes": 5_000_000},
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = support.page(
        "a <!-- results: begin -->old<!-- results: end --> b\n"
        "<!-- starts: begin --><!-- starts: end --> c",
        results,
    )
    assert "old" not in page
    assert row(page, "WildFly | 1.2")[1:] == ["1.2", "9.5"]
    assert row(page, "WildFly | 100")[1:] == ["100", "110", "5"]
    assert page.startswith("a ")
    assert page.endswith(" c")
