"""Memory of a pod's processes, read from outside (``SourceMemory``).

Private anonymous memory, and what is shared (``sharedmemory``): the rest CRIU
dumps itself. A pass lists the processes of each container anew, so children
that appear are added and others forgotten; nothing but the trackers, and the
objects that ``announce`` has found, lives from pass to pass.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from godwit_agent.hostops import filerecords, procs
from godwit_agent.hostops.filerecords import Kind, Record
from godwit_agent.hostops.model import Container, PodState, RoundStats, Tracking
from godwit_agent.hostops.pages import tracking
from godwit_agent.hostops.pages.injector import Injector
from godwit_agent.hostops.pages.pagescan import Scanner
from godwit_agent.hostops.pages.sharedmemory import SharedMemory
from godwit_agent.hostops.pages.tracking import HashTracker, Tracker
from godwit_agent.hostops.ports import CopySink
from godwit_agent.memory import tree, withholding
from godwit_agent.memory.pageset import PAGE
from godwit_api.errors import Aborted, Retryable
from godwit_api.reasons import Reason

BOOTSTRAP_TREE = "bootstrap-pstree.img"
DESCRIPTORS = "descriptors.json"

_BUFFER_BYTES = 2 << 20
_MAX_RANGES_BYTES = 1 << 20
_WORDS_PER_PAGE = PAGE // 8
_ZERO_PAGE = bytes(PAGE)


@dataclass(slots=True)
class _Totals:
    dirty: int = 0
    copied: int = 0
    scan_ns: int = 0
    look_ns: int = 0
    hash_ns: int = 0  # of processes that are read whole each time
    bound: int = 0
    withheld: int = 0
    left: int | None = None  # may still be sent; None: everything
    parts: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Tracked:
    """A process with the tracker made for it; ``started`` tells it from a later one."""

    started: int
    tracker: Tracker
    locked: frozenset[tuple[int, int]]


class HostSourceMemory:
    """The real ``SourceMemory``."""

    def __init__(self, pod: PodState, kind: Tracking, injector: Injector) -> None:
        self._containers = tuple(one for one in pod.containers if one.init_pid)
        self._kind = kind
        self._injector = injector
        self._scanner = Scanner()
        self._tracked: dict[int, _Tracked] = {}
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._buffer.write(bytes(_BUFFER_BYTES))
        self._view = memoryview(self._buffer)
        self._previous_ns = 0
        self._shared = SharedMemory(deliver)

    def announce(self, sink: CopySink) -> bool:
        found = [
            self._shared.announce(one.name, procs.tree(one.init_pid), sink)
            for one in self._containers
        ]
        return any(found)

    def shared(self, container: str) -> tuple[tuple[int, int], ...]:
        return self._shared.taken(container)

    def bootstrap(self) -> Iterable[tuple[str, str, bytes]]:
        for container in self._containers:
            processes = procs.processes(container.init_pid)
            yield container.name, BOOTSTRAP_TREE, tree.encode(processes)
            descriptors = json.dumps(list(container.external_descriptors)).encode()
            yield container.name, DESCRIPTORS, descriptors

    def round(self, sink: CopySink, cancelled: Callable[[], bool] = lambda: False) -> RoundStats:
        try:
            return self._pass(sink, cancelled, last=False)
        except OSError as error:
            raise Retryable(Reason.COPY_FAILED, f"memory cannot be read: {error}") from error

    def final(
        self,
        sink: CopySink,
        allowance: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> RoundStats:
        try:
            return self._pass(sink, cancelled, last=True, allowance=allowance)
        except OSError as error:
            raise Aborted(Reason.COPY_FAILED, f"memory cannot be read: {error}") from error

    def close(self) -> None:
        for tracked in self._tracked.values():
            tracked.tracker.close()
        self._tracked.clear()
        self._injector.close()
        self._shared.close()

    def _pass(
        self,
        sink: CopySink,
        cancelled: Callable[[], bool],
        *,
        last: bool,
        allowance: int | None = None,
    ) -> RoundStats:
        begin, totals = time.monotonic_ns(), _Totals(left=allowance)
        seen: set[int] = set()
        for container in self._containers:
            for pid in procs.tree(container.init_pid):
                seen.add(pid)
                self._process(container, pid, sink, cancelled, totals, last=last)
            if last:
                shared = self._shared.final(container.name, sink, cancelled)
            else:
                shared = self._shared.round(container.name, sink, cancelled)
            totals.dirty += shared.dirty
            totals.bound += shared.dirty
            totals.copied += shared.copied
            totals.look_ns += shared.look_ns
        if not last:
            for pid in self._tracked.keys() - seen:
                self._tracked.pop(pid).tracker.close()
        since = begin - self._previous_ns if self._previous_ns else 0
        self._previous_ns = begin
        total_ns = time.monotonic_ns() - begin
        return RoundStats(
            dirty_bytes=totals.dirty,
            copied_bytes=totals.copied,
            duration_us=total_ns // 1000,
            since_us=since // 1000,
            parts_us={
                "scan": totals.scan_ns // 1000,
                "shared": totals.look_ns // 1000,
                "copy": (total_ns - totals.scan_ns - totals.look_ns) // 1000,
            },
            processes=len(seen),
            freeze_us=(totals.look_ns + totals.hash_ns) // 1000 + self._shared.fill_us(),
            carried_bytes=self._shared.carried_bytes(),
            bound_bytes=totals.bound,
            withheld_bytes=totals.withheld,
        )

    def _process(
        self,
        container: Container,
        pid: int,
        sink: CopySink,
        cancelled: Callable[[], bool],
        totals: _Totals,
        *,
        last: bool,
    ) -> None:
        with contextlib.ExitStack() as stack:
            begin = time.monotonic_ns()
            try:
                # opened anew: after an exec the old ones belong to memory that is gone
                memory = _open(stack, pid, "mem")
                pagemap = _open(stack, pid, "pagemap")
                tracker = self._tracker(pid, last=last)
                vpid = procs.vpid(pid)
            except (FileNotFoundError, ProcessLookupError):
                return
            if vpid is None:
                return
            # what is locked CRIU takes along itself, as long as nobody tracks it
            locked = set(procs.locked(pid))
            tracked = self._tracked.get(pid)
            if tracker and tracked and not locked <= tracked.locked:
                message = f"process {vpid} has locked memory (mlock) while it was copied"
                raise Aborted(Reason.LOCKED_MEMORY, f"container {container.name}: {message}")
            areas = [
                (i.start, i.end)
                for i in procs.mappings(pid)
                if i.private_anonymous and (i.start, i.end) not in locked
            ]
            if last:
                look = tracker.last if tracker else self._everything
                ranges, there = look(pagemap, areas)
                _announce(sink, container.name, vpid, Kind.POPULATED, there)
            elif tracker:
                ranges = tracker.ranges(pagemap, areas)
            totals.dirty += sum(end - start for start, end in ranges)
            withheld: tracking.Ranges = []
            # a hash knows what has changed only when it has been read
            if totals.left is not None and not isinstance(tracker, HashTracker):
                ranges, withheld = withholding.split(ranges, areas, totals.left)
            totals.scan_ns += time.monotonic_ns() - begin
            delivered_ns = 0
            for start, data in self._read(memory, ranges, strict=last):
                if cancelled():
                    raise Aborted(Reason.CANCELLED, "cancelled while memory was copied")
                parts = tuple(tracker.changed(start, data)) if tracker else ((0, len(data)),)
                from_ns = time.monotonic_ns()
                for low, high in parts:
                    if totals.left is not None and totals.left < high - low:
                        withheld.append((start + low, start + high))
                        continue
                    if totals.left is not None:
                        totals.left -= high - low
                    totals.copied += high - low
                    deliver(sink, container.name, vpid, start + low, data[low:high])
                delivered_ns += time.monotonic_ns() - from_ns
            if isinstance(tracker, HashTracker):
                totals.hash_ns += time.monotonic_ns() - begin - delivered_ns
            if withheld:
                totals.withheld += sum(end - start for start, end in withheld)
                _announce(sink, container.name, vpid, Kind.WITHHELD, withheld)

    def _tracker(self, pid: int, *, last: bool) -> Tracker | None:
        """None in the freeze for a process that came after the last round: all of it is new."""
        started = procs.start_time(pid)
        if started is None:
            raise ProcessLookupError
        tracked = self._tracked.get(pid)
        if tracked is not None and tracked.started == started:
            return tracked.tracker
        if tracked is not None:
            tracked.tracker.close()
        if last and self._kind is Tracking.USERFAULTFD:
            return None
        tracker = tracking.make(pid, self._kind, self._scanner, self._injector)
        self._tracked[pid] = _Tracked(started, tracker, frozenset(procs.locked(pid)))
        return tracker

    def _everything(
        self, pagemap: int, areas: Iterable[tuple[int, int]]
    ) -> tuple[tracking.Ranges, tracking.Ranges]:
        return tracking.everything(self._scanner, pagemap, areas)

    def _read(
        self, memory: int, ranges: Iterable[tuple[int, int]], *, strict: bool
    ) -> Iterator[tuple[int, memoryview]]:
        """Pieces of at most the buffer; what vanishes while it runs is left out."""
        for start, end in ranges:
            at = start
            while at < end:
                length = min(end - at, _BUFFER_BYTES)
                try:
                    got = os.preadv(memory, [self._view[:length]], at) // PAGE * PAGE
                except OSError:
                    got = 0
                if got:
                    yield at, self._view[:got]
                elif strict:
                    raise OSError(f"nothing at {at:#x}")
                at += got or PAGE


def _open(stack: contextlib.ExitStack, pid: int, name: str) -> int:
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _announce(
    sink: CopySink, container: str, vpid: int, kind: Kind, ranges: tracking.Ranges
) -> None:
    """All populated ranges, as CRIU's page map need not list what is unchanged (criu-shim.c);
    or what is withheld of them."""
    numbers = array("Q", itertools.chain.from_iterable(ranges)).tobytes()
    for part, at in enumerate(range(0, max(len(numbers), 1), _MAX_RANGES_BYTES)):
        record = Record(kind, "", b".", size=part, number=vpid)
        body = memoryview(numbers)[at : at + _MAX_RANGES_BYTES]
        sink.file(container, filerecords.encode(record), body)


def deliver(sink: CopySink, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
    """Pages that are all zero go as ranges: most begin with a zero word, few others do."""
    words = data.cast("Q")[::_WORDS_PER_PAGE].tolist()
    begin = 0
    page = 0
    count = len(words)
    while page < count:
        if words[page] or data[page * PAGE : (page + 1) * PAGE].tobytes() != _ZERO_PAGE:
            page += 1
            continue
        if page > begin:
            sink.pages(container, vpid, vaddr + begin * PAGE, data[begin * PAGE : page * PAGE])
        first = page
        while page < count and (
            not words[page] and data[page * PAGE : (page + 1) * PAGE].tobytes() == _ZERO_PAGE
        ):
            page += 1
        sink.zero(container, vpid, vaddr + first * PAGE, (page - first) * PAGE)
        begin = page
    if begin < count:
        sink.pages(container, vpid, vaddr + begin * PAGE, data[begin * PAGE :])
