"""Pages of a target's copy that are still on its source (``MissingPages``)."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Iterable, Iterator, Mapping

from godwit_agent.hostops import descriptors, procs
from godwit_agent.hostops.criu.pagedaemon import PageDaemon
from godwit_agent.hostops.model import Extent, Piece
from godwit_agent.hostops.pages.pagestore import PageStore
from godwit_agent.hostops.ports import Serving
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

# Fetched at a time for a process that waits for one page: half a millisecond at 1 Gbit/s, and
# what lies beside it is often wanted next.
_AROUND_BYTES = 64 << 10
_RANGES_AT_ONCE = 512
_USERFAULTFD = "anon_inode:[userfaultfd]"


class HostMissing:
    """The real ``MissingPages``, over the containers of which pages are missing."""

    def __init__(self, parts: Mapping[str, tuple[PageStore, PageDaemon]]) -> None:
        self._parts = dict(parts)
        self._held: dict[tuple[int, int], int] = {}  # (daemon, its number) to our number
        self._daemons: dict[str, int] = {}  # pidfds, to hear of an end at once
        self._lock = threading.Lock()
        for name, (_, daemon) in self._parts.items():
            with contextlib.suppress(ProcessLookupError):
                if pid := daemon.pid():
                    self._daemons[name] = os.pidfd_open(pid)

    @property
    def bytes(self) -> int:
        return sum(pages.missing.bytes for pages, _ in self._parts.values())

    def pieces(self, most: int) -> Iterator[Piece]:
        for name, (pages, _) in sorted(self._parts.items()):
            for vpid in pages.missing.processes():
                marks = pages.missing.marks(vpid)
                if marks:
                    yield from _grouped(name, vpid, marks.ranges(), most)

    def wanted(self, timeout_s: float) -> list[Piece]:
        files = {pages.missing.fileno(): name for name, (pages, _) in self._parts.items()}
        with self._lock:
            ends = list(self._daemons.values())
        ready, _, _ = select.select([*files, *ends], [], [], timeout_s)
        found: list[Piece] = []
        for number in ready:
            if number in files:
                found += self._wanted(files[number])
            else:
                self._ended(number)
        return list(dict.fromkeys(found))

    def _wanted(self, name: str) -> Iterator[Piece]:
        missing = self._parts[name][0].missing
        for vpid, address in missing.asked():
            marks = missing.marks(vpid)
            low = address // _AROUND_BYTES * _AROUND_BYTES
            around = tuple(marks.ranges(low, low + _AROUND_BYTES)) if marks else ()
            if around:
                yield Piece(name, vpid, around)
            else:
                missing.ring()  # it has come meanwhile

    def _ended(self, handle: int) -> None:
        """Heard once; it would be readable for ever."""
        with self._lock:
            for name, known in list(self._daemons.items()):
                if known == handle:
                    del self._daemons[name]
                    os.close(handle)

    def arrived(self, piece: Piece, extents: Iterable[Extent]) -> None:
        pages, _ = self._parts[piece.container]
        due = list(reversed(piece.ranges))
        for extent in extents:
            start, end = due.pop() if due else (0, 0)
            stop = extent.vaddr + extent.length
            if extent.vaddr != start or stop > end or len(extent.data) not in (0, extent.length):
                raise Rejected(Reason.MALFORMED, f"pages at {extent.vaddr:#x} are not due")
            if stop < end:
                due.append((stop, end))
            pages.arrived(piece.vpid, start, extent.length, memoryview(extent.data))
        pages.missing.ring()
        if due:
            raise Rejected(Reason.MALFORMED, f"no pages at {due[-1][0]:#x}")

    def serving(self) -> Serving:
        daemons = [daemon for _, daemon in self._parts.values()]
        ended = [daemon for daemon in daemons if daemon.pid() is None]
        if not all(daemon.served() for daemon in ended):
            return Serving.BROKEN
        return Serving.ENDED if len(ended) == len(daemons) else Serving.RUNNING

    def hold(self) -> None:
        """Memory whose userfaultfd has been closed reads as zero; a second descriptor of it,
        here, keeps it from being closed with the daemon."""
        with self._lock:
            for name, (_, daemon) in self._parts.items():
                handle, pid = self._daemons.get(name), daemon.pid()
                if handle is None or pid is None:
                    continue
                for number, target in procs.descriptors(pid):
                    if target == _USERFAULTFD and (pid, number) not in self._held:
                        with contextlib.suppress(OSError):
                            self._held[pid, number] = descriptors.duplicate(handle, number)

    def let_go(self) -> None:
        with self._lock:
            for fd in (*self._held.values(), *self._daemons.values()):
                os.close(fd)
            self._held.clear()
            self._daemons.clear()


def _grouped(
    container: str, vpid: int, ranges: Iterable[tuple[int, int]], most: int
) -> Iterator[Piece]:
    group: list[tuple[int, int]] = []
    size = 0
    for start, end in ranges:
        while start < end:
            cut = min(end, start + most - size)
            group.append((start, cut))
            size += cut - start
            start = cut
            if size == most or len(group) == _RANGES_AT_ONCE:
                yield Piece(container, vpid, tuple(group))
                group, size = [], 0
    if group:
        yield Piece(container, vpid, tuple(group))
