"""Which pages of a process exist, and which were written (PAGEMAP_SCAN, linux/fs.h, 6.7)."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import struct
import threading
from collections.abc import Iterator

from godwit_agent.memory.pageset import PAGE

_PAGEMAP_SCAN = 0xC0606610
_ARGUMENT = struct.Struct("<12Q")
_REGION = struct.Struct("<QQQ")
_WALK_END = 4 * 8
_TRACKED = 1 << 0  # PAGE_IS_WPALLOWED: of the mapping, not of the page
_WRITTEN, _PRESENT, _SWAPPED, _PFNZERO = 1 << 1, 1 << 3, 1 << 4, 1 << 5
_GUARD = 1 << 8  # MADV_GUARD_INSTALL, told apart since 6.15
_WP_MATCHING = 1
_REGIONS = 1 << 16

# pagemap entries before PAGEMAP_SCAN: bit 63 present, bit 62 swapped, bit 58 guard (pagemap.rst)
_POPULATED = bytes(1 if byte & 0xC0 and not byte & 0x04 else 0 for byte in range(256))
_RUN = re.compile(rb"\x01+")
_PAGES_PER_READ = 1 << 18


class Scanner:
    """Holds the result buffer, touched when it is made. One call at a time."""

    def __init__(self) -> None:
        self._buffer = mmap.mmap(-1, _REGIONS * _REGION.size)
        self._buffer.write(bytes(len(self._buffer)))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._lock = threading.Lock()
        # Not files' pages: whether a page is one the kernel asks the page, a cache miss for each
        # (11 ms per GiB), and private anonymous mappings, which is all we look at, have none.
        self._absent = _PFNZERO | _GUARD
        self.able = self._probe()
        """Whether this kernel has PAGEMAP_SCAN. It passes over what is not there, whereas the
        older ``populated`` reads 2 GiB for each TiB that a process has only reserved."""

    def rearm(self, pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
        """Ranges written since the last call, which are tracked anew.

        Untracked memory is skipped. Zero pages of the kernel, guards and what
        is not there are left out; so in ``look``. For anonymous memory only.
        """
        found: list[tuple[int, int]] = []
        with self._lock:
            for region in self._scan(pagemap, start, end, _WP_MATCHING, _WRITTEN):
                _append(found, region[0], region[1])
        return found

    def untracked(self, pagemap: int, start: int, end: int) -> bool:
        """Whether something is there in a mapping that is not tracked."""
        with self._lock:
            return any(True for _ in self._scan(pagemap, start, end, 0, 0, without=_TRACKED))

    def look(
        self, pagemap: int, start: int, end: int
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(written since the last ``rearm``, all that is there); untracked memory is written."""
        written: list[tuple[int, int]] = []
        there: list[tuple[int, int]] = []
        with self._lock:
            for low, high, categories in self._scan(pagemap, start, end, 0, 0):
                _append(there, low, high)
                # the mark of a page says nothing in a mapping that is not tracked (``tracking``)
                if categories & _WRITTEN or not categories & _TRACKED:
                    _append(written, low, high)
        return written, there

    def _probe(self) -> bool:
        """Older kernels refuse a category they do not know, and still older ones the call."""
        try:
            pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return self._answers(pagemap) or self._answers(pagemap, _PFNZERO)
        finally:
            os.close(pagemap)

    def _answers(self, pagemap: int, absent: int = _PFNZERO | _GUARD) -> bool:
        self._absent = absent
        try:
            self.look(pagemap, PAGE, 2 * PAGE)
        except OSError:
            return False
        return True

    def _scan(
        self, pagemap: int, start: int, end: int, flags: int, more: int, without: int = 0
    ) -> Iterator[tuple[int, int, int]]:
        """Regions of equal category; ``more`` must be among the categories, ``without`` not."""
        while start < end:
            argument = bytearray(
                _ARGUMENT.pack(
                    _ARGUMENT.size,
                    flags,
                    start,
                    end,
                    0,
                    self._address,
                    _REGIONS,
                    0,
                    self._absent | without,  # inverted
                    self._absent | without | more,  # all of these
                    _PRESENT | _SWAPPED,  # any of these
                    _TRACKED | _WRITTEN,  # to be told
                )
            )
            count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
            with memoryview(self._buffer) as whole, whole[: count * _REGION.size] as view:
                yield from _REGION.iter_unpack(view)
            (walked,) = struct.unpack_from("<Q", argument, _WALK_END)
            if walked <= start:
                return
            start = walked


def _append(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    if ranges and ranges[-1][1] == start:
        ranges[-1] = (ranges[-1][0], end)
    else:
        ranges.append((start, end))


def populated(pagemap: int, start: int, end: int) -> list[tuple[int, int]]:
    """Ranges that exist, on any kernel."""
    found: list[tuple[int, int]] = []
    page, stop = start // PAGE, end // PAGE
    while page < stop:
        data = os.pread(pagemap, 8 * min(stop - page, _PAGES_PER_READ), 8 * page)
        flags = data[7::8].translate(_POPULATED)
        if not flags:
            break
        for run in _RUN.finditer(flags):
            _append(found, (page + run.start()) * PAGE, (page + run.end()) * PAGE)
        page += len(flags)
    return found
