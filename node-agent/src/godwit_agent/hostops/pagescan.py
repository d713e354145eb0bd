"""Which pages of a process exist, and which were written (PAGEMAP_SCAN, linux/fs.h, 6.7)."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import struct
import threading

from godwit_agent.memory.pageset import PAGE

_PAGEMAP_SCAN = 0xC0606610
_ARGUMENT = struct.Struct("<12Q")
_REGION = struct.Struct("<QQQ")
_WALK_END = 4 * 8
_WRITTEN, _FILE, _PRESENT, _SWAPPED, _PFNZERO = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
_WP_MATCHING = 1
_REGIONS = 1 << 16

# pagemap entries before PAGEMAP_SCAN: bit 63 present, bit 62 swapped (pagemap.rst)
_POPULATED = bytes(1 if byte & 0xC0 else 0 for byte in range(256))
_RUN = re.compile(rb"\x01+")
_PAGES_PER_READ = 1 << 18


class Scanner:
    """Holds the result buffer, touched when it is made. One call at a time."""

    def __init__(self) -> None:
        self._buffer = mmap.mmap(-1, _REGIONS * _REGION.size)
        self._buffer.write(bytes(len(self._buffer)))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._lock = threading.Lock()

    def written(self, pagemap: int, start: int, end: int, *, rearm: bool) -> list[tuple[int, int]]:
        """Ranges written since the last re-arming; what is not tracked counts as written.

        With ``rearm`` untracked memory is skipped instead. Pages that are
        zero pages of the kernel, of files, or not there, are left out.
        """
        flags = _WP_MATCHING if rearm else 0
        found: list[tuple[int, int]] = []
        with self._lock:
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
                        _FILE | _PFNZERO,  # inverted
                        _WRITTEN | _FILE | _PFNZERO,  # all of these
                        _PRESENT | _SWAPPED,  # any of these
                        _PRESENT,
                    )
                )
                count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
                view = memoryview(self._buffer)[: count * _REGION.size]
                for low, high, _ in _REGION.iter_unpack(view):
                    if found and found[-1][1] == low:
                        found[-1] = (found[-1][0], high)
                    else:
                        found.append((low, high))
                view.release()
                (walked,) = struct.unpack_from("<Q", argument, _WALK_END)
                if walked <= start:
                    break
                start = walked
        return found


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
            low, high = (page + run.start()) * PAGE, (page + run.end()) * PAGE
            if found and found[-1][1] == low:
                found[-1] = (found[-1][0], high)
            else:
                found.append((low, high))
        page += len(flags)
    return found
