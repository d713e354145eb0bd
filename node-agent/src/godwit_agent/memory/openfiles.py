"""CRIU's ``files.img``, which has an entry for each open file: changed between dump and restore.

images/fdinfo.proto, v4.2: the first field of an entry is the kind of the file, another one is the
message of that kind.
"""

from __future__ import annotations

from collections.abc import Callable

from godwit_agent.memory import protobuf

NAME = "files.img"
_MAGICS = (0x54564319, 0x56303138)  # IMG_COMMON_MAGIC, FILES_MAGIC
_KIND_FIELD = 1


def changed(image: bytes, kind: int, field: int, change: Callable[[bytes], bytes]) -> bytes:
    """``image`` with ``change`` made to the message ``field`` of each file of ``kind``; the same
    object when nothing is another than before. ``ImageError``."""
    begin = protobuf.message([(_KIND_FIELD, kind)])
    entries = list(protobuf.entries(image, _MAGICS))
    made = [_entry(bytes(e), field, change) if e[:2] == begin else e for e in entries]
    if made == entries:
        return image
    return protobuf.image(_MAGICS, [bytes(entry) for entry in made])


def _entry(data: bytes, field: int, change: Callable[[bytes], bytes]) -> bytes:
    parts = []
    for number, part, content in protobuf.split(data):
        if number == field:
            body = change(content)
            part = protobuf.varint(field << 3 | 2) + protobuf.varint(len(body)) + body
        parts.append(part)
    return b"".join(parts)
