"""The little of the protobuf wire format that CRIU's images need: varint fields.

CRIU image file (criu/include/magic.h, criu/image.c, v4.2): one or two 32-bit
magics, then entries, each a 32-bit little-endian size and a protobuf message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

_SIZE = struct.Struct("<I")
_MAX_ENTRY = 1 << 20


class ImageError(ValueError):
    """The bytes are not a complete CRIU image of the expected kind."""


def varint(value: int) -> bytes:
    if value < 0:
        raise ValueError("negative")
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def message(fields: Iterable[tuple[int, int]]) -> bytes:
    """A message of varint fields, in the given order; repeated numbers are repeated fields."""
    return b"".join(varint(number << 3) + varint(value) for number, value in fields)


def fields(data: memoryview) -> Iterator[tuple[int, int]]:
    """(number, value) of all varint fields; others are skipped. Raises ``ImageError``."""
    at, end = 0, len(data)
    while at < end:
        key, at = read_varint(data, at)
        match key & 7:
            case 0:
                value, at = read_varint(data, at)
                yield key >> 3, value
            case 1:
                at += 8
            case 2:
                length, at = read_varint(data, at)
                at += length
            case 5:
                at += 4
            case kind:
                raise ImageError(f"field of kind {kind}")
        if at > end:
            raise ImageError("truncated field")


def split(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """(number, all of it, content) of each field. ``ImageError``."""
    found, at = [], 0
    while at < len(data):
        start = at
        key, at = read_varint(data, at)
        value, end = read_varint(data, at)
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


def image(magics: Iterable[int], entries: Iterable[bytes]) -> bytes:
    parts = [_SIZE.pack(magic) for magic in magics]
    for entry in entries:
        parts += (_SIZE.pack(len(entry)), entry)
    return b"".join(parts)


def entries(data: bytes, magics: tuple[int, ...]) -> Iterator[memoryview]:
    """The messages of an image; raises ``ImageError`` when it is another image or cut off."""
    view, at = memoryview(data), len(magics) * _SIZE.size
    if len(view) < at or view[:at] != image(magics, ()):
        raise ImageError("wrong magic")
    while at < len(view):
        if at + _SIZE.size > len(view):
            raise ImageError("truncated size")
        (length,) = _SIZE.unpack_from(view, at)
        at += _SIZE.size
        if length > _MAX_ENTRY or at + length > len(view):
            raise ImageError("truncated entry")
        yield view[at : at + length]
        at += length


def read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """(value, position after it). Raises ``ImageError``."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ImageError("truncated number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
