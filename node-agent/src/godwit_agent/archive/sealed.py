"""A stream of bytes, encrypted so that any change, cut or mixture of it is noticed.

    magic | length of the header u32 | header (JSON) | chunk | chunk | ... | last chunk

Each chunk is AES-256-GCM over at most ``CHUNK`` bytes. Its nonce is its number
and whether it is the last one, its associated data the hash of everything
before the first chunk: no chunk can be changed, left out, moved or taken from
another archive, and an archive that was cut has no last chunk. The file's own
key comes from the given one and a random salt (HKDF-SHA256), so nonces never
meet under one key. Nothing is released before it has been verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

MAGIC = b"GODWIT CHECKPOINT\n"
KEY_BYTES = 32
CHUNK = 1 << 20
FORMAT = 2
_READABLE = (1, 2)  # 1: an archive of one container, see ``contents``
_CIPHER = "AES-256-GCM"
_TAG = 16
_MAX_HEADER = 4096
_LENGTH = struct.Struct(">I")
_NONCE = struct.Struct(">QxxxB")


class Output(Protocol):
    """Where an archive is written to."""

    def write(self, data: bytes, /) -> object: ...


class Input(Protocol):
    """Where an archive is read from: fewer bytes than asked for only at its end."""

    def read(self, size: int, /) -> bytes: ...


def _derive(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, b"godwit checkpoint " + purpose).derive(key)


def _damaged(what: str) -> Rejected:
    return Rejected(Reason.ARCHIVE_DAMAGED, f"the archive is damaged: {what}")


class SealedWriter:
    """Writes one archive; without ``finish`` it is not complete, and readers notice."""

    def __init__(self, file: Output, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise Rejected(Reason.ARCHIVE_KEY, f"a key has {KEY_BYTES} bytes, not {len(key)}")
        salt = os.urandom(16)
        header = {
            "format": FORMAT,
            "cipher": _CIPHER,
            "salt": salt.hex(),
            "key": _derive(key, salt, b"name")[:8].hex(),
        }
        text = json.dumps(header, sort_keys=True).encode()
        begin = MAGIC + _LENGTH.pack(len(text)) + text
        file.write(begin)
        self._file = file
        self._bound = hashlib.sha256(begin).digest()
        self._cipher = AESGCM(_derive(key, salt, b"content"))
        self._buffer = bytearray()
        self._number = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self._buffer += data
        while len(self._buffer) > CHUNK:  # the last chunk is never empty-handed
            self._seal(CHUNK, last=False)
        return len(data)

    def finish(self) -> None:
        """The end of the archive; ``file`` stays open."""
        self._seal(len(self._buffer), last=True)

    def _seal(self, size: int, *, last: bool) -> None:
        nonce = _NONCE.pack(self._number, last)
        self._file.write(self._cipher.encrypt(nonce, bytes(self._buffer[:size]), self._bound))
        del self._buffer[:size]
        self._number += 1


class SealedReader:
    """Reads one archive. ``Rejected``: ArchiveForeign, ArchiveKey, ArchiveDamaged."""

    def __init__(self, file: Input, key: bytes) -> None:
        begin = file.read(len(MAGIC) + _LENGTH.size)
        if begin[: len(MAGIC)] != MAGIC:
            raise Rejected(Reason.ARCHIVE_FOREIGN, "this file is no archive of a checkpoint")
        if len(begin) < len(MAGIC) + _LENGTH.size:
            raise _damaged("it ends in its header")
        (length,) = _LENGTH.unpack(begin[len(MAGIC) :])
        if length > _MAX_HEADER:
            raise _damaged("its header is too long")
        text = file.read(length)
        salt = self._check(text, length, key)
        self._file = file
        self._bound = hashlib.sha256(begin + text).digest()
        self._cipher = AESGCM(_derive(key, salt, b"content"))
        self._chunks = self._open()
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        """As a file: fewer bytes only at the verified end."""
        parts, missing = [], size
        while missing:
            if not self._rest:
                self._rest = next(self._chunks, b"")
                if not self._rest:
                    break
            part = self._rest if missing < 0 else self._rest[:missing]
            self._rest = self._rest[len(part) :]
            parts.append(part)
            missing = missing if missing < 0 else missing - len(part)
        return b"".join(parts)

    def _open(self) -> Iterator[bytes]:
        number = 0
        sealed = self._file.read(CHUNK + _TAG)
        while True:
            following = self._file.read(CHUNK + _TAG)
            last = not following
            try:
                plain = self._cipher.decrypt(_NONCE.pack(number, last), sealed, self._bound)
            except (InvalidTag, ValueError):
                raise _damaged(
                    f"part {number} is not what was written, or its end is missing"
                ) from None
            yield plain
            if last:
                return
            number, sealed = number + 1, following

    @staticmethod
    def _check(text: bytes, length: int, key: bytes) -> bytes:
        if len(text) < length:
            raise _damaged("it ends in its header")
        try:
            header = json.loads(text)
            number, cipher = header["format"], header["cipher"]
            salt, name = bytes.fromhex(header["salt"]), bytes.fromhex(header["key"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged("its header cannot be read") from error
        if number not in _READABLE or cipher != _CIPHER:
            message = f"the archive has format {number} ({cipher}), this agent reads up to {FORMAT}"
            raise Rejected(Reason.ARCHIVE_FOREIGN, message)
        if len(key) != KEY_BYTES or _derive(key, salt, b"name")[:8] != name:
            raise Rejected(Reason.ARCHIVE_KEY, "the archive was not encrypted with this key")
        return salt
