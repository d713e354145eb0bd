"""nftables through libnftables, synchronous and without a process.

A context belongs to the thread (and so to the network namespace) it was made
in: its netlink socket is opened there. Warm, one command takes about 1 ms.
The tables below exist in a pod's network namespace only.
"""

from __future__ import annotations

import ctypes
import functools

from godwit_api.errors import Retryable
from godwit_api.reasons import Reason

CRIU_MARK = 0xC114  # SOCCR_MARK, criu/include/net.h: packets by which CRIU rebuilds sockets

HANDSHAKE_TABLE = "godwit_handshake"
FREEZE_TABLE = "godwit_freeze"
DOOR_TABLE = "godwit_door"

# CRIU refuses connections that are not accepted yet, so new ones wait before the freeze.
HOLD_HANDSHAKES = f"""
table inet {HANDSHAKE_TABLE} {{
  chain input {{
    type filter hook input priority -310; policy accept;
    tcp flags & (syn | ack) == syn drop
  }}
}}
"""
DROP_ALL = f"""
table inet {FREEZE_TABLE} {{
  chain input {{
    type filter hook input priority -300; policy drop;
    meta mark {CRIU_MARK:#x} accept
  }}
  chain output {{
    type filter hook output priority -300; policy drop;
    meta mark {CRIU_MARK:#x} accept
  }}
}}
"""
# What the hook makes at CNI ADD; loopback passes, so that nothing local fails.
CLOSE_DOOR = f"""
table inet {DOOR_TABLE} {{
  chain input {{
    type filter hook input priority -300; policy drop;
    iifname "lo" accept
    meta mark {CRIU_MARK:#x} accept
  }}
  chain output {{
    type filter hook output priority -300; policy drop;
    oifname "lo" accept
    meta mark {CRIU_MARK:#x} accept
  }}
}}
"""


def remove(*tables: str) -> str:
    """Commands that remove ``tables`` whether they exist or not ("add" first makes that so)."""
    return "".join(f"add table inet {name}\ndelete table inet {name}\n" for name in tables)


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


class Nft:
    """Commands in the network namespace of the calling thread; one string is one transaction."""

    def __init__(self) -> None:
        library = _library()
        self._context: int | None = library.nft_ctx_new(0)
        if not self._context:
            raise Retryable(Reason.INTERNAL, "libnftables gives no context")
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)

    def run(self, commands: str) -> str:
        """Output; ``Retryable(Internal)`` with the library's words when it is refused."""
        library = _library()
        failed = library.nft_run_cmd_from_buffer(self._context, commands.encode())
        output = library.nft_ctx_get_output_buffer(self._context) or b""
        error = library.nft_ctx_get_error_buffer(self._context) or b""
        if failed:
            raise Retryable(Reason.INTERNAL, f"nft: {error.decode(errors='replace').strip()}")
        return bytes(output).decode(errors="replace")

    def close(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            _library().nft_ctx_free(context)
