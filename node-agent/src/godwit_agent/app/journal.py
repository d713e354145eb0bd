"""What this agent has done for a migration, on disk before it matters.

One file per (migration uid, epoch, role): JSON lines, each fsynced before
``append`` returns. A node may be source and target of the same migration, so
the role is part of the key. The line with ``Step.COMMITTED`` in a source's
journal is the decision of the migration: before it everything can be undone,
after it everything goes forward.

A crash can leave half a line at the end: it is not a record, and it is cut off
when the file is opened to be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from godwit_agent.hostops.smallfiles import sync_directory
from godwit_api import failpoints
from godwit_api.errors import Rejected, Unsafe
from godwit_api.reasons import Reason

_FILE = re.compile(r"(?P<epoch>[1-9][0-9]{0,18})\.(?P<role>source|target)\Z")
UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")


class Role(StrEnum):
    """Side of a migration."""

    SOURCE = "source"
    TARGET = "target"


class Step(StrEnum):
    """What a journal line says has happened, or is about to."""

    OPENED = "Opened"  # who and what; always the first line
    # source
    COPYING = "Copying"
    COPIED = "Copied"
    GUARDING = "Guarding"
    GUARDED = "Guarded"
    SWITCHING = "Switching"  # the pod may be frozen from here on
    COMMITTED = "Committed"  # the decision
    RUNNING = "Running"  # the target said that its copy runs
    THAWED = "Thawed"  # the switch failed; the source runs
    PARKED = "Parked"  # given up, the guard stays for the next epoch
    # target
    EXPECTED = "Expected"
    ARMED = "Armed"  # a copy may exist from here on
    FENCED = "Fenced"  # the source's node is gone, says the operator: the copy is to run
    RESUMED = "Resumed"
    LOST = "Lost"  # its pages will never come: the copy that ran was killed
    REFUSED = "Refused"  # the copy is gone; the expectation stays, aborted
    # both
    ARRIVED = "Arrived"  # of a post-copy: the target has every page, and needs the source no more
    FINISHED = "Finished"
    ABORTED = "Aborted"


TERMINAL = frozenset({Step.FINISHED, Step.ABORTED})


@dataclass(frozen=True, slots=True)
class Key:
    """Names one journal."""

    uid: str
    epoch: int
    role: Role

    def __str__(self) -> str:
        return f"{self.uid}/{self.epoch}/{self.role}"


@dataclass(frozen=True, slots=True)
class Record:
    """One line."""

    step: Step
    at: float
    data: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """One file. Thread-safe. It is open only while a line is written: journals are kept for days,
    descriptors are not."""

    def __init__(self, key: Key, path: Path) -> None:
        self.key = key
        self._path = path
        self._lock = threading.Lock()
        created = not path.exists()
        with self._opened(os.O_CREAT) as fd:
            content = path.read_bytes()
            self._records, self._size = parse(content, str(key))
            if self._size != len(content):
                os.ftruncate(fd, self._size)
                os.fsync(fd)
        if created:
            sync_directory(path.parent)

    def append(self, step: Step, data: Mapping[str, Any] | None = None) -> Record:
        """Adds a line; it is on disk when this returns.

        When the write fails the line is taken back, and the ``OSError`` says
        that it does not count. When not even that works nobody can know what a
        later reader will find: ``Unsafe``. Nothing comes after a last line:
        ``Rejected(WrongStep)``.
        """
        record = Record(step, time.time(), dict(data or {}))
        line = _encode(record)
        failpoints.reach(f"{self.key.role}.{step}.before")
        with self._lock, self._opened() as fd:
            if self._records and self._records[-1].step in TERMINAL:
                raise Rejected(
                    Reason.WRONG_STEP, f"this attempt is over ({self._records[-1].step})"
                )
            try:
                written = os.pwrite(fd, line, self._size)
                if written != len(line):
                    raise OSError(f"journal {self.key}: short write")
                os.fsync(fd)
            except OSError as error:
                self._take_back(fd, error)
                raise
            self._size += len(line)
            self._records.append(record)
        failpoints.reach(f"{self.key.role}.{step}.after", can_fail=False)
        return record

    @contextlib.contextmanager
    def _opened(self, more: int = 0) -> Iterator[int]:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | more
        fd = os.open(self._path, flags, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)

    def _take_back(self, fd: int, cause: OSError) -> None:
        try:
            os.ftruncate(fd, self._size)
            os.fsync(fd)
        except OSError as error:
            message = f"journal {self.key}: {cause}, and the line cannot be taken back: {error}"
            raise Unsafe(Reason.INTERNAL, message) from error

    @property
    def records(self) -> tuple[Record, ...]:
        with self._lock:
            return tuple(self._records)

    @property
    def last(self) -> Step | None:
        """Step of the last line."""
        with self._lock:
            return self._records[-1].step if self._records else None

    def find(self, *steps: Step) -> Record | None:
        """Latest record of any of ``steps``."""
        with self._lock:
            return next((r for r in reversed(self._records) if r.step in steps), None)

    def has(self, step: Step) -> bool:
        return self.find(step) is not None

    @property
    def terminal(self) -> bool:
        """Nothing is left to do; also when not even the first line was written."""
        return self.last is None or self.last in TERMINAL


class JournalStore:
    """All journals of this node, below one directory (0700).

    Of those that are over only the key stays in memory. Whoever holds one shares it with all.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: WeakValueDictionary[Key, Journal] = WeakValueDictionary()
        self._going: dict[Key, Journal] = {}
        self._over: set[Key] = set()
        self._lock = threading.Lock()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.chmod(0o700)

    def open(self, key: Key) -> Journal:
        """The journal of ``key``, made when there is none."""
        with self._lock:
            journal = self._known.get(key)
            if journal is None:
                directory = self._root / key.uid
                if not directory.exists():
                    directory.mkdir(mode=0o700)
                    sync_directory(self._root)
                journal = self._known[key] = Journal(key, directory / f"{key.epoch}.{key.role}")
            self._going[key] = journal
            for other in [one for one in self._going.values() if one.last in TERMINAL]:
                del self._going[other.key]
                self._over.add(other.key)
            return journal

    def get(self, key: Key) -> Journal | None:
        """The journal of ``key`` when there is one."""
        exists = (self._root / key.uid / f"{key.epoch}.{key.role}").exists()
        return self.open(key) if exists else None

    def attempts(self, uid: str | None = None) -> list[Key]:
        """All keys on disk (of one migration), oldest epoch first."""
        directories = [self._root / uid] if uid else sorted(self._root.iterdir())
        return [key for d in directories if UID.match(d.name) for key in _keys_in(d)]

    def highest_epoch(self, uid: str) -> int:
        """Zero for an unknown migration."""
        return max((key.epoch for key in self.attempts(uid)), default=0)

    def readable(self, uid: str | None = None) -> Iterator[Journal]:
        """All journals (of one migration) but damaged ones: those concern their own only."""
        for key in self.attempts(uid):
            try:
                yield self.open(key)
            except Unsafe:
                continue

    def live(self) -> frozenset[str]:
        """UIDs of migrations that are not known to be over on this node."""
        return frozenset(key.uid for key in self.attempts() if not self._is_over(key))

    def _is_over(self, key: Key) -> bool:
        if key in self._over:
            return True
        try:
            return self.open(key).terminal
        except Unsafe:
            return False

    def forget(self, uid: str) -> None:
        """Removes everything about a migration whose journals are all terminal."""
        with self._lock:
            for key in self.attempts(uid):
                self._known.pop(key, None)
                self._going.pop(key, None)
                self._over.discard(key)
                (self._root / uid / f"{key.epoch}.{key.role}").unlink()
            (self._root / uid).rmdir()


def parse(content: bytes, name: str) -> tuple[list[Record], int]:
    """Records in ``content`` and the length that they fill; a torn last line is left out."""
    records: list[Record] = []
    position = 0
    while (end := content.find(b"\n", position)) >= 0:
        try:
            records.append(_decode(content[position:end]))
        except (ValueError, KeyError, TypeError) as error:
            if end + 1 == len(content):
                break
            raise Unsafe(Reason.INTERNAL, f"journal {name} is damaged: {error}") from error
        position = end + 1
    return records, position


def _keys_in(directory: Path) -> Iterator[Key]:
    if not directory.is_dir():
        return
    matches = [match for path in directory.iterdir() if (match := _FILE.match(path.name))]
    for match in sorted(matches, key=lambda m: (int(m["epoch"]), m["role"])):
        yield Key(directory.name, int(match["epoch"]), Role(match["role"]))


def _encode(record: Record) -> bytes:
    value = {"step": record.step, "at": record.at, "data": record.data}
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _decode(line: bytes) -> Record:
    value = json.loads(line)
    data = value["data"]
    if not isinstance(data, dict):
        raise TypeError("data is no object")
    return Record(Step(value["step"]), float(value["at"]), data)
