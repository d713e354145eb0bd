"""What was freed in the middle of the heap is not kept from the node."""

import ctypes
from pathlib import Path

from godwit_agent import heap

MEBIBYTE = 1 << 20
BLOCK = 4096
_LIBC = ctypes.CDLL(None)
_LIBC.malloc.restype = ctypes.c_void_p


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * BLOCK


def test_freed_blocks_between_used_ones_go_back() -> None:
    blocks = [_LIBC.malloc(ctypes.c_size_t(BLOCK)) for _ in range(64 * MEBIBYTE // BLOCK)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    kept, freed = blocks[::64], [block for i, block in enumerate(blocks) if i % 64]
    for block in freed:
        _LIBC.free(ctypes.c_void_p(block))
    before = _resident_bytes()

    heap.give_back()

    after = _resident_bytes()
    for block in kept:
        _LIBC.free(ctypes.c_void_p(block))
    assert before - after > 48 * MEBIBYTE
