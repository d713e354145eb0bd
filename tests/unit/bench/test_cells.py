"""What is measured, and what is made of it."""

from __future__ import annotations

import json

import pytest

from bench import cells, move, report
from bench.cells import Cell
from bench.measured import Results


def test_grids_name_each_cell_once_and_hold_what_was_asked_for() -> None:
    names = [cell.name for cell in cells.full()]
    assert len(names) == len(set(names))
    for megabytes in (64, 512, 2048, 4096):
        for rate in (0, 10, 50, 200):
            for link in (0, 1000):
                assert Cell("dirtier", megabytes, rate, link).name in names
    assert cells.MAIN in cells.full()
    assert {cell.name for cell in cells.quick()} <= set(names)


@pytest.mark.parametrize(
    ("rate", "link", "has_budget"), [(0, 1000, False), (50, 1000, False), (200, 1000, True)]
)
def test_only_a_load_that_the_link_cannot_carry_has_a_budget(
    rate: int, link: int, has_budget: bool
) -> None:
    assert bool(Cell("dirtier", 512, rate, link).budget_ms) == has_budget
    assert not Cell("dirtier", 512, rate, 0).budget_ms
    assert not Cell("dirtier", 512, rate, link, post_copy=True).budget_ms


def test_rate_counts_replies_between_two_times() -> None:
    ticks = [{"at": float(second), "count": second * 1000} for second in range(10)]
    assert move.rate(ticks, 2, 5) == 1000
    assert move.rate(ticks, 2.5, 3.2) is None


def line(kind: str, run: str, cell: Cell, **fields: object) -> str:
    return json.dumps({"kind": kind, "run": run, **cell.to_json(), **fields})


def moved(run: str, cell: Cell, gap: float, outcome: str = "Succeeded") -> str:
    return line(
        "move", run, cell, outcome=outcome, gap_ms=gap, freeze_ms=gap - 5, total_s=4.0,
        predicted_freeze_ms=150, rounds=2, transferred_bytes=1 << 20, wrong_pages=0,
        timings_us={"dump": 1000}, agents={},
        requests_per_s={"before": 10.0, "copying": 9.0, "after": 10.0},
    )  # fmt: skip


def test_a_cell_shows_its_last_run_only_and_no_refused_move_in_a_median() -> None:
    rows = [
        moved("a", cells.MAIN, 1000),
        moved("b", cells.MAIN, 100),
        moved("b", cells.MAIN, 120),
        moved("b", cells.MAIN, 1, "Aborted: FreezeBudgetExceeded"),
        line("aside", "b", cells.MAIN, what="runc and CRIU, lazy pages", rounds_ms=[440, 430, 900]),
    ]
    results = Results(rows)
    assert results.gap(cells.MAIN) == 110
    assert results.used() == {"b"}
    text = report.aims(results)
    assert "| client gap, Redis 512 MiB under light writes | 110 ms | 100 ms | **no** |" in text
    assert "| the same / stock CRIU by hand on one node | 0.25 × | 0.90 × | yes |" in text
    assert "2 of 3 (Aborted: FreezeBudgetExceeded)" in report.grid(results)


def test_what_came_after_the_switch_was_sent_too() -> None:
    cell = cells.POST_COPY[0]
    row = json.loads(moved("a", cell, 300)) | {"post_copy_bytes": 3 << 20}
    text = report.grid(report.Results([json.dumps(row)]))
    assert "| dirtier, post-copy | 512 | 200 | 1 Gbit/s |" in text
    assert "| 4.0 | 4 | 0 |" in text


def test_a_broken_connection_is_told() -> None:
    results = Results(
        [line("client", "b", cells.MAIN, ok=True), line("client", "b", cells.SMALL, ok=False)]
    )
    assert results.clients_broken() == 1
