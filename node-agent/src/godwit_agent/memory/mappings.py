"""Mappings in CRIU's ``mm-<pid>.img``: which of them the page daemon must not or cannot fill.

images/mm.proto and vma.proto, v4.2. An image is searched and not parsed: a
thousand mappings take a tenth of the time, inside the freeze. protobuf-c writes
fields in the order of their numbers, so an entry begins start, end, pgoff,
shmid, prot, flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_VARINT = rb"[\x80-\xff]{0,9}[\x00-\x7f]"
# field 14 of the memory's entry, its length, then fields 1 to 6, all of them required
_ENTRY = re.compile(
    rb"\x72" + _VARINT
    + rb"\x08(" + _VARINT + rb")\x10(" + _VARINT + rb")\x18" + _VARINT
    + rb"\x20" + _VARINT + rb"\x28" + _VARINT + rb"\x30(" + _VARINT + rb")",
    re.DOTALL,
)  # fmt: skip
# linux/mman.h. MAP_DROPPABLE is a type of its own beside MAP_SHARED and MAP_PRIVATE.
_MAP_TYPE, _MAP_PRIVATE, _MAP_DROPPABLE = 0x0F, 0x02, 0x08
_MAP_LOCKED, _MAP_HUGETLB = 0x2000, 0x40000


def entries(image: bytes) -> Iterator[tuple[int, int, int]]:
    """(start, end, flags of mmap) of each mapping, in the order of addresses."""
    flags_of: dict[bytes, int] = {}
    for match in _ENTRY.finditer(image):
        flags = flags_of.get(match[3])
        if flags is None:
            flags = flags_of[match[3]] = _number(match[3])
        yield _number(match[1]), _number(match[2]), flags


def droppable(image: bytes) -> list[tuple[int, int]]:
    """Memory that the kernel may empty at any time (glibc keeps getrandom's state in it).

    CRIU takes none of its pages along, restores it empty, and its page daemon
    would try for ever to fill it.
    """
    return [(start, end) for start, end, flags in entries(image) if _is_droppable(flags)]


def eager(image: bytes) -> list[tuple[int, int]]:
    """Anonymous private memory that no page daemon can fill (criu/include/vma.h)."""
    return [
        (start, end)
        for start, end, flags in entries(image)
        if flags & _MAP_TYPE == _MAP_PRIVATE and flags & (_MAP_LOCKED | _MAP_HUGETLB)
    ]


def _is_droppable(flags: int) -> bool:
    return flags & _MAP_TYPE == _MAP_DROPPABLE


def _number(data: bytes) -> int:
    value = 0
    for byte in reversed(data):
        value = value << 7 | byte & 127
    return value
