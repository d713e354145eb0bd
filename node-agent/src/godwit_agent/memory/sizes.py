"""Sizes of open files in CRIU's ``files.img``, left out for files that others write, too.

images/fdinfo.proto, regfile.proto, v4.2. CRIU opens a file on the target only if it has the size
that it had at the dump (criu/files-reg.c, ``validate_file``; one that is opened for appending only
excepted). A file on a network volume may be written by pods of any node meanwhile, and a restore
that fails on the target for that fails on the source node, too.
"""

from __future__ import annotations

from collections.abc import Collection

from godwit_agent.memory import protobuf
from godwit_agent.memory.protobuf import ImageError

FILES = "files.img"
_MAGICS = (0x54564319, 0x56303138)  # IMG_COMMON_MAGIC, FILES_MAGIC
_REGULAR = b"\x08\x01"  # field 1, the kind of the file: REG
_ENTRY_FIELD, _MOUNT_FIELD, _SIZE_FIELD = 3, 7, 8


def leave_out(image: bytes, mounts: Collection[int]) -> bytes:
    """``files.img`` without the sizes of files that lie in ``mounts`` (mount ids, as in
    proc_pid_fdinfo(5)); unchanged (the same object) when there is none."""
    if not mounts:
        return image
    entries = list(protobuf.entries(image, _MAGICS))
    mended = [_entry(bytes(e), mounts) if e[:2] == _REGULAR else e for e in entries]
    if mended == entries:
        return image
    return protobuf.image(_MAGICS, [bytes(entry) for entry in mended])


def _entry(data: bytes, mounts: Collection[int]) -> bytes:
    parts = []
    for number, part, body in _split(data):
        if number == _ENTRY_FIELD:
            mended = _file(body, mounts)
            part = protobuf.varint(number << 3 | 2) + protobuf.varint(len(mended)) + mended
        parts.append(part)
    return b"".join(parts)


def _file(data: bytes, mounts: Collection[int]) -> bytes:
    """sint32: the sign is the lowest bit."""
    values = dict(protobuf.fields(memoryview(data)))
    number = values.get(_MOUNT_FIELD, 1)
    if (number >> 1) ^ -(number & 1) not in mounts:
        return data
    return b"".join(part for number, part, _ in _split(data) if number != _SIZE_FIELD)


def _split(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """(number, all of it, content) of each field. ``ImageError``."""
    found, at = [], 0
    while at < len(data):
        start = at
        key, at = protobuf.read_varint(data, at)
        value, end = protobuf.read_varint(data, at)
        body = b""
        match key & 7:
            case 0:
                at = end
            case 2:
                at, body = end + value, data[end : end + value]
            case kind:
                raise ImageError(f"field of kind {kind}")
        if at > len(data):
            raise ImageError("truncated field")
        found.append((key >> 3, data[start:at], body))
    return found
