"""Sizes of open files in CRIU's ``files.img``, left out for files that others write, too.

images/fdinfo.proto, regfile.proto, v4.2. CRIU opens a file on the target only if it has the size
that it had at the dump (criu/files-reg.c, ``validate_file``; one that is opened for appending only
excepted). A file on a network volume may be written by pods of any node meanwhile, and a restore
that fails on the target for that fails on the source node, too.
"""

from __future__ import annotations

from collections.abc import Collection

from godwit_agent.memory import openfiles, protobuf

_REGULAR, _ENTRY_FIELD = 1, 3  # REG
_MOUNT_FIELD, _SIZE_FIELD = 7, 8


def leave_out(image: bytes, mounts: Collection[int]) -> bytes:
    """``files.img`` without the sizes of files that lie in ``mounts`` (mount ids, as in
    proc_pid_fdinfo(5)); unchanged (the same object) when there is none."""
    if not mounts:
        return image
    return openfiles.changed(image, _REGULAR, _ENTRY_FIELD, lambda data: _file(data, mounts))


def _file(data: bytes, mounts: Collection[int]) -> bytes:
    """sint32: the sign is the lowest bit."""
    values = dict(protobuf.fields(memoryview(data)))
    number = values.get(_MOUNT_FIELD, 1)
    if (number >> 1) ^ -(number & 1) not in mounts:
        return data
    return b"".join(part for number, part, _ in protobuf.split(data) if number != _SIZE_FIELD)
