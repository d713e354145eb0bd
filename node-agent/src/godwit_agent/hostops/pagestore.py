"""Pages of one container on the target: one sparse file per process, offset = address.

The file is the pages file of the image directory that CRIU's page daemon
serves from (see ``memory.pagemap``). It lies in the store's tmpfs. Pages that
are zero stay holes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from godwit_agent.memory import mappings, pagemap
from godwit_agent.memory.pagemap import Entry
from godwit_agent.memory.pageset import PAGE, PageSet
from godwit_api.errors import Aborted, Rejected
from godwit_api.reasons import Reason

_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


@dataclass(slots=True)
class _Process:
    fd: int
    have: PageSet = field(default_factory=PageSet)
    data: PageSet = field(default_factory=PageSet)
    there: list[tuple[int, int]] | None = None
    writes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class PageStore:
    """``write`` and ``zero`` may be called from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: dict[int, _Process] = {}
        self._lock = threading.Lock()

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
                punch = _PUNCH_HOLE | _KEEP_SIZE
                if _libc.fallocate(process.fd, punch, vaddr, length):
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
            process.have.add(vaddr, vaddr + length)
            process.writes += 1

    def populated(self, vpid: int, part: int, body: memoryview) -> None:
        """Ranges that the process has, pairs of 64-bit addresses; part 0 begins a new list."""
        numbers = array("Q")
        try:
            numbers.frombytes(bytes(body))
        except ValueError as error:
            raise Rejected(Reason.MALFORMED, f"ranges of process {vpid}: {error}") from error
        ranges = list(zip(numbers[::2], numbers[1::2], strict=False))
        if len(numbers) % 2 or any(s % PAGE or e % PAGE or s >= e for s, e in ranges):
            raise Rejected(Reason.MALFORMED, f"ranges of process {vpid} are no page ranges")
        process = self._process(vpid)
        with process.lock:
            if part == 0 or process.there is None:
                process.there = []
            process.there += ranges

    def complete(
        self, vpid: int, entries: tuple[Entry, ...], layout: bytes, hot_pages: int = 0
    ) -> tuple[int, list[Entry]]:
        """Writes the daemon's page map, of all pages that CRIU's own images do not have, but for
        ``hot_pages`` of ``entries`` that the restore has to bring. Bytes of all, and those few.

        CRIU may have looked at changed pages only, so its map says what it has
        and not what there is. ``layout`` is its ``mm`` image. ``Aborted(VerifyFailed)``
        when a page has not come, or has come for memory that no daemon can fill.
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
        for start, end in ranges:
            missing = process.have.first_missing(start, end)
            if missing is not None:
                message = f"process {vpid}: the page at {missing:#x} has not been sent"
                raise Aborted(Reason.VERIFY_FAILED, message)
        if ranges:
            os.ftruncate(process.fd, ranges[-1][1])
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

    def close(self) -> None:
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
