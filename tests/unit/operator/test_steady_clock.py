"""The operator's time does not jump."""

from __future__ import annotations

import time

import pytest

from godwit_operator.clock import SteadyClock


def test_a_clock_that_is_set_changes_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, wall = SteadyClock(), time.time()
    before = steady()
    assert abs(before - wall) < 5
    monkeypatch.setattr(time, "time", lambda: wall + 3600)
    assert 0 <= steady() - before < 60
