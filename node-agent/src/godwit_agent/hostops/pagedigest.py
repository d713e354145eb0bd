"""Digests of pages, and what of them differs, by node-agent/native/pages.c.

The memory that is compared belongs to somebody else, who may truncate it:
every call that reads it can say so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from godwit_agent.memory.pageset import PAGE

_LIBRARY = "/app/lib/pages.so"
_DIGEST_BYTES = 16
_KEY_BYTES = 2 * 4096
_FOLD_BYTES = 256 * PAGE


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where it has not been built."""
    path = Path(os.environ.get("GODWIT_PAGES", _LIBRARY))
    if not path.exists():
        return None
    found = ctypes.CDLL(str(path))
    place, size = ctypes.c_void_p, ctypes.c_size_t
    found.godwit_pages_start.argtypes = [place, size]
    found.godwit_pages_digest.argtypes = [place, size, place]
    found.godwit_pages_fold.argtypes = [ctypes.c_char_p, size, place]
    found.godwit_pages_compare.argtypes = [place, size, place, place, place]
    found.godwit_pages_compare.restype = ctypes.c_long
    found.godwit_pages_copy.argtypes = [place, place, size]
    if found.godwit_pages_start(os.urandom(_KEY_BYTES), _KEY_BYTES):
        return None
    return found


class Table:
    """The digests of ``PAGES`` neighbouring pages as they were sent. One call at a time.

    All its memory is touched when it is made, so that a freeze need not.
    """

    PAGES = 1 << 14

    def __init__(self) -> None:
        self._known = bytearray(self.PAGES * _DIGEST_BYTES)
        self._have = bytearray(self.PAGES)
        self._changed = bytearray(self.PAGES)
        self._known_at, self._have_at, self._changed_at = (
            ctypes.addressof(ctypes.c_char.from_buffer(each))
            for each in (self._known, self._have, self._changed)
        )
        self._lock = threading.Lock()

    def changed(self, address: int, first: int, count: int) -> list[tuple[int, int]] | None:
        """Runs (first page, last page + 1) that are not as they were sent, of ``count`` pages
        from ``first`` on, which lie at ``address``; None when they are no longer there."""
        compare = _required().godwit_pages_compare
        with self._lock:
            number = compare(
                address,
                count,
                self._known_at + first * _DIGEST_BYTES,
                self._have_at + first,
                self._changed_at,
            )
            if number < 0:
                return None
            return list(_runs(self._changed, 0, count, first)) if number else []

    def sent(self, address: int, first: int, count: int) -> None:
        """The pages at ``address``, which nobody writes to, are what is sent."""
        at = self._known_at + first * _DIGEST_BYTES
        _required().godwit_pages_digest(address, count, at)
        self._have[first : first + count] = b"\x01" * count

    def emptied(self, first: int, last: int) -> list[tuple[int, int]]:
        """Runs between the pages that were sent and are nothing any more."""
        runs = list(_runs(self._have, first, last, 0))
        if runs:
            self._have[first:last] = bytes(last - first)
        return runs


def copy(to: int, address: int, length: int) -> bool:
    """False when the memory is no longer there."""
    return not _required().godwit_pages_copy(to, address, length)


def fingerprint(data: bytes) -> bytes:
    """16 bytes that differ for different ``data`` of one length, at most 1 MiB."""
    found = library()
    if found is None or len(data) > _FOLD_BYTES:
        return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
    count = pages(len(data))
    if len(data) % PAGE:
        data = data.ljust(count * PAGE, b"\0")
    result = ctypes.create_string_buffer(_DIGEST_BYTES)
    found.godwit_pages_fold(data, count, result)
    return result.raw


def _required() -> ctypes.CDLL:
    found = library()
    assert found, "without the library nothing is compared"
    return found


def _runs(marks: bytearray, first: int, last: int, shift: int) -> Iterator[tuple[int, int]]:
    begin = marks.find(1, first, last)
    while begin >= 0:
        end = marks.find(0, begin, last)
        end = last if end < 0 else end
        yield begin + shift, end + shift
        begin = marks.find(1, end, last)


def pages(length: int) -> int:
    """Whole pages that hold so many bytes."""
    return -(-length // PAGE)
