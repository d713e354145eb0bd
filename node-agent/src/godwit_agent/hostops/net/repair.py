"""TCP sockets out of repair mode, from outside the process that has them.

CRIU leaves them in it when a lazy dump fails after it had been written; a
thaw would then reset the connections. See tcp_repair in linux/tcp.h.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable

from godwit_agent.hostops import descriptors

_TCP_REPAIR = 19
_OFF_WITHOUT_PROBE = -1  # TCP_REPAIR_OFF_NO_WP


def end(pids: Iterable[int]) -> int:
    """How many sockets were in repair mode; none is afterwards."""
    found, seen = 0, set[int]()
    for pid in pids:
        for number, inode in descriptors.sockets(pid):
            if inode not in seen:
                seen.add(inode)
                with contextlib.suppress(OSError):
                    found += _end_one(pid, number)
    return found


def _end_one(pid: int, number: int) -> int:
    with socket.socket(fileno=descriptors.of_process(pid, number)) as sock:
        inet = sock.family in (socket.AF_INET, socket.AF_INET6)
        if not inet or sock.type != socket.SOCK_STREAM or sock.proto != socket.IPPROTO_TCP:
            return 0
        if sock.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR) == 0:
            return 0
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _OFF_WITHOUT_PROBE)
        return 1
