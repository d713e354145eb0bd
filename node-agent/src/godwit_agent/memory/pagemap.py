"""CRIU's page maps, and the one that makes a sparse file a pages file.

``pagemap-<pid>.img`` (images/pagemap.proto, criu/pagemap.c, v4.2): a head with
the number of the pages file, then entries in the order of the pages in it.
The page daemon advances through the pages file by every entry that is
PRESENT, but serves only LAZY ones. So a file whose offsets *are* addresses
becomes a pages file when each gap is an entry that is PRESENT and not LAZY.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from godwit_agent.memory import protobuf
from godwit_agent.memory.pageset import PAGE
from godwit_agent.memory.protobuf import ImageError

IMG_COMMON_MAGIC = 0x54564319
PAGEMAP_MAGIC = 0x56084025
PE_PARENT, PE_LAZY, PE_PRESENT = 1, 2, 4

# CRIU counts the bytes of an entry in an int (criu/uffd.c, max_iov_len)
_MAX_ENTRY_BYTES = 64 << 20
_MAGICS = (IMG_COMMON_MAGIC, PAGEMAP_MAGIC)
_VADDR, _COMPAT_PAGES, _IN_PARENT, _FLAGS, _PAGES = 1, 2, 3, 4, 5


@dataclass(frozen=True, slots=True)
class Entry:
    """``pages`` pages from ``vaddr`` on; ``flags`` of PE_*."""

    vaddr: int
    pages: int
    flags: int

    @property
    def end(self) -> int:
        return self.vaddr + self.pages * PAGE


def decode(data: bytes) -> tuple[int, tuple[Entry, ...]]:
    """Number of the pages file and all entries; raises ``ImageError``."""
    messages = protobuf.entries(data, _MAGICS)
    head = dict(protobuf.fields(next(messages, memoryview(b""))))
    if 1 not in head:
        raise ImageError("page map without a head")
    return head[1], tuple(_entry(message) for message in messages)


def encode(pages_id: int, entries: Iterable[Entry]) -> bytes:
    head = protobuf.message([(1, pages_id)])
    rows = (
        protobuf.message(
            [
                (_VADDR, entry.vaddr),
                (_COMPAT_PAGES, 0),
                (_FLAGS, entry.flags),
                (_PAGES, entry.pages),
            ]
        )
        for entry in entries
    )
    return protobuf.image(_MAGICS, [head, *rows])


def lazy_ranges(entries: Iterable[Entry]) -> list[tuple[int, int]]:
    """Address ranges that the page daemon has to serve, sorted, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for entry in sorted((entry for entry in entries if entry.flags & PE_LAZY), key=_by_address):
        if ranges and entry.vaddr < ranges[-1][1]:
            raise ImageError(f"pages at {entry.vaddr:#x} are listed twice")
        if ranges and entry.vaddr == ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], entry.end)
        else:
            ranges.append((entry.vaddr, entry.end))
    return ranges


def to_serve(
    entries: Iterable[Entry],
    populated: Iterable[tuple[int, int]],
    droppable: Iterable[tuple[int, int]] = (),
) -> list[tuple[int, int]]:
    """What the page daemon has to serve: all that is there but what CRIU's images hold, and
    but ``droppable`` memory, which is restored empty.

    ``populated`` is what the process had when it stood still. What CRIU calls
    lazy belongs to it even if it appeared later (the kernel itself may write).
    """
    entries = tuple(entries)
    held = sorted([*((e.vaddr, e.end) for e in entries if not e.flags & PE_LAZY), *droppable])
    wanted = sorted([*populated, *lazy_ranges(entries)])
    return _without(_union(wanted), held)


def hot(
    entries: Iterable[Entry], ranges: Iterable[tuple[int, int]], most_pages: int
) -> list[Entry]:
    """Lazy entries whose pages a restore had better bring itself: what was written last will be
    touched first. At most ``most_pages``, short entries before long ones, which are rather data
    that passes through than a stack or a counter. Only what lies within one of ``ranges``.
    """
    within: list[Entry] = []
    pending = iter(ranges)
    current = next(pending, None)
    for entry in sorted(entries, key=_by_address):
        while current is not None and current[1] <= entry.vaddr:
            current = next(pending, None)
        inside = current is not None and current[0] <= entry.vaddr and entry.end <= current[1]
        if inside and entry.flags & (PE_LAZY | PE_PRESENT) == PE_LAZY:
            within.append(entry)
    chosen: list[Entry] = []
    for entry in sorted(within, key=_by_length):
        most_pages -= entry.pages
        if most_pages < 0:
            break
        chosen.append(entry)
    return sorted(chosen, key=_by_address)


def present(entries: Iterable[Entry], chosen: Iterable[Entry]) -> list[Entry]:
    """``entries`` with ``chosen`` ones as part of the pages file."""
    names = {entry.vaddr for entry in chosen}
    return [
        Entry(entry.vaddr, entry.pages, PE_PRESENT) if entry.vaddr in names else entry
        for entry in entries
    ]


def without(ranges: Iterable[tuple[int, int]], entries: Iterable[Entry]) -> list[tuple[int, int]]:
    """What is left of sorted ``ranges`` when those of sorted ``entries`` are taken out."""
    return _without(ranges, [(entry.vaddr, entry.end) for entry in entries])


def _union(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted ranges, overlapping and neighbouring ones made one."""
    current: tuple[int, int] | None = None
    for start, end in ranges:
        if current is None:
            current = (start, end)
        elif start <= current[1]:
            current = (current[0], max(current[1], end))
        else:
            yield current
            current = (start, end)
    if current is not None:
        yield current


def _without(
    ranges: Iterable[tuple[int, int]], holes: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    first = 0
    for start, end in ranges:
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        for low, high in holes[first:]:
            if low >= end:
                break
            if low > start:
                found.append((start, low))
            start = max(start, high)
        if start < end:
            found.append((start, end))
    return found


def for_sparse_file(ranges: Iterable[tuple[int, int]]) -> Iterator[Entry]:
    """Entries for a pages file in which the offset of every page is its address."""
    at = 0
    for start, end in ranges:
        if start < at:
            raise ValueError("ranges overlap")
        if start > at:
            yield Entry(at, (start - at) // PAGE, PE_PRESENT)
        for piece in range(start, end, _MAX_ENTRY_BYTES):
            length = min(_MAX_ENTRY_BYTES, end - piece)
            yield Entry(piece, length // PAGE, PE_PRESENT | PE_LAZY)
        at = end


def _entry(message: memoryview) -> Entry:
    values = dict(protobuf.fields(message))
    pages = values.get(_PAGES) or values.get(_COMPAT_PAGES, 0)
    flags = values.get(_FLAGS)
    if flags is None:
        flags = PE_PARENT if values.get(_IN_PARENT) else PE_PRESENT
    vaddr = values.get(_VADDR)
    if vaddr is None or vaddr % PAGE or not 0 < pages < 1 << 51:
        raise ImageError("page map entry without address or pages")
    return Entry(vaddr, pages, flags)


def _by_address(entry: Entry) -> int:
    return entry.vaddr


def _by_length(entry: Entry) -> int:
    return entry.pages


def overlap(
    ranges: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]
) -> tuple[int, int] | None:
    """The first of ``ranges`` that has a page in common with one of ``others``; both sorted."""
    pending = iter(others)
    other = next(pending, None)
    for start, end in ranges:
        while other is not None and other[1] <= start:
            other = next(pending, None)
        if other is not None and other[0] < end:
            return start, end
    return None
