"""Rounds between preparing a freeze and the freeze, over a made-up load and a made-up clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from godwit_agent.app import copying
from godwit_agent.app.copying import Copier
from godwit_agent.app.journal import JournalStore, Key, Role
from godwit_agent.app.model import Migration, Pod
from godwit_agent.app.sessions import SourceSession
from godwit_agent.hostops.model import RoundStats

UID = "01234567-89ab-cdef-0123-456789abcdef"
MB = 1_000_000
BANDWIDTH = 100 * MB


class Load:
    """A program that writes ``rate`` bytes/s, no page twice; stands for the pod and the stream."""

    usable = True

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.now = self.looked = 1000.0
        self.bytes_sent = 0
        self.asked: list[bool] = []

    def monotonic(self) -> float:
        return self.now

    def copy_round(self, outlet: object, cancelled: object, *, files: bool) -> RoundStats:
        self.asked.append(files)
        since, self.looked = self.now - self.looked, self.now
        dirty = round(self.rate * since)
        self.bytes_sent += dirty
        self.now += dirty / BANDWIDTH + 0.001
        return RoundStats(dirty, dirty, 0, round(since * 1e6))

    def sync(self) -> None:
        pass

    @property
    def left(self) -> float:
        """Bytes for the freeze to send."""
        return self.rate * (self.now - self.looked)


def caught_up(
    rate: int, prepared_s: float, tmp_path: Path, patch: pytest.MonkeyPatch
) -> tuple[Load, float]:
    """The load at the freeze, and what would have been left without."""
    load = Load(rate)
    patch.setattr(copying, "time", load)
    migration = Migration(UID, 1, "ns", "m")
    journal = JournalStore(tmp_path).open(Key(UID, 1, Role.SOURCE))
    session = SourceSession(
        migration, Pod("ns", "p", UID, ""), journal, load,  # type: ignore[arg-type]
        outlet=load, bandwidth=BANDWIDTH, dirty_rate=rate, looked_at=load.now,  # type: ignore[arg-type]
    )  # fmt: skip
    load.now += prepared_s
    before = load.left
    Copier(lambda _: pytest.fail("connected")).catch_up(session)
    return load, before


@pytest.mark.parametrize("rate", [20 * MB, 50 * MB, 80 * MB])
def test_what_was_written_while_the_freeze_was_prepared_does_not_wait_for_it(
    rate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, before = caught_up(rate, 0.25, tmp_path, monkeypatch)
    assert load.asked
    assert not any(load.asked)  # files: a walk, during which memory is written again
    assert load.left < before * 0.8


def test_little_goes_with_the_freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, _ = caught_up(1 * MB, 0.25, tmp_path, monkeypatch)
    assert not load.asked


def test_a_link_that_cannot_keep_up_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, _ = caught_up(200 * MB, 0.25, tmp_path, monkeypatch)
    assert not load.asked


def test_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, _ = caught_up(85 * MB, 10.0, tmp_path, monkeypatch)
    assert len(load.asked) == 3
