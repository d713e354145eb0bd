"""Write tracking by userfaultfd in its asynchronous write-protect mode (Linux 6.7).

The kernel notes writes by itself, nobody has to answer faults; PAGEMAP_SCAN
reports and re-arms in one step. See admin-guide/mm/userfaultfd.rst and
admin-guide/mm/pagemap.rst of the kernel's documentation.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

from godwit_agent.hostops import descriptors
from godwit_agent.hostops.pages.ptrace import InjectionError, Tracee

_SYS_CLOSE, _SYS_USERFAULTFD = 3, 323  # x86_64, asm/unistd_64.h
_USER_MODE_ONLY = 1
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY
_API_VERSION = 0xAA
_FEATURE_WP_UNPOPULATED, _FEATURE_WP_ASYNC = 1 << 13, 1 << 15
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_UFFDIO_UNREGISTER, _UFFDIO_WRITEPROTECT = 0x8010AA01, 0xC018AA06
_MODE_WP = 2
_API = struct.Struct("<QQQ")
_REGISTER = struct.Struct("<QQQQ")

_libc = ctypes.CDLL(None, use_errno=True)


def probe() -> None:
    """``OSError`` when this kernel cannot do it."""
    fd = _libc.syscall(_SYS_USERFAULTFD, _FLAGS)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        _handshake(fd)
    finally:
        os.close(fd)


def take(pid: int) -> int:
    """A userfaultfd of that process, in our hands only. ``InjectionError``. In the injector's
    process: whoever calls this must not be killed meanwhile."""
    try:
        return _take(pid)
    except OSError as error:
        raise InjectionError(f"userfaultfd of process {pid}: {error}") from error


def register(fd: int, start: int, end: int) -> bool:
    """Whether writes to the range are tracked from now on; also true when they were already."""
    request = bytearray(_REGISTER.pack(start, end - start, _MODE_WP, 0))
    try:
        fcntl.ioctl(fd, _UFFDIO_REGISTER, request)
    except OSError:
        return False
    return True


def register_anew(fd: int, start: int, end: int) -> bool:
    """As ``register``, and every page there counts as written. ``OSError``: it may be that a part
    of the range is tracked with marks from before.

    A mapping that mremap(2) has moved, and one that the moved one was merged with, is no longer
    registered (mm/userfaultfd.c, mremap_userfaultfd_prep), but its pages may keep their marks.
    """
    if not register(fd, start, end):
        return False
    try:
        fcntl.ioctl(fd, _UFFDIO_WRITEPROTECT, bytearray(struct.pack("<QQQ", start, end - start, 0)))
    except OSError:
        fcntl.ioctl(fd, _UFFDIO_UNREGISTER, bytearray(struct.pack("<QQ", start, end - start)))
        return False
    return True


def _take(pid: int) -> int:
    handle = os.pidfd_open(pid)
    try:
        with Tracee(pid) as tracee:
            inner = tracee.syscall(_SYS_USERFAULTFD, _FLAGS)
            try:
                fd = descriptors.duplicate(handle, inner)
            finally:
                tracee.syscall(_SYS_CLOSE, inner)
    finally:
        os.close(handle)
    try:
        _handshake(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _handshake(fd: int) -> None:
    features = _FEATURE_WP_ASYNC | _FEATURE_WP_UNPOPULATED
    fcntl.ioctl(fd, _UFFDIO_API, bytearray(_API.pack(_API_VERSION, features, 0)))
