"""nftables through libnftables, synchronous and without a process.

A context belongs to the thread (and so to the network namespace) it was made
in: its netlink socket is opened there. Warm, one command takes about 1 ms.
"""

from __future__ import annotations

import ctypes
import functools

from godwit_agent.hostops.net.netns import NetnsThread
from godwit_api.errors import Retryable
from godwit_api.reasons import Reason

CRIU_MARK = 0xC114  # SOCCR_MARK, criu/include/net.h: packets by which CRIU rebuilds sockets


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libnftables.so.1")
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_free.argtypes = [ctypes.c_void_p]
    library.nft_ctx_free.restype = None
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_char_p
    return library


def removal(*tables: str) -> str:
    """Removes tables of the family inet, whether they are there or not."""
    return "".join(f"add table inet {table}\ndelete table inet {table}\n" for table in tables)


class Nft:
    """Commands in the namespace of ``thread``. A command string is one transaction."""

    def __init__(self, thread: NetnsThread) -> None:
        self._thread = thread
        self._context: int | None = thread.call(self._make)

    def run(self, commands: str) -> str:
        """Output; ``Retryable(Internal)`` with the library's words when it is refused."""
        return self._thread.call(lambda: self._run(commands))

    def close(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            self._thread.call(lambda: _library().nft_ctx_free(context))

    def _make(self) -> int:
        library = _library()
        context = library.nft_ctx_new(0)
        if not context:
            raise Retryable(Reason.INTERNAL, "libnftables gives no context")
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        return int(context)

    def _run(self, commands: str) -> str:
        library = _library()
        failed = library.nft_run_cmd_from_buffer(self._context, commands.encode())
        output = library.nft_ctx_get_output_buffer(self._context) or b""
        error = library.nft_ctx_get_error_buffer(self._context) or b""
        if failed:
            raise Retryable(Reason.INTERNAL, f"nft: {error.decode(errors='replace').strip()}")
        return bytes(output).decode(errors="replace")
