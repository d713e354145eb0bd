"""What of the host others have named: opened beneath its root; directories are emptied following no
link (openat2(2), linux/openat2.h)."""

from __future__ import annotations

import ctypes
import os

from godwit_agent.hostops.layout import Layout

_OPENAT2 = 437  # asm-generic/unistd.h, the same number on every architecture
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH, _IN_ROOT = 0x02, 0x04, 0x08, 0x10
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
    return _open(layout, path, _DIRECTORY, _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS)


def exists(layout: Layout, path: str) -> bool:
    """Whether the host finds something there; links lead where they lead on the host."""
    try:
        os.close(_open(layout, path, os.O_PATH | os.O_CLOEXEC, _IN_ROOT | _NO_MAGICLINKS))
    except OSError:
        return False
    return True


def _open(layout: Layout, path: str, flags: int, resolve: int) -> int:
    how = _OpenHow(flags, 0, resolve)
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
