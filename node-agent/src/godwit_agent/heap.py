"""The C heap of this process."""

from __future__ import annotations

import ctypes

_LIBC = ctypes.CDLL(None)


def give_back() -> None:
    """Free pages inside the heap go back to the kernel.

    What a move has needed is freed in the middle of the heap, of which glibc only cuts the end
    by itself (malloc_trim(3)). A C library without this keeps nothing worth it.
    """
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim:
        trim(ctypes.c_size_t(0))
