"""Records of the file copy: what a header says, and how a path is opened safely.

One record is a header (a msgpack array) and a body. A pass over a tree gives
directories before what is in them, and the times of directories last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from enum import StrEnum

import msgspec

from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

UPPER = "upper"  # name of the tree that is the container's writable layer
LOG = "log"  # name of the tree that has the container's log, `0.log`
CHUNK = 256 * 1024
OPAQUE = "trusted.overlay.opaque"  # kernel Documentation/filesystems/overlayfs.rst
_MAX_PATH = 4096
_MAX_NUMBER = (1 << 63) - 1  # off_t, and a time in ns
_MAX_OWNER = (1 << 32) - 2  # the last one means "leave it"


class Kind(StrEnum):
    """What a record does at its path."""

    DIRECTORY = "d"
    OPAQUE_DIRECTORY = "o"  # a directory that hides all that the image has there
    FILE = "f"  # body: extended attributes; content follows
    CONTENT = "c"  # body: bytes at ``number``
    HOLE = "z"  # ``number`` + ``size``: zeros
    SYMLINK = "l"  # body: target
    HARDLINK = "h"  # body: path of the other name, relative to the tree
    NODE = "n"  # fifo or device ``number``
    TIMES = "t"  # modification time, after the content
    REMOVED = "r"
    POPULATED = "m"  # not of files: body, all memory ranges of process ``number`` (``memory``)
    SHARED = "s"  # not of files: shared memory ``number`` of ``size`` bytes (``sharedmemory``)
    WITHHELD = "w"  # in the same form: ranges whose last content stays on the source for now


class Record(msgspec.Struct, frozen=True, array_like=True):
    """``number`` is an offset, a device number, or 1 for a file that starts empty."""

    kind: Kind
    tree: str
    path: bytes
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    number: int = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)
_attributes = msgspec.msgpack.Decoder(dict[str, bytes])


def encode(record: Record) -> bytes:
    return _encoder.encode(record)


def decode(header: bytes) -> Record:
    """``Rejected(Malformed)``, also for a path that could lead out of its tree."""
    try:
        record = _decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Rejected(Reason.MALFORMED, f"file record: {error}") from error
    check_path(record.path)
    numbers = (record.size, record.number, abs(record.mtime_ns), record.size + record.number)
    owners = (record.uid, record.gid)
    if (
        min(record.size, record.number, *owners) < 0
        or max(numbers) > _MAX_NUMBER
        or max(owners) > _MAX_OWNER
        or not 0 <= record.mode < 0o200000
    ):
        raise Rejected(Reason.MALFORMED, "file record: numbers out of range")
    return record


def check_path(path: bytes) -> None:
    """Relative, no dots, nothing empty; "." alone is the tree itself."""
    if path == b".":
        return
    parts = path.split(b"/")
    if len(path) > _MAX_PATH or b"\0" in path or any(part in (b"", b".", b"..") for part in parts):
        raise Rejected(Reason.MALFORMED, f"path {path!r} in a file record")


def pack_attributes(values: dict[str, bytes]) -> bytes:
    return _encoder.encode(values)


def unpack_attributes(body: bytes) -> dict[str, bytes]:
    try:
        found = _attributes.decode(body) if body else {}
        if any(not name or "\0" in name for name in found):
            raise ValueError("a name that is none")
        return found
    except (msgspec.MsgspecError, ValueError) as error:
        raise Rejected(Reason.MALFORMED, f"extended attributes: {error}") from error


@contextlib.contextmanager
def parent(root: int, path: bytes) -> Iterator[tuple[int, bytes]]:
    """Directory that holds ``path`` below ``root``, and the last name; follows no link."""
    *directories, name = path.split(b"/")
    fd = os.dup(root)
    try:
        for part in directories:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd, name
    finally:
        os.close(fd)
