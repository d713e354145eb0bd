"""Pages of a target that are still on the source: marks, and how CRIU's page daemon asks for them.

The other end, and the form of the files, is ``native/criu-postcopy.c``. All of it lies in the
store's tmpfs, so an agent that is restarted finds what is missing where it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from godwit_agent.memory.pageset import PAGE, PageSet

_PREFIX = "missing-"
_WANTED, _ARRIVED = "wanted", "arrived"
_RECORD = struct.Struct("=QQ")
_RECORDS_AT_ONCE = 256  # of a pipe's 64 KiB
_MARK_BYTES = 1 << 20  # read at a time: 4 GiB of memory


class Marks:
    """One byte for each page of one process, 1 while it is missing. Thread-safe."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        self._fd = os.open(path, flags, 0o600)
        self._lock = threading.Lock()
        self._count = sum((end - start) // PAGE for start, end in self.ranges())

    @property
    def bytes(self) -> int:
        """How much is missing."""
        return self._count * PAGE

    def set(self, pages: PageSet) -> None:
        """These, and no others, are missing."""
        with self._lock:
            os.ftruncate(self._fd, 0)
            for first, marks in pages.marks():
                os.pwrite(self._fd, marks, first)
            self._count = len(pages)

    def clear(self, start: int, end: int) -> None:
        """The pages have been written: they are served from now on."""
        with self._lock:
            marks = os.pread(self._fd, (end - start) // PAGE, start // PAGE)
            os.pwrite(self._fd, bytes(len(marks)), start // PAGE)
            self._count -= marks.count(1)

    def ranges(self, start: int = 0, end: int = 1 << 63) -> Iterator[tuple[int, int]]:
        """What is missing, in order; looked at while it is walked."""
        at, stop = start // PAGE, end // PAGE
        while at < stop:
            try:
                at = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            marks = os.pread(self._fd, min(_MARK_BYTES, max(stop - at, 0)), at)
            if not marks:
                return
            first = marks.find(1)
            while first >= 0:
                last = marks.find(0, first)
                last = len(marks) if last < 0 else last
                yield (at + first) * PAGE, (at + last) * PAGE
                first = marks.find(1, last)
            at += len(marks)

    def close(self) -> None:
        os.close(self._fd)


class ContainerMarks:
    """All processes of one container: ``directory`` is the page daemon's. ``reopen``: with what
    an earlier agent has marked there."""

    def __init__(self, directory: Path, *, reopen: bool = True) -> None:
        self._directory = directory
        self._marks: dict[int, Marks] = {}
        self._wanted = self._arrived = -1
        for path in directory.glob(f"{_PREFIX}*") if reopen else ():
            with contextlib.suppress(ValueError):
                self._marks[int(path.name.removeprefix(_PREFIX))] = Marks(path)
        if self._marks:
            self._open()

    @property
    def bytes(self) -> int:
        return sum(marks.bytes for marks in self._marks.values())

    def __bool__(self) -> bool:
        """Whether anything was ever missing."""
        return bool(self._marks)

    def add(self, vpid: int, pages: PageSet) -> None:
        """Before the daemon looks at its first page."""
        if not self._marks:
            for name in (_WANTED, _ARRIVED):
                with contextlib.suppress(FileExistsError):
                    os.mkfifo(self._directory / name, 0o600)
            self._open()
        path = self._directory / f"{_PREFIX}{vpid}"
        self._marks.setdefault(vpid, Marks(path, create=True)).set(pages)

    def marks(self, vpid: int) -> Marks | None:
        return self._marks.get(vpid)

    def processes(self) -> tuple[int, ...]:
        return tuple(sorted(self._marks))

    def ring(self) -> None:
        """The daemon looks again at what it was missing. A full pipe has told it already."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._arrived, b"a")

    def fileno(self) -> int:
        """Readable when the daemon has asked."""
        return self._wanted

    def asked(self) -> list[tuple[int, int]]:
        """(process, address) of pages that threads wait for, each once; does not wait."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._wanted, _RECORDS_AT_ONCE * _RECORD.size)
            whole = len(data) // _RECORD.size * _RECORD.size
            return list(dict.fromkeys(_RECORD.iter_unpack(data[:whole])))
        return []

    def close(self) -> None:
        for marks in self._marks.values():
            marks.close()
        self._marks.clear()
        for fd in (self._wanted, self._arrived):
            if fd >= 0:
                os.close(fd)
        self._wanted = self._arrived = -1

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        self._wanted = os.open(self._directory / _WANTED, flags)
        self._arrived = os.open(self._directory / _ARRIVED, flags)
