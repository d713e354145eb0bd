"""Pages of one container on the target: one sparse file per process, offset = address.

The file is the pages file of the image directory that CRIU's page daemon
serves from (see ``memory.pagemap``). It lies in the store's tmpfs. Pages that
are zero stay holes.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import os
import threading
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from godwit_agent.hostops.pages.marks import ContainerMarks
from godwit_agent.memory import mappings, pagemap
from godwit_agent.memory.pagemap import Entry
from godwit_agent.memory.pageset import PAGE, PageSet
from godwit_api.errors import Aborted, Rejected
from godwit_api.reasons import Reason

_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # linux/falloc.h
_ADDRESS_SPACE = 1 << 57

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


@dataclass(slots=True)
class _Process:
    fd: int
    have: PageSet = field(default_factory=PageSet)
    data: PageSet = field(default_factory=PageSet)
    there: list[tuple[int, int]] | None = None
    writes: int = 0
    stale: PageSet = field(default_factory=PageSet)  # written since they came, not sent again
    lock: threading.Lock = field(default_factory=threading.Lock)


class PageStore:
    """``write`` and ``zero`` may be called from several threads. ``reopen``: with the marks of
    missing pages that lie there."""

    def __init__(self, directory: Path, *, reopen: bool = True) -> None:
        self._directory = directory
        self._processes: dict[int, _Process] = {}
        self._lock = threading.Lock()
        self.missing = ContainerMarks(directory, reopen=reopen)

    def write(self, vpid: int, vaddr: int, data: memoryview) -> None:
        process = self._process(vpid)
        with process.lock:
            process.writes += 1
        at = 0
        while at < len(data):
            at += os.pwrite(process.fd, data[at:], vaddr + at)
        with process.lock:
            process.writes += 1
            process.have.add(vaddr, vaddr + len(data))
            process.data.add(vaddr, vaddr + len(data))

    def zero(self, vpid: int, vaddr: int, length: int) -> None:
        process = self._process(vpid)
        with process.lock:
            if process.data.touches(vaddr, vaddr + length):
                self._punch(process.fd, vaddr, length)
            process.have.add(vaddr, vaddr + length)
            process.writes += 1

    def populated(self, vpid: int, part: int, body: memoryview) -> None:
        """Ranges that the process has, pairs of 64-bit addresses; part 0 begins a new list."""
        numbers = _ranges(vpid, body)
        process = self._process(vpid)
        with process.lock:
            if part == 0 or process.there is None:
                process.there = []
            process.there += zip(numbers[::2], numbers[1::2], strict=True)

    def withheld(self, vpid: int, part: int, body: memoryview) -> None:
        """Ranges whose last content stays on the source, in the form of ``populated``."""
        numbers = _ranges(vpid, body)
        process = self._process(vpid)
        with process.lock:
            if part == 0:
                process.stale = PageSet()
            process.stale.add_all(numbers)

    def complete(
        self,
        vpid: int,
        entries: tuple[Entry, ...],
        layout: bytes,
        hot_pages: int = 0,
        *,
        may_miss: bool = False,
    ) -> tuple[int, list[Entry]]:
        """Writes the daemon's page map, of all pages that CRIU's own images do not have, but for
        ``hot_pages`` of ``entries`` that the restore has to bring. Bytes of all, and those few.

        CRIU may have looked at changed pages only, so its map says what it has
        and not what there is. ``layout`` is its ``mm`` image. ``Aborted(VerifyFailed)``
        when a page has not come, or has come for memory that no daemon can fill. ``may_miss``:
        what the source withholds is marked as missing (``missing``).
        """
        process = self._process(vpid)
        if process.there is None:
            message = f"process {vpid}: nothing is known of its memory"
            raise Aborted(Reason.VERIFY_FAILED, message)
        ranges = pagemap.to_serve(entries, process.there, mappings.droppable(layout))
        wrong = pagemap.overlap(ranges, mappings.eager(layout))
        if wrong is not None:
            message = f"process {vpid}: the memory at {wrong[0]:#x} has been locked since the copy"
            raise Aborted(Reason.VERIFY_FAILED, message)
        away = process.stale.within(ranges)
        if away and not may_miss:
            message = f"process {vpid}: pages have stayed on the source"
            raise Aborted(Reason.VERIFY_FAILED, message)
        process.have.unite(away)
        for start, end in ranges:
            missing = process.have.first_missing(start, end)
            if missing is not None:
                message = f"process {vpid}: the page at {missing:#x} has not been sent"
                raise Aborted(Reason.VERIFY_FAILED, message)
        if ranges:
            os.ftruncate(process.fd, ranges[-1][1])
        if away:
            self.missing.add(vpid, away)
            # what lies in their place is stale, and no restore may bring that
            entries = tuple(one for one in entries if not away.touches(one.vaddr, one.end))
        hot = pagemap.hot(entries, ranges, hot_pages)
        left = pagemap.without(ranges, hot)
        content = pagemap.encode(vpid, pagemap.for_sparse_file(left))
        (self._directory / f"pagemap-{vpid}.img").write_bytes(content)
        return sum(end - start for start, end in ranges), hot

    def processes(self) -> tuple[int, ...]:
        """Process ids that ``populated`` has named: those that were there in the freeze."""
        return tuple(sorted(v for v, one in self._processes.items() if one.there is not None))

    def kept(self, vpid: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(ranges with data, ranges of zeros), of those of ``populated`` that have come: CRIU's
        own images may have others. ``Aborted(VerifyFailed)`` when nothing is known."""
        process = self._process(vpid)
        if process.there is None:
            message = f"process {vpid}: nothing is known of its memory"
            raise Aborted(Reason.VERIFY_FAILED, message)
        data: list[tuple[int, int]] = []
        zero: list[tuple[int, int]] = []
        for start, end in process.there:
            for low, high in process.have.runs(start, end):
                at = low
                for first, last in process.data.runs(low, high):
                    if at < first:
                        zero.append((at, first))
                    data.append((first, last))
                    at = last
                if at < high:
                    zero.append((at, high))
        return data, zero

    def read(self, vpid: int, start: int, length: int) -> bytes:
        """Pages that ``write`` had brought."""
        return os.pread(self._process(vpid).fd, length, start)

    def arrived(self, vpid: int, vaddr: int, length: int, data: memoryview) -> None:
        """Pages that are missing or were; no ``data``: zeros. ``missing.ring`` tells the daemon."""
        marks = self.missing.marks(vpid)
        if marks is None:
            raise Rejected(Reason.MALFORMED, f"no page of process {vpid} is missing")
        # What is there may have been served and freed: it would lie in memory for nothing.
        for start, end in marks.ranges(vaddr, vaddr + length):
            if data:
                self.write(vpid, start, data[start - vaddr : end - vaddr])
            else:
                self._punch(self._process(vpid).fd, start, end - start)
            marks.clear(start, end)

    @staticmethod
    def _punch(fd: int, start: int, length: int) -> None:
        if _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, start, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def close(self) -> None:
        self.missing.close()
        with self._lock:
            for process in self._processes.values():
                os.close(process.fd)
            self._processes.clear()

    def forget(self, vpid: int) -> _Process | None:
        """What has come of it counts no more; its file is the caller's to close."""
        with self._lock:
            return self._processes.pop(vpid, None)

    def _open(self, vpid: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._directory / f"pages-{vpid}.img", flags, 0o600)

    def _process(self, vpid: int) -> _Process:
        process = self._processes.get(vpid)
        if process is None:
            with self._lock:
                process = self._processes.get(vpid)
                if process is None:
                    process = self._processes[vpid] = _Process(self._open(vpid))
        return process


def _ranges(vpid: int, body: memoryview) -> array[int]:
    """Start, end, start, end … ``Rejected(Malformed)``."""
    numbers = array("Q")
    try:
        numbers.frombytes(bytes(body))
    except ValueError as error:
        raise Rejected(Reason.MALFORMED, f"ranges of process {vpid}: {error}") from error
    # many ranges, in the freeze: no step of the interpreter for each
    together = functools.reduce(operator.or_, numbers, 0)
    uneven = len(numbers) % 2 or together % PAGE or together >= _ADDRESS_SPACE
    if uneven or any(map(operator.ge, numbers[::2], numbers[1::2])):
        raise Rejected(Reason.MALFORMED, f"ranges of process {vpid} are no page ranges")
    return numbers
