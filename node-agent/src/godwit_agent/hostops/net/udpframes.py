"""UDP datagrams as frames of a capture (``Packet.data``), and back. Pure.

A datagram that a socket has received is only its payload and its addresses; a frame
that is injected needs the headers again. RFC 768, 791, 8200.
"""

from __future__ import annotations

import ipaddress
import itertools
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from godwit_agent.hostops.model import Packet
from godwit_agent.hostops.net import checksum

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Key = tuple[bytes, int, bytes, int, bytes]

_VNET_BYTES = 10
_LINK_BYTES = 14
START = _VNET_BYTES + _LINK_BYTES
"""Where the IP header begins in a frame."""
_TYPES = {4: b"\x08\x00", 6: b"\x86\xdd"}
_UDP = struct.Struct("!4H")
_FRAGMENT_HEADER = 44
_GSO_UDP_L4 = 5  # VIRTIO_NET_HDR_GSO_UDP_L4, linux/virtio_net.h
# Every link of IPv6 carries this much (RFC 8200, section 5), and those of IPv4 here do too.
_MTU = 1280
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Datagram:
    """What a socket has received: (address, port) of its sender and of its destination."""

    source: tuple[Address, int]
    destination: tuple[Address, int]
    payload: bytes
    traffic_class: int = 0
    hops: int = 64

    @property
    def key(self) -> Key:
        """By which it is found among frames."""
        (source, sport), (destination, dport) = self.source, self.destination
        return source.packed, sport, destination.packed, dport, self.payload


def frames(one: Datagram) -> list[bytes]:
    """The frames that bring it, without link addresses; several where it has to be fragmented."""
    four = one.source[0].version == 4
    link = bytes(START - 2) + _TYPES[one.source[0].version]
    body = _udp(one)
    room = _MTU - (20 if four else 40)
    if len(body) <= room:
        return [link + _header(one, len(body)) + body]
    room = (room - (0 if four else 8)) // 8 * 8
    number = next(_numbers)
    return [
        link + _header(one, len(piece), at, at + room < len(body), number) + piece
        for at in range(0, len(body), room)
        for piece in (body[at : at + room],)
    ]


def key(frame: bytes) -> list[Key]:
    """Of the datagrams in a captured frame: none if it has another protocol or is a fragment."""
    kind, body = frame[START - 2 : START], frame[START:]
    if kind == _TYPES[4] and len(body) >= 20:
        length = (body[0] & 15) * 4
        fragment = struct.unpack_from("!H", body, 6)[0] & 0x3FFF
        if body[9] != socket.IPPROTO_UDP or fragment:
            return []
        source, destination, rest = body[12:16], body[16:20], body[length:]
    elif kind == _TYPES[6] and len(body) >= 40:
        if body[6] != socket.IPPROTO_UDP:
            return []
        source, destination, rest = body[8:24], body[24:40], body[40:]
    else:
        return []
    if len(rest) < _UDP.size:
        return []
    sport, dport, length, _ = _UDP.unpack_from(rest)
    gso, size = frame[1], struct.unpack_from("=H", frame, 4)[0]
    joined = gso & 0x7F == _GSO_UDP_L4 and size > 0
    payload = rest[_UDP.size :] if joined else rest[_UDP.size : max(length, _UDP.size)]
    step = size if joined else max(len(payload), 1)
    return [
        (source, sport, destination, dport, payload[at : at + step])
        for at in range(0, max(len(payload), 1), step)
    ]


def without(held: Iterable[Packet], unread: Iterable[Datagram], until_ns: int) -> Iterator[Packet]:
    """``held`` but for what is ``unread`` in a socket: up to ``until_ns`` a frame may have been
    captured and delivered too."""
    waiting = Counter(one.key for one in unread)
    for packet in held:
        found = key(packet.data) if packet.at_ns < until_ns and waiting else []
        if found and all(waiting[one] for one in found):
            waiting.subtract(found)
        else:
            yield packet


def stays_inside(frame: bytes, own: Iterable[str]) -> bool:
    """Whether its sender is the pod itself (``own`` addresses): from outside the kernel would
    take no such packet."""
    kind, body = frame[START - 2 : START], frame[START:]
    packed = body[12:16] if kind == _TYPES[4] else body[8:24]
    try:
        source = ipaddress.ip_address(packed)
    except ValueError:
        return False
    return source.is_loopback or any(source == ipaddress.ip_address(ip) for ip in own)


def destination(frame: bytes) -> Address:
    """``ValueError`` for a frame without an IP header."""
    body = frame[START:]
    four = frame[START - 2 : START] == _TYPES[4]
    return ipaddress.ip_address(body[16:20] if four else body[24:40])


def _udp(one: Datagram) -> bytes:
    length = _UDP.size + len(one.payload)
    head = (one.source[1], one.destination[1], length)
    addresses = one.source[0].packed + one.destination[0].packed
    pseudo = addresses + struct.pack("!II", length, socket.IPPROTO_UDP)
    total = checksum.internet(pseudo + _UDP.pack(*head, 0) + one.payload)
    return _UDP.pack(*head, total or 0xFFFF) + one.payload  # 0 would mean: none


def _header(one: Datagram, length: int, at: int = 0, more: bool = False, number: int = 0) -> bytes:
    """Of one packet; ``at``, ``more`` and ``number`` of a fragment."""
    source, destination = one.source[0].packed, one.destination[0].packed
    if len(source) == 4:
        flags = at >> 3 | (0x2000 if more else 0)
        head = struct.pack(
            "!BBHHHBBH4s4s", 0x45, one.traffic_class, 20 + length, number & 0xFFFF, flags,
            one.hops, socket.IPPROTO_UDP, 0, source, destination,
        )  # fmt: skip
        return head[:10] + struct.pack("!H", checksum.internet(head)) + head[12:]
    first = 6 << 28 | one.traffic_class << 20
    if not number:
        following = socket.IPPROTO_UDP
        return struct.pack("!IHBB", first, length, following, one.hops) + source + destination
    head = struct.pack("!IHBB", first, 8 + length, _FRAGMENT_HEADER, one.hops)
    fragment = struct.pack("!BBHI", socket.IPPROTO_UDP, 0, at | more, number & 0xFFFFFFFF)
    return head + source + destination + fragment
