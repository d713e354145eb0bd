"""How written pages of one process are found: one interface, an adapter per kernel ability.

A tracker answers two questions: which ranges may have changed (``ranges``),
and which pages of a piece that has just been read have (``changed``). Hashing
has to judge the very bytes that are sent, hence the second.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from godwit_agent import log
from godwit_agent.hostops import pagedigest, procs
from godwit_agent.hostops.model import Tracking
from godwit_agent.hostops.pagedigest import Table
from godwit_agent.hostops.pages import pagescan, userfault
from godwit_agent.hostops.pages.injector import Injector
from godwit_agent.hostops.pages.pagescan import Scanner
from godwit_agent.hostops.pages.ptrace import InjectionError, supported
from godwit_agent.memory.pageset import PAGE

Ranges = list[tuple[int, int]]

_DIGEST_BYTES = 16
_O_DIRECT = getattr(os, "O_DIRECT", 0o40000)
_FDINFO_FLAGS = re.compile(r"^flags:\s*([0-7]+)", re.MULTILINE)


class Tracker(Protocol):
    def ranges(self, pagemap: int, areas: Iterable[tuple[int, int]]) -> Ranges:
        """What may have changed since the last call; tracking goes on from here."""

    def last(self, pagemap: int, areas: Iterable[tuple[int, int]]) -> tuple[Ranges, Ranges]:
        """For a process that stands still: what may have changed, and all that is there.
        Does not prepare another call: after a rollback the next ``ranges`` tells it again."""

    def changed(self, vaddr: int, data: memoryview) -> Iterator[tuple[int, int]]:
        """(start, end) of the parts of ``data``, read from ``vaddr``, that have to be sent."""

    def close(self) -> None: ...


class WriteProtectTracker:
    """userfaultfd; see ``userfault``."""

    kind = Tracking.USERFAULTFD

    def __init__(self, pid: int, scanner: Scanner, injector: Injector) -> None:
        self._fd = injector.take(pid)
        self._scanner = scanner
        self._trusted = True

    def ranges(self, pagemap: int, areas: Iterable[tuple[int, int]]) -> Ranges:
        return [found for start, end in areas for found in self._ranges(pagemap, start, end)]

    def _ranges(self, pagemap: int, start: int, end: int) -> Ranges:
        scanner = self._scanner
        try:
            tracked = not scanner.untracked(pagemap, start, end)
            if tracked or userfault.register_anew(self._fd, start, end):
                found = scanner.rearm(pagemap, start, end)
            else:
                found = scanner.look(pagemap, start, end)[0]
        except OSError:  # of a process that changed its mappings between two of our calls
            self._trusted = False
        return found if self._trusted else scanner.look(pagemap, start, end)[1]

    def last(self, pagemap: int, areas: Iterable[tuple[int, int]]) -> tuple[Ranges, Ranges]:
        written, there = everything(self._scanner, pagemap, areas)
        return (written if self._trusted else there), there

    def changed(self, vaddr: int, data: memoryview) -> Iterator[tuple[int, int]]:
        yield 0, len(data)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class HashTracker:
    """Reads everything every time and compares digests, where written pages cannot be found."""

    kind = Tracking.PAGE_HASH

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._tables: dict[int, Table] = {}
        self._digests: dict[int, bytes] = {}  # where the library has not been built

    def ranges(self, pagemap: int, areas: Iterable[tuple[int, int]]) -> Ranges:
        if self._scanner.able:
            return everything(self._scanner, pagemap, areas)[1]
        return [found for start, end in areas for found in pagescan.populated(pagemap, start, end)]

    def last(self, pagemap: int, areas: Iterable[tuple[int, int]]) -> tuple[Ranges, Ranges]:
        found = self.ranges(pagemap, areas)
        return found, found

    def changed(self, vaddr: int, data: memoryview) -> Iterator[tuple[int, int]]:
        if pagedigest.library() is None:
            yield from self._changed_slowly(vaddr, data)
            return
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        at = 0
        while at < len(data):
            number, first = divmod((vaddr + at) // PAGE, Table.PAGES)
            count = min((len(data) - at) // PAGE, Table.PAGES - first)
            if number not in self._tables:
                self._tables[number] = Table()
            table = self._tables[number]
            for low, high in table.changed(address + at, first, count) or ():
                start = at + (low - first) * PAGE
                table.sent(address + start, low, high - low)
                yield start, start + (high - low) * PAGE
            at += count * PAGE

    def _changed_slowly(self, vaddr: int, data: memoryview) -> Iterator[tuple[int, int]]:
        begin = end = 0
        for at in range(0, len(data), PAGE):
            digest = hashlib.blake2b(data[at : at + PAGE], digest_size=_DIGEST_BYTES).digest()
            if self._digests.get(vaddr + at) == digest:
                continue
            self._digests[vaddr + at] = digest
            if at != end:
                if end > begin:
                    yield begin, end
                begin = at
            end = at + PAGE
        if end > begin:
            yield begin, end

    def close(self) -> None:
        self._tables.clear()
        self._digests.clear()


def everything(
    scanner: Scanner, pagemap: int, areas: Iterable[tuple[int, int]]
) -> tuple[Ranges, Ranges]:
    """(written or untracked, all that is there), one walk per run of neighbouring areas."""
    written: Ranges = []
    there: Ranges = []
    for start, end in joined(areas):
        some, more = scanner.look(pagemap, start, end)
        written += some
        there += more
    return written, there


def joined(areas: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted areas with neighbours made one."""
    result: Ranges = []
    for start, end in areas:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result


def probe(scanner: Scanner) -> Tracking:
    """What this kernel and machine can do for ordinary processes."""
    if not supported():
        return Tracking.PAGE_HASH
    try:
        userfault.probe()
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            scanner.look(pagemap, PAGE, 2 * PAGE)
        finally:
            os.close(pagemap)
    except OSError:
        return Tracking.PAGE_HASH
    return Tracking.USERFAULTFD


def make(pid: int, kind: Tracking, scanner: Scanner, injector: Injector) -> Tracker:
    """The best tracker for this process.

    Direct I/O and libaio write through pages pinned earlier, unseen by any
    page table: such a process is hashed.
    """
    if kind is Tracking.USERFAULTFD and not _writes_unseen(pid):
        try:
            return WriteProtectTracker(pid, scanner, injector)
        except InjectionError as error:
            log.info("writes cannot be tracked, memory is hashed", pid=pid, error=error)
    return HashTracker(scanner)


def _writes_unseen(pid: int) -> bool:
    if any(
        item.name == "/[aio] (deleted)" or item.name == "/[aio]" for item in procs.mappings(pid)
    ):
        return True
    try:
        names = os.listdir(f"/proc/{pid}/fdinfo")
    except OSError:
        return False
    for name in names:
        match = _FDINFO_FLAGS.search(procs.read(pid, f"fdinfo/{name}"))
        if match and int(match[1], 8) & _O_DIRECT:
            return True
    return False
