"""Open files of other processes as our own. See pidfd_getfd(2)."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator

from godwit_agent.hostops import procs

_SYS_PIDFD_GETFD = 438  # the same on all architectures (asm-generic/unistd.h)
_SOCKET = re.compile(r"socket:\[(\d+)\]\Z")

_libc = ctypes.CDLL(None, use_errno=True)


def duplicate(handle: int, number: int) -> int:
    """Of ``number`` in the process of a pidfd. ``OSError``."""
    fd = int(_libc.syscall(_SYS_PIDFD_GETFD, handle, number, 0))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"pidfd_getfd: {os.strerror(code)}")
    return fd


def of_process(pid: int, number: int) -> int:
    """The same by the process's number. ``OSError``."""
    handle = os.pidfd_open(pid)
    try:
        return duplicate(handle, number)
    finally:
        os.close(handle)


def sockets(pid: int) -> Iterator[tuple[int, int]]:
    """(number, inode) of all sockets of a process; none of one that has gone."""
    for number, target in procs.descriptors(pid):
        if match := _SOCKET.match(target):
            yield number, int(match[1])
