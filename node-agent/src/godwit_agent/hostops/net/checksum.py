"""The Internet checksum (RFC 1071). Pure."""

from __future__ import annotations

import struct


def internet(data: bytes) -> int:
    """Of the data, padded to whole words."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total >> 16) + (total & 0xFFFF)
    return 0xFFFF - total
