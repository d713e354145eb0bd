"""Codec of the transfer stream: pure, strict, no I/O.

A frame is a fixed prefix, a head whose form depends on the kind, and a body::

    prefix  kind u8 | 0 u8 | head length u16 | body length u32 | sequence u64
    head    see the dataclasses below
    body    bytes of pages, of a file, of an image, of a packet

Everything is big-endian. The sequence of a direction starts at 1 and grows by
one, so a repeated, lost or reordered frame is an error. Sizes are bounded
before anything is read, so that a peer cannot make us allocate.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import IntEnum

from godwit_api.errors import Rejected
from godwit_api.reasons import Reason

VERSION = 2
PAGE = 4096
MAX_HEAD = 8 * 1024
MAX_BODY = 4 * 1024 * 1024
MAX_PACKET = 128 * 1024
MAX_IMAGE = 1 << 40
MAX_TEXT = 2048
MAX_CONTAINERS = 64
MAX_STREAMS = 16
_ADDRESS_SPACE = 1 << 57

PREFIX = struct.Struct(">BBHIQ")
_HELLO = struct.Struct(">H36sQBB")
_PAGES = struct.Struct(">HIQ")
_RANGE = struct.Struct(">HIQQ")
_IMAGE = struct.Struct(">HQQ")
_FILE = struct.Struct(">H")
_PACKET = struct.Struct(">Q")
_ROUND = struct.Struct(">I")
_ACK = struct.Struct(">Q")

_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
# CRIU's files (core-1.img, tmpfs-dev-63.tar.gz.img, stats-dump), runc's descriptors.json
_IMAGE_NAME = re.compile(r"(?!.*\.\.)[a-z0-9][A-Za-z0-9_.-]{0,95}\Z")


class Kind(IntEnum):
    """First byte of a frame."""

    HELLO = 1
    PAGES = 2
    ZERO = 3
    IMAGE = 4
    FILE = 5
    PACKET = 6
    ROUND_END = 7
    ACK = 8
    ERROR = 9
    PACKED = 10


class FrameError(Rejected):
    """The bytes are no frame of ours; the connection is of no more use."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.MALFORMED, f"transfer stream: {message}")


@dataclass(frozen=True, slots=True)
class Prefix:
    """First bytes of a frame: how much follows, and of what."""

    kind: Kind
    head_length: int
    body_length: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of a connection. Body: container names, newline-separated."""

    uid: str
    epoch: int
    stream: int
    streams: int
    containers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pages:
    """Body: whole pages from ``vaddr`` of the process ``vpid`` (its number in its namespace)."""

    container: int
    vpid: int
    vaddr: int


@dataclass(frozen=True, slots=True)
class Zero:
    """``length`` bytes from ``vaddr`` are zero; no body."""

    container: int
    vpid: int
    vaddr: int
    length: int


@dataclass(frozen=True, slots=True)
class Packed:
    """As ``Pages``, ``length`` bytes of them; body: one zstd frame that says its length."""

    container: int
    vpid: int
    vaddr: int
    length: int


@dataclass(frozen=True, slots=True)
class Image:
    """Body: bytes of the image file ``name`` from ``offset``; the file has ``total`` bytes."""

    container: int
    offset: int
    total: int
    name: str


@dataclass(frozen=True, slots=True)
class File:
    """One record of the file copy, its header and body opaque to the stream."""

    container: int
    header: bytes


@dataclass(frozen=True, slots=True)
class Packet:
    """Body: one captured frame with its virtio header; ``at_ns`` is the kernel's CLOCK_REALTIME."""

    at_ns: int


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """Asks for an ACK of everything up to and including this frame."""

    number: int


@dataclass(frozen=True, slots=True)
class Ack:
    """Receiver: all bytes of the frames up to ``sequence`` are in the store."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Receiver: why it stops. Body: text."""

    reason: Reason


Head = Hello | Pages | Packed | Zero | Image | File | Packet | RoundEnd | Ack | Failure

_MAX_BODY_OF = {
    Kind.HELLO: MAX_CONTAINERS * 64,
    Kind.PAGES: MAX_BODY,
    Kind.PACKED: MAX_BODY,
    Kind.IMAGE: MAX_BODY,
    Kind.FILE: MAX_BODY,
    Kind.PACKET: MAX_PACKET,
    Kind.ERROR: MAX_TEXT,
}


def encode(head: Head, sequence: int, body_length: int = 0) -> bytes:
    """Prefix and head of a frame; the caller sends ``body_length`` bytes after it."""
    kind, packed = _encode_head(head)
    if len(packed) > MAX_HEAD or body_length > _MAX_BODY_OF.get(kind, 0):
        raise FrameError(f"{kind.name} of {len(packed)} + {body_length} bytes is too large")
    return PREFIX.pack(kind, 0, len(packed), body_length, sequence) + packed


def hello_body(containers: tuple[str, ...]) -> bytes:
    """Body of a ``Hello``."""
    return "\n".join(containers).encode()


def decode_prefix(data: bytes | memoryview, expected_sequence: int) -> Prefix:
    """Checks the first bytes of a frame before anything more is read."""
    if len(data) != PREFIX.size:
        raise FrameError("truncated prefix")
    number, zero, head_length, body_length, sequence = PREFIX.unpack(data)
    try:
        kind = Kind(number)
    except ValueError:
        raise FrameError(f"unknown kind {number}") from None
    if zero:
        raise FrameError("reserved byte is not zero")
    if head_length > MAX_HEAD:
        raise FrameError(f"{kind.name} head of {head_length} bytes is too large")
    if body_length > _MAX_BODY_OF.get(kind, 0):
        raise FrameError(f"{kind.name} body of {body_length} bytes is too large")
    if sequence != expected_sequence:
        raise FrameError(f"sequence {sequence} where {expected_sequence} was due")
    return Prefix(kind, head_length, body_length, sequence)


def decode_head(prefix: Prefix, data: bytes | memoryview) -> Head:
    """The head behind ``prefix``. A ``Hello`` has its names after ``decode_hello_body``."""
    raw = bytes(data)
    if len(raw) != prefix.head_length:
        raise FrameError(f"truncated {prefix.kind.name} head")
    try:
        return _decode_head(prefix, raw)
    except (struct.error, UnicodeDecodeError) as error:
        raise FrameError(f"{prefix.kind.name} head: {error}") from None


def decode_hello_body(hello: Hello, body: bytes) -> Hello:
    """``hello`` with the container names of its body."""
    try:
        names = tuple(body.decode("ascii").split("\n"))
    except UnicodeDecodeError:
        raise FrameError("container names are not ASCII") from None
    if len(names) > MAX_CONTAINERS or len(set(names)) != len(names):
        raise FrameError("container names repeat or are too many")
    if not all(_NAME.match(name) for name in names):
        raise FrameError("container name has a wrong form")
    return Hello(hello.uid, hello.epoch, hello.stream, hello.streams, names)


def is_image_name(name: str) -> bool:
    """Whether ``name`` may become a file of an image directory."""
    return _IMAGE_NAME.match(name) is not None


def _encode_head(head: Head) -> tuple[Kind, bytes]:
    match head:
        case Hello():
            uid = head.uid.encode("ascii")
            return Kind.HELLO, _HELLO.pack(VERSION, uid, head.epoch, head.stream, head.streams)
        case Pages():
            return Kind.PAGES, _PAGES.pack(head.container, head.vpid, head.vaddr)
        case Zero():
            return Kind.ZERO, _RANGE.pack(head.container, head.vpid, head.vaddr, head.length)
        case Packed():
            return Kind.PACKED, _RANGE.pack(head.container, head.vpid, head.vaddr, head.length)
        case Image():
            packed = _IMAGE.pack(head.container, head.offset, head.total)
            return Kind.IMAGE, packed + head.name.encode("ascii")
        case File():
            return Kind.FILE, _FILE.pack(head.container) + head.header
        case Packet():
            return Kind.PACKET, _PACKET.pack(head.at_ns)
        case RoundEnd():
            return Kind.ROUND_END, _ROUND.pack(head.number)
        case Ack():
            return Kind.ACK, _ACK.pack(head.sequence)
        case Failure():
            return Kind.ERROR, head.reason.value.encode("ascii")


def _decode_head(prefix: Prefix, raw: bytes) -> Head:
    match prefix.kind:
        case Kind.HELLO:
            return _decode_hello(raw)
        case Kind.PAGES:
            container, vpid, vaddr = _PAGES.unpack(raw)
            _check_range(container, vpid, vaddr, prefix.body_length)
            return Pages(container, vpid, vaddr)
        case Kind.ZERO | Kind.PACKED:
            container, vpid, vaddr, length = _RANGE.unpack(raw)
            _check_range(container, vpid, vaddr, length)
            if prefix.kind is Kind.ZERO:
                return Zero(container, vpid, vaddr, length)
            if length > MAX_BODY:
                raise FrameError(f"packed pages of {length} bytes are too large")
            return Packed(container, vpid, vaddr, length)
        case Kind.IMAGE:
            container, offset, total = _IMAGE.unpack_from(raw)
            name = raw[_IMAGE.size :].decode("ascii")
            if not is_image_name(name):
                raise FrameError("image name has a wrong form")
            if offset + prefix.body_length > total:
                raise FrameError(f"image {name} is longer than it says")
            if total > MAX_IMAGE:
                raise FrameError(f"image {name} of {total} bytes is too large")
            return Image(container, offset, total, name)
        case Kind.FILE:
            return File(_FILE.unpack_from(raw)[0], raw[_FILE.size :])
        case Kind.PACKET:
            return Packet(_PACKET.unpack(raw)[0])
        case Kind.ROUND_END:
            return RoundEnd(_ROUND.unpack(raw)[0])
        case Kind.ACK:
            return Ack(_ACK.unpack(raw)[0])
        case Kind.ERROR:
            text = raw.decode("ascii")
            return Failure(Reason(text) if text in set(Reason) else Reason.TRANSFER_FAILED)


def _decode_hello(raw: bytes) -> Hello:
    version, uid_bytes, epoch, stream, streams = _HELLO.unpack(raw)
    if version != VERSION:
        raise FrameError(f"version {version} where {VERSION} is spoken")
    uid = uid_bytes.decode("ascii")
    if not _UID.match(uid) or not 0 < epoch < 1 << 63:
        raise FrameError("uid or epoch has a wrong form")
    if not 0 < streams <= MAX_STREAMS or stream >= streams:
        raise FrameError("number of streams is out of range")
    return Hello(uid, epoch, stream, streams, ())


def _check_range(container: int, vpid: int, vaddr: int, length: int) -> None:
    if container >= MAX_CONTAINERS or not vpid:
        raise FrameError("container or process number is out of range")
    if vaddr % PAGE or length % PAGE or not length:
        raise FrameError("pages are not aligned, or none")
    if vaddr + length > _ADDRESS_SPACE:
        raise FrameError("pages lie outside the address space")
