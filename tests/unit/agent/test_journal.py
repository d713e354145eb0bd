"""The journal keeps what it promised, whatever moment the crash picks."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from godwit_agent.app.epochs import refuse_stale
from godwit_agent.app.journal import Journal, JournalStore, Key, Role, Step, parse
from godwit_api.errors import Rejected, Unsafe
from godwit_api.reasons import Reason

UID = "01234567-89ab-cdef-0123-456789abcdef"
OTHER = "11234567-89ab-cdef-0123-456789abcdef"


def key(epoch: int = 1, role: Role = Role.SOURCE, uid: str = UID) -> Key:
    return Key(uid, epoch, role)


def test_records_survive(tmp_path: Path) -> None:
    journal = JournalStore(tmp_path).open(key())
    journal.append(Step.COPYING, {"pod": {"uid": "x"}})
    journal.append(Step.COPIED)
    again = JournalStore(tmp_path).open(key())
    assert [record.step for record in again.records] == [Step.COPYING, Step.COPIED]
    assert again.records[0].data == {"pod": {"uid": "x"}}
    assert again.last is Step.COPIED


def test_a_crash_at_any_byte_leaves_a_prefix_of_the_records(tmp_path: Path) -> None:
    store = JournalStore(tmp_path / "full")
    journal = store.open(key())
    for step in (Step.COPYING, Step.SWITCHING, Step.COMMITTED):
        journal.append(step, {"n": 1})
    content = (tmp_path / "full" / UID / "1.source").read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for cut in range(len(content) + 1):
        path = tmp_path / f"cut-{cut}"
        path.write_bytes(content[:cut])
        reopened = Journal(key(), path)
        assert len(reopened.records) == sum(end <= cut for end in ends)
        reopened.append(Step.ABORTED)
        records, size = parse(path.read_bytes(), "x")
        assert records[-1].step is Step.ABORTED
        assert size == path.stat().st_size


def test_a_garbled_last_line_does_not_count(tmp_path: Path) -> None:
    store = JournalStore(tmp_path)
    store.open(key()).append(Step.SWITCHING)
    path = tmp_path / UID / "1.source"
    path.write_bytes(path.read_bytes() + b'{"step":"Commi\x00\x00\n')
    assert JournalStore(tmp_path).open(key()).last is Step.SWITCHING


def test_damage_in_the_middle_is_for_a_person(tmp_path: Path) -> None:
    store = JournalStore(tmp_path)
    store.open(key()).append(Step.SWITCHING)
    path = tmp_path / UID / "1.source"
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    with pytest.raises(Unsafe):
        JournalStore(tmp_path).open(key())


def test_a_record_that_cannot_be_synced_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = JournalStore(tmp_path).open(key())
    journal.append(Step.SWITCHING)
    real, calls = os.fsync, []

    def failing(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError("disk full")
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="disk full"):
        journal.append(Step.COMMITTED)
    assert not journal.has(Step.COMMITTED)
    assert not JournalStore(tmp_path).open(key()).has(Step.COMMITTED)


def test_a_record_of_unknown_fate_is_for_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = JournalStore(tmp_path).open(key())

    def failing(fd: int) -> None:
        raise OSError("I/O error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(Unsafe):
        journal.append(Step.COMMITTED)


def test_files_and_directories_are_private(tmp_path: Path) -> None:
    JournalStore(tmp_path / "j").open(key()).append(Step.COPYING)
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "j" / UID).stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "j" / UID / "1.source").stat().st_mode & 0o777 == 0o600


def test_source_and_target_on_one_node_do_not_mix(tmp_path: Path) -> None:
    store = JournalStore(tmp_path)
    store.open(key(2)).append(Step.COPYING)
    store.open(key(2, Role.TARGET)).append(Step.EXPECTED)
    assert store.attempts(UID) == [key(2), key(2, Role.TARGET)]
    assert store.open(key(2)).last is Step.COPYING


def test_lower_epochs_are_stale(tmp_path: Path) -> None:
    store = JournalStore(tmp_path)
    store.open(key(3, Role.TARGET)).append(Step.EXPECTED)
    refuse_stale(store, UID, 3)
    refuse_stale(store, UID, 4)
    refuse_stale(store, OTHER, 1)
    with pytest.raises(Rejected) as caught:
        refuse_stale(store, UID, 2)
    assert caught.value.reason is Reason.STALE_EPOCH


def test_nothing_starts_anew_after_a_commit(tmp_path: Path) -> None:
    store = JournalStore(tmp_path)
    store.open(key(1)).append(Step.COMMITTED)
    refuse_stale(store, UID, 1)
    with pytest.raises(Rejected) as caught:
        refuse_stale(store, UID, 2)
    assert caught.value.reason is Reason.WRONG_STEP


def test_forgetting_removes_the_files(tmp_path: Path) -> None:
    store = JournalStore(tmp_path)
    store.open(key()).append(Step.FINISHED)
    store.forget(UID)
    assert store.attempts() == []
    assert store.highest_epoch(UID) == 0


def test_journals_that_are_over_keep_nothing_open_and_nothing_in_memory(tmp_path: Path) -> None:
    store = JournalStore(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        uid = f"{number:08x}{UID[8:]}"
        store.open(key(uid=uid)).append(Step.OPENED)
        store.open(key(uid=uid)).append(Step.FINISHED)
    going = store.open(key())
    going.append(Step.OPENED)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert store.live() == {UID}
    assert list(store._known.values()) == [going]
    assert store.open(key()) is going
    assert store.open(key(uid=f"{3:08x}{UID[8:]}")).last is Step.FINISHED


def test_nothing_follows_a_last_line(tmp_path: Path) -> None:
    journal = JournalStore(tmp_path).open(key(role=Role.TARGET))
    journal.append(Step.ABORTED)
    with pytest.raises(Rejected):
        journal.append(Step.REFUSED)
    assert JournalStore(tmp_path).live() == frozenset()
