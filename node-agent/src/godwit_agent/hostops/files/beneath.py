"""Directories of the host that others have named: opened beneath its root, emptied, following no
link (openat2(2), linux/openat2.h)."""

from __future__ import annotations

import ctypes
import os

from godwit_agent.hostops.layout import Layout

_OPENAT2 = 437  # asm-generic/unistd.h, the same number on every architecture
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x02, 0x04, 0x08
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def open_directory(layout: Layout, path: str) -> int:
    """The directory ``path`` of the host. ``OSError``: ELOOP for a link, ENOENT, ENOTDIR."""
    how = _OpenHow(_DIRECTORY, 0, _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS)
    root = os.open(layout.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        relative = os.fsencode(path.strip("/") or ".")
        fd = _libc.syscall(
            ctypes.c_long(_OPENAT2), root, relative, ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )  # fmt: skip
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        return int(fd)
    finally:
        os.close(root)


def remove(directory: int, name: bytes) -> None:
    """Whatever is there, with all below it; nothing that is mounted there."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
        try:
            for inner in os.listdir(fd):
                remove(fd, os.fsencode(inner))
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=directory)
