"""The fault matrix, what is read from the process table, and what is made of a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chaos import copies, report, rows
from chaos.copies import Copies
from chaos.faults import FAULTS
from chaos.run import violations


def test_every_row_has_its_fault_and_its_own_name() -> None:
    matrix = rows.rows()
    assert len({row.name for row in matrix}) == len(matrix)
    assert {row.fault for row in matrix} <= set(FAULTS) == set(rows.FAULTS)
    assert set(rows.SAMPLE) <= {row.name for row in matrix}


def test_behind_the_commit_a_migration_can_only_succeed() -> None:
    for row in rows.rows():
        if row.boundary.committed and row.connection:
            assert row.allowed == {"Succeeded"}


def test_a_process_belongs_to_the_node_of_its_cgroup() -> None:
    text = "12:freezer:/godwit-testbed-x/n2/godwit/abc\n0::/init.scope\n"
    freezer, unified = copies.cgroup_of(text)
    assert copies.node_of(freezer, "x") == "n2"
    assert copies.node_of(freezer, "y") is None
    assert copies.node_of(unified, "x") is None


def test_a_move_in_the_middle_of_a_look_is_not_two_copies() -> None:
    """The source ran when it was looked at, and the target when it was: one after the other."""
    source, target = Path("/proc/100"), Path("/proc/200")
    answers = {source: ["n1", None], target: ["n2", "n2"]}
    assert copies.at_once([source, target], lambda one: answers[one].pop(0)) == {target: "n2"}


def test_two_that_run_all_the_while_are_two_copies() -> None:
    nodes: dict[Path, str | None] = {Path("/proc/1"): "n1", Path("/proc/2"): "n2"}
    nodes[Path("/proc/3")] = None
    assert set(copies.at_once(nodes, nodes.__getitem__).values()) == {"n1", "n2"}


def test_history_tells_moves_and_two_copies_at_a_time() -> None:
    seen = ["n1", "n1", "", "n2", "n1+n2", "n2"]
    assert Copies("x", "redis-server", seen=seen).history() == ["n1", "n2", "n1+n2", "n2"]


@pytest.mark.parametrize(
    ("state", "flags", "pending", "runs"),
    [("S", 0, 0, True), ("D", 0, 0, True), ("T", 0, 0, False), ("Z", 4, 0, False),
     ("R", 4, 0, False), ("D", 0, 1 << 8, False), ("S", 0, 1 << 14, True)],
)  # fmt: skip
def test_who_has_been_killed_does_not_run(state: str, flags: int, pending: int, runs: bool) -> None:
    stat = f"7 (a) b) {state} 1 7 7 0 -1 {flags} 0 0"
    assert copies.alive(stat, f"SigPnd:\t{0:016x}\nShdPnd:\t{pending:016x}\n") is runs


def test_an_observer_that_has_not_seen_the_source_run_is_blind() -> None:
    assert Copies("x", "redis-server", seen=["n1"] * 20 + ["n2"]).blind("n1") == ""
    assert Copies("x", "redis-server", seen=[]).blind("n1")
    assert Copies("x", "redis-server", seen=["n2"] * 20).blind("n1")
    assert Copies("x", "redis-server", seen=["n1"] * 20, failure="OSError").blind("n1") == "OSError"


def result(**changes: Any) -> dict[str, Any]:
    good = {
        "reached": True, "struck": True, "reason": "Succeeded", "phase": "Succeeded",
        "ran_on": ["n1", "n2"], "connection": True,
        "client_error": None, "observer": "", "node_after": "n2", "debris": [], "next": "Succeeded",
    }  # fmt: skip
    return good | changes


@pytest.mark.parametrize(
    "change",
    [
        {"reached": False},
        {"phase": "Stalled"},
        {"struck": False},
        {"phase": "Aborted", "reason": "Internal", "node_after": "n1"},
        {"observer": "never saw it run on n1"},
        {"ran_on": ["n1", "n1+n2", "n2"]},
        {"connection": False},
        {"node_after": "n1"},
        {"debris": ["n1: something"]},
        {"next": "Rejected"},
    ],
)
def test_whatever_does_not_hold_is_a_violation(change: dict[str, Any]) -> None:
    row = next(row for row in rows.rows() if row.name == "dump/kill source agent")
    assert violations(row, result(), "n1", "n2") == []
    assert len(violations(row, result(**change), "n1", "n2")) == 1


def test_the_table_says_what_was_run_and_what_was_not() -> None:
    done = {"row": "dump/kill operator", "phase": "Aborted", "connection": True, "gap_ms": 310.4}
    wrong = {
        "row": "dump/kill CRIU", "phase": "Stalled", "reason": "Internal", "connection": False,
        "gap_ms": 1.0, "violations": ["ended Stalled"],
    }  # fmt: skip
    text = report.render([json.dumps(done | {"violations": []}), json.dumps(wrong)])
    assert "2 of" in text
    assert "1 with a violation" in text
    assert "| stayed 310 |" in text
    assert "| **wrong** Stalled |" in text
    assert "not run" in text
    assert "- `dump/kill CRIU`: ended Stalled (Stalled, Internal)" in text
