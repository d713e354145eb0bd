"""TCP sockets out of repair mode, from outside the process that has them.

CRIU leaves them in it when a lazy dump fails after it had been written; a
thaw would then reset the connections. See tcp_repair in linux/tcp.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
from collections.abc import Iterable, Iterator

from godwit_agent.hostops import procs

_SYS_PIDFD_GETFD = 438  # the same on all architectures (asm-generic/unistd.h)
_TCP_REPAIR = 19
_OFF_WITHOUT_PROBE = -1  # TCP_REPAIR_OFF_NO_WP
_SOCKET = re.compile(r"socket:\[(\d+)\]\Z")

_libc = ctypes.CDLL(None, use_errno=True)


def end(pids: Iterable[int]) -> int:
    """How many sockets were in repair mode; none is afterwards."""
    found, seen = 0, set[str]()
    for pid in pids:
        for number, inode in _sockets(pid):
            if inode not in seen:
                seen.add(inode)
                with contextlib.suppress(OSError):
                    found += _end_one(pid, number)
    return found


def _sockets(pid: int) -> Iterator[tuple[int, str]]:
    for number, target in procs.descriptors(pid):
        if match := _SOCKET.match(target):
            yield number, match[1]


def descriptor(pid: int, number: int) -> int:
    """An open file of another process, as one of our own. ``OSError``."""
    handle = os.pidfd_open(pid)
    try:
        fd = int(_libc.syscall(_SYS_PIDFD_GETFD, handle, number, 0))
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return fd
    finally:
        os.close(handle)


def _end_one(pid: int, number: int) -> int:
    with socket.socket(fileno=descriptor(pid, number)) as sock:
        inet = sock.family in (socket.AF_INET, socket.AF_INET6)
        if not inet or sock.type != socket.SOCK_STREAM or sock.proto != socket.IPPROTO_TCP:
            return 0
        if sock.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR) == 0:
            return 0
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _OFF_WITHOUT_PROBE)
        return 1
