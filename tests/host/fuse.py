"""A file system over FUSE with one file, for tests: its daemon keeps what is written to itself
until it is told to sync, and it keeps locks. linux/fuse.h, protocol 7.31."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_LOCK = struct.Struct("<QQII")
_ROOT, _FILE = 1, 2
_POSIX_LOCKS = 1 << 1
_SIZE_OF_SETATTR = 1 << 3

_libc = ctypes.CDLL(None, use_errno=True)


class Daemon(threading.Thread):
    """Serves one mount until it is unmounted."""

    def __init__(self, fd: int) -> None:
        super().__init__(daemon=True)
        self._fd = fd
        self._here = bytearray()
        self.server = b""
        self.named: int | None = _FILE  # number of the file that has the name
        self.locks: dict[int, tuple[int, int, int, int]] = {}  # owner to struct fuse_file_lock
        self._operations = {
            1: self._lookup, 3: self._getattr, 4: self._setattr, 14: self._open, 15: self._read,
            16: self._write, 18: self._sync, 20: self._sync, 25: self._flush, 26: self._init,
            27: self._open, 28: lambda *_: b"", 29: lambda *_: b"", 31: self._getlk,
            32: self._setlk, 33: self._setlk,
        }  # fmt: skip

    def run(self) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 18)
            except OSError:
                return  # ENODEV: unmounted
            _, kind, unique, node, *_ = _IN.unpack_from(request)
            if kind in (2, 36, 42):  # FORGET, INTERRUPT, BATCH_FORGET are not answered
                continue
            try:
                operation = self._operations.get(kind)
                if operation is None:
                    raise OSError(errno.ENOSYS, "")
                body, error = operation(node, request[_IN.size :]), 0
            except OSError as failure:
                body, error = b"", -(failure.errno or errno.EIO)
            os.write(self._fd, _OUT.pack(_OUT.size + len(body), error, unique) + body)

    def _init(self, _: int, body: bytes) -> bytes:
        flags = _POSIX_LOCKS & struct.unpack_from("<IIII", body)[3]
        return struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, flags, 12, 9, 65536, 1, 0, 0, 0)

    def _attributes(self, node: int) -> bytes:
        size, mode = (0, 0o40755) if node == _ROOT else (len(self._here), 0o100644)
        return _ATTR.pack(node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _lookup(self, _: int, body: bytes) -> bytes:
        if body != b"file\0" or self.named is None:
            raise OSError(errno.ENOENT, "")
        return struct.pack("<QQQQII", self.named, 0, 0, 0, 0, 0) + self._attributes(self.named)

    def _getattr(self, node: int, _: bytes) -> bytes:
        return bytes(16) + self._attributes(node)

    def _setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", body)
        if valid & _SIZE_OF_SETATTR:
            del self._here[size:]
            self._here.extend(bytes(size - len(self._here)))
        return self._getattr(node, body)

    def _open(self, node: int, _: bytes) -> bytes:
        return struct.pack("<QII", node, 0, 0)

    def _read(self, _: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        return bytes(self._here[offset : offset + size])

    def _write(self, _: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        self._here.extend(bytes(max(0, offset + size - len(self._here))))
        self._here[offset : offset + size] = body[40:]
        return struct.pack("<II", size, 0)

    def _sync(self, *_: object) -> bytes:
        self.server = bytes(self._here)
        return b""

    def _flush(self, node: int, body: bytes) -> bytes:
        self.locks.pop(struct.unpack_from("<QIIQ", body)[3], None)
        return self._sync()

    def _getlk(self, _: int, body: bytes) -> bytes:
        owner = struct.unpack_from("<QQ", body)[1]
        others = [lock for other, lock in self.locks.items() if other != owner]
        return _LOCK.pack(*(others[0] if others else (0, 0, fcntl.F_UNLCK, 0)))

    def _setlk(self, _: int, body: bytes) -> bytes:
        owner, lock = struct.unpack_from("<QQ", body)[1], _LOCK.unpack_from(body, 16)
        self.locks.pop(owner, None)
        if lock[2] != fcntl.F_UNLCK:
            self.locks[owner] = (lock[0], lock[1], lock[2], 0)
        return b""


@contextlib.contextmanager
def mounted(point: Path) -> Iterator[Daemon]:
    """With one file, ``file``."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
    if _libc.mount(b"test", os.fsencode(point), b"fuse.test", 0, options.encode()):
        number = ctypes.get_errno()
        os.close(fd)
        raise OSError(number, f"mount of FUSE: {os.strerror(number)}")
    daemon = Daemon(fd)
    daemon.start()
    try:
        yield daemon
    finally:
        subprocess.run(("umount", "--lazy", str(point)), check=True)
        os.close(fd)
        daemon.join(10)
