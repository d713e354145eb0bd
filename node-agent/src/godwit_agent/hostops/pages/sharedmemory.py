"""Shared memory of a pod, copied object by object while it is in use.

Who writes to it, and how, is not followed: any process may map it, write(2) to
it, or hand it on. So what it holds is compared with what was sent, at the speed
of memory (``pagedigest``), through a mapping that exists before the freeze.
CRIU is told to leave out what is copied here (criu-shared.c).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from godwit_agent.hostops import filerecords, pagedigest
from godwit_agent.hostops.filerecords import Kind, Record
from godwit_agent.hostops.pagedigest import Table
from godwit_agent.hostops.pages import sharedobjects
from godwit_agent.hostops.pages.sharedobjects import Found
from godwit_agent.hostops.ports import CopySink
from godwit_agent.memory.pageset import PAGE
from godwit_api.errors import Aborted
from godwit_api.reasons import Reason

SHARED = 1 << 31
"""Added to the number of an object where the stream has that of a process, which is smaller."""

# What the target copies into a SysV segment in the freeze, measured: pages that are used first.
_FILL_BYTES_PER_S = 1 << 30

_MAX_OBJECTS, _COPIES = 1 << 16, 1 << 15
_LOOKERS = max(1, min(4, (os.cpu_count() or 2) // 2))
_BUFFER_BYTES = 2 << 20
_TABLE_BYTES = Table.PAGES * PAGE
_MAX_RANGES = (1 << 20) // 16
_POPULATE_READ = 22  # MADV_POPULATE_READ, linux/mman.h, 5.14
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

# (container, number in the stream, offset, data): to the sink, zero pages as ranges
Deliver = Callable[[CopySink, str, int, int, memoryview], None]


class About(msgspec.Struct, frozen=True, array_like=True):
    """Body of a record ``SHARED``: CRIU's number, and what a memfd is made of. ``copy`` names
    the copy that it belongs to: one that starts over numbers its objects anew."""

    copy: int
    number: int
    name: bytes
    sealable: bool
    sysv: bool
    gone: bool = False


@dataclass(slots=True)
class Totals:
    """Of one pass: bytes found changed, bytes sent, time of comparing."""

    dirty: int = 0
    copied: int = 0
    look_ns: int = 0


@dataclass(slots=True)
class _Object:
    """One object that is copied here. The open file keeps its inode's number its own."""

    index: int
    container: str
    about: About
    device: int
    fd: int
    address: int = 0
    mapped: int = 0
    tables: dict[int, Table] = field(default_factory=dict)

    def map(self, size: int) -> None:
        """Maps it anew if it has grown. ``OSError``."""
        if size <= self.mapped:
            return
        self.unmap()
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, self.fd, 0)
        if address is None or address == _FAILED:
            raise OSError(ctypes.get_errno(), f"shared memory {self.about.number} cannot be mapped")
        self.address, self.mapped = address, size

    def unmap(self) -> None:
        if self.mapped:
            _libc.munmap(self.address, self.mapped)
        self.address = self.mapped = 0

    def close(self) -> None:
        self.unmap()
        self.tables.clear()
        os.close(self.fd)


class SharedMemory:
    """What is shared in each container of one pod. One call at a time."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._objects: dict[tuple[str, tuple[int, int, bool]], _Object] = {}
        self._copy = int.from_bytes(os.urandom(7))
        # what an earlier copy's connection still brings is for numbers that nobody knows any more
        self._count = self._copy % _COPIES * _MAX_OBJECTS
        self._last = self._count + _MAX_OBJECTS - 1
        self._carried: dict[str, int] = {}
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._buffer.write(bytes(_BUFFER_BYTES))
        self._view = memoryview(self._buffer)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        # the library works without the interpreter's lock; one processor is not enough for
        # the memory that a large node has
        self._lookers = ThreadPoolExecutor(_LOOKERS, thread_name_prefix="look")

    def announce(self, container: str, pids: Sequence[int], sink: CopySink) -> bool:
        """Looks for objects; whether there are new ones, of which the target must have heard
        before their pages come. One that nobody has any more is forgotten."""
        there = sharedobjects.of(pids)
        ours = sharedobjects.without_twins(there) if pagedigest.library() else ()
        carried = {one.key for one in there} - {one.key for one in ours}
        new = False
        for one in ours:
            if (container, one.key) not in self._objects:
                if self._take(container, one, sink):
                    new = True
                else:
                    carried.add(one.key)
        keys = {one.key for one in ours}
        for name, key in [known for known in self._objects if known[0] == container]:
            if key not in keys:
                self._forget(self._objects.pop((name, key)), sink)
        attached = {one.number for one in there if one.sysv}
        detached = sharedobjects.segments(pids[0]) if pids else {}
        self._carried[container] = sharedobjects.used_bytes(
            one for one in there if one.key in carried
        ) + sum(size for number, size in detached.items() if number not in attached)
        return new

    def taken(self, container: str) -> tuple[tuple[int, int], ...]:
        """(device, inode) of the objects that ``final`` will send and CRIU need not."""
        return tuple((one.device, one.about.number) for one in self._of(container))

    def carried_bytes(self) -> int:
        """What CRIU will take along whole, as far as ``announce`` has seen."""
        return sum(self._carried.values())

    def fill_us(self) -> int:
        """What the target needs in the freeze for what cannot be made before it."""
        used = sum(
            os.fstat(one.fd).st_blocks * 512 for one in self._objects.values() if one.about.sysv
        )
        return used * 1_000_000 // _FILL_BYTES_PER_S

    def round(self, container: str, sink: CopySink, cancelled: Callable[[], bool]) -> Totals:
        """What has changed since it was sent, of all that was announced. ``OSError``."""
        totals = Totals()
        for one in self._of(container):
            self._pass(one, sink, cancelled, totals, last=False)
        return totals

    def final(
        self, container: str, sink: CopySink, cancelled: Callable[[], bool] = lambda: False
    ) -> Totals:
        """The rest of what stands still, and a list of all of it. ``OSError``."""
        totals = Totals()
        for one in self._of(container):
            ranges = self._pass(one, sink, cancelled, totals, last=True)
            self._tell(one, sink, os.fstat(one.fd).st_size)
            for part, at in enumerate(range(0, max(len(ranges), 1), _MAX_RANGES)):
                numbers = array("Q", (i for pair in ranges[at : at + _MAX_RANGES] for i in pair))
                record = Record(Kind.POPULATED, "", b".", size=part, number=SHARED | one.index)
                body = memoryview(numbers.tobytes())
                sink.file(container, filerecords.encode(record), body)
        return totals

    def close(self) -> None:
        for one in self._objects.values():
            one.close()
        self._objects.clear()
        self._lookers.shutdown(wait=False)

    def _of(self, container: str) -> Iterator[_Object]:
        for (name, _), one in list(self._objects.items()):
            if name == container:
                yield one

    def _take(self, container: str, found: Found, sink: CopySink) -> bool:
        if self._count == self._last:
            return False
        try:
            fd = os.open(found.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False  # gone, or not ours to read: CRIU will say so
        try:
            about = os.fstat(fd)
            same = (about.st_dev, about.st_ino) == (found.device, found.number)
            can_be_sealed = same and not found.sysv and sharedobjects.sealable(fd)
        except OSError:
            same = False
        if not same:
            os.close(fd)
            return False
        self._count += 1
        name = os.fsencode(found.name)
        made = About(self._copy, found.number, name, can_be_sealed, found.sysv)
        one = _Object(self._count, container, made, found.device, fd)
        self._objects[container, found.key] = one
        self._tell(one, sink, about.st_size)
        return True

    def _forget(self, one: _Object, sink: CopySink) -> None:
        one.about = msgspec.structs.replace(one.about, gone=True)
        self._tell(one, sink, 0)
        one.close()

    @staticmethod
    def _tell(one: _Object, sink: CopySink, size: int) -> None:
        record = Record(Kind.SHARED, "", b".", size=size, number=one.index)
        body = memoryview(msgspec.msgpack.encode(one.about))
        sink.file(one.container, filerecords.encode(record), body)

    def _pass(
        self,
        one: _Object,
        sink: CopySink,
        cancelled: Callable[[], bool],
        totals: Totals,
        *,
        last: bool,
    ) -> list[tuple[int, int]]:
        """Ranges of pages that are there."""
        size = pagedigest.pages(os.fstat(one.fd).st_size) * PAGE
        one.map(size)
        ranges = list(_pages(sharedobjects.data_ranges(one.fd, size)))
        self._holes(one, sink, ranges)
        pieces = list(_pieces(ranges))
        for number, start, end in pieces:
            if number not in one.tables:
                one.tables[number] = Table()
            if not last:
                _libc.madvise(one.address + start, end - start, _POPULATE_READ)

        def look(piece: tuple[int, int, int]) -> list[tuple[int, int]] | None:
            number, start, end = piece
            first = (start - number * _TABLE_BYTES) // PAGE
            return one.tables[number].changed(one.address + start, first, (end - start) // PAGE)

        begin = time.monotonic_ns()
        found = list(self._lookers.map(look, pieces))
        totals.look_ns += time.monotonic_ns() - begin
        for (number, _, _), runs in zip(pieces, found, strict=True):
            if runs is None and last:
                raise _cut_off(one)
            for low, high in runs or ():
                if cancelled():
                    raise Aborted(Reason.CANCELLED, "cancelled while shared memory was copied")
                totals.dirty += (high - low) * PAGE
                self._send(one, sink, number, low * PAGE, high * PAGE, totals, last=last)
        return ranges

    def _send(
        self,
        one: _Object,
        sink: CopySink,
        table_number: int,
        start: int,
        end: int,
        totals: Totals,
        *,
        last: bool,
    ) -> None:
        """A copy is judged and sent, as others may go on writing. Offsets within the table."""
        table, base = one.tables[table_number], table_number * _TABLE_BYTES
        for at in range(start, end, _BUFFER_BYTES):
            length = min(_BUFFER_BYTES, end - at)
            if not pagedigest.copy(self._at, one.address + base + at, length):
                if last:
                    raise _cut_off(one)
                return
            table.sent(self._at, at // PAGE, length // PAGE)
            totals.copied += length
            number = SHARED | one.index
            self._deliver(sink, one.container, number, base + at, self._view[:length])

    @staticmethod
    def _holes(one: _Object, sink: CopySink, ranges: list[tuple[int, int]]) -> None:
        """What was sent and is not there any more reads as zero."""
        for number, table in one.tables.items():
            base, at = number * _TABLE_BYTES, 0
            inside = [
                (max(start, base) - base, min(end, base + _TABLE_BYTES) - base)
                for start, end in ranges
                if start < base + _TABLE_BYTES and end > base
            ]
            for start, end in (*inside, (_TABLE_BYTES, _TABLE_BYTES)):
                for low, high in table.emptied(at // PAGE, start // PAGE):
                    length = (high - low) * PAGE
                    sink.zero(one.container, SHARED | one.index, base + low * PAGE, length)
                at = end


def _cut_off(one: _Object) -> OSError:
    return OSError(errno.EFAULT, f"shared memory {one.about.number} is cut off")


def _pages(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Whole pages: the last one may be half within the file."""
    for start, end in ranges:
        yield start // PAGE * PAGE, pagedigest.pages(end) * PAGE


def _pieces(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(number of the table, start, end), cut at the borders of tables."""
    for start, end in ranges:
        at = start
        while at < end:
            number = at // _TABLE_BYTES
            stop = min(end, (number + 1) * _TABLE_BYTES)
            yield number, at, stop
            at = stop
