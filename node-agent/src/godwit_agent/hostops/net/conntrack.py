"""Messages of the kernel's connection table (nfnetlink_conntrack), made and read as bytes.

Through a library it took 2 ms to renew one entry, and some are renewed in the freeze;
the two messages of one entry are made here in about 20 µs (one run each).
Attributes: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

_INET = 2
_TCP, _UDP = 6, 17
_NEW, _GET, _DELETE = 0x100, 0x101, 0x102
_REQUEST, _ACK, _DUMP, _EXCLUSIVE, _CREATE = 0x001, 0x004, 0x300, 0x200, 0x400
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF
_BODY = 20  # struct nlmsghdr, struct nfgenmsg

_ORIG, _REPLY, _STATUS, _PROTOINFO = 1, 2, 3, 4
_NAT_SRC, _TIMEOUT, _MARK, _NAT_DST = 6, 7, 8, 13
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3
_NAT_PROTO, _NAT_PORT_MIN, _NAT_PORT_MAX = 3, 1, 2
_INFO_TCP = 1
_TCP_STATE, _TCP_FLAGS_ORIG, _TCP_FLAGS_REPLY = 1, 4, 5

# enum ip_conntrack_status, nf_conntrack_tcp.h
_SEEN_REPLY, _ASSURED, _CONFIRMED, _SRC_NAT, _DST_NAT = 2, 4, 8, 16, 32
KEPT_STATUS = _SEEN_REPLY | _ASSURED
_BE_LIBERAL, _ALL_TCP_FLAGS = 0x08, 0x0F
# SYN_SENT, SYN_RECV, ESTABLISHED, FIN_WAIT, CLOSE_WAIT: whoever comes later has said farewell.
_OPEN_STATES = (1, 2, 3, 4, 5)

End = tuple[bytes, int]
"""(packed address, port)"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A TCP or UDP connection whose source or destination is translated."""

    family: int
    protocol: int
    client: End
    service: End
    server: End
    """Where the client's packets go."""
    shown_as: End
    """What the server sees as its client."""
    status: int = field(compare=False)
    timeout_s: int = field(compare=False)
    mark: int = field(compare=False)
    tcp: bytes = field(compare=False)
    """Attributes of CTA_PROTOINFO_TCP; empty for UDP."""

    @property
    def masqueraded(self) -> bool:
        """The server does not see the client's own address."""
        return self.shown_as != self.client


def dump_request(family: int) -> bytes:
    """Asks for the whole table."""
    return _message(_GET, _REQUEST | _DUMP, family, b"")


def get_request(family: int, message: bytes) -> bytes:
    """Asks for the present state of the entry that ``message`` is about."""
    return _message(_GET, _REQUEST, family, _attribute(_ORIG, _all(message)[_ORIG], nested=True))


def may_concern(message: bytes, address: bytes) -> bool:
    """Whether a message is about ``address`` and, when TCP, not about a closed connection."""
    if address not in message:
        return False
    for kind, start, end in _walk(message, _BODY, len(message)):
        if kind == _PROTOINFO and end - start > 8:
            # CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_STATE: two headers.
            return message[start + 8] in _OPEN_STATES
    return True


def read(family: int, message: bytes) -> Entry | None:
    """One entry; None for what is not a TCP or UDP connection with a translation."""
    attributes = _all(message)
    status = _number(attributes.get(_STATUS, b""))
    if not status & (_SRC_NAT | _DST_NAT) or _ORIG not in attributes or _REPLY not in attributes:
        return None
    protocol, client, service = _tuple(attributes[_ORIG])
    _, server, shown_as = _tuple(attributes[_REPLY])
    if protocol not in (_TCP, _UDP):
        return None
    return Entry(
        family=family,
        protocol=protocol,
        client=client,
        service=service,
        server=server,
        shown_as=shown_as,
        status=status & KEPT_STATUS,
        timeout_s=max(_number(attributes.get(_TIMEOUT, b"")), 1),
        mark=_number(attributes.get(_MARK, b"")),
        tcp=_all(attributes[_PROTOINFO], 0).get(_INFO_TCP, b"")
        if _PROTOINFO in attributes
        else b"",
    )


def deletion(family: int, protocol: int, source: End, target: End) -> bytes:
    """Removes the entry of what ``source`` has opened to ``target``."""
    ends = _ends(_ORIG, family, protocol, source, target)
    return _message(_DELETE, _REQUEST | _ACK, family, ends)


def re_creation(entry: Entry) -> bytes:
    """Makes it anew with fixed translations. The reply is given untranslated: the kernel
    derives it from the two translations (``ctnetlink_setup_nat``)."""
    body = (
        _ends(_ORIG, entry.family, entry.protocol, entry.client, entry.service)
        + _ends(_REPLY, entry.family, entry.protocol, entry.service, entry.client)
        + _attribute(_TIMEOUT, struct.pack(">I", entry.timeout_s))
        + _attribute(_STATUS, struct.pack(">I", entry.status | _CONFIRMED))
        + _nat(_NAT_DST, entry.family, entry.server)
        + _nat(_NAT_SRC, entry.family, entry.shown_as)
    )
    if entry.mark:
        body += _attribute(_MARK, struct.pack(">I", entry.mark))
    if entry.tcp:
        inner = _attribute(_INFO_TCP, _tolerant(entry.tcp), nested=True)
        body += _attribute(_PROTOINFO, inner, nested=True)
    return _message(_NEW, _REQUEST | _ACK | _EXCLUSIVE | _CREATE, entry.family, body)


def _message(kind: int, flags: int, family: int, body: bytes) -> bytes:
    return struct.pack("=IHHIIBBH", _BODY + len(body), kind, flags, 1, 0, family, 0, 0) + body


def _attribute(kind: int, value: bytes, *, nested: bool = False) -> bytes:
    head = struct.pack("=HH", 4 + len(value), kind | (_NESTED if nested else 0))
    return head + value + bytes(-len(value) % 4)


def _walk(data: bytes, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(type, start, end) of each attribute's value."""
    while offset + 4 <= end:
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4 or offset + length > end:
            return
        yield kind & _TYPE_MASK, offset + 4, offset + length
        offset += (length + 3) & ~3


def _all(data: bytes, offset: int = _BODY) -> dict[int, bytes]:
    return {kind: data[start:end] for kind, start, end in _walk(data, offset, len(data))}


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _tuple(value: bytes) -> tuple[int, End, End]:
    """(protocol, from, to) of a CTA_TUPLE."""
    parts = _all(value, 0)
    # CTA_IP_V4_SRC, V4_DST, V6_SRC, V6_DST: the one pair or the other, in this order.
    addresses = [one for _, one in sorted(_all(parts.get(_TUPLE_IP, b""), 0).items())]
    proto = _all(parts.get(_TUPLE_PROTO, b""), 0)
    source, target = addresses if len(addresses) == 2 else (b"", b"")
    return (
        _number(proto.get(_PROTO_NUM, b"")),
        (source, _number(proto.get(_PROTO_SRC_PORT, b""))),
        (target, _number(proto.get(_PROTO_DST_PORT, b""))),
    )


def _ends(kind: int, family: int, protocol: int, source: End, target: End) -> bytes:
    first = 1 if family == _INET else 3
    addresses = _attribute(first, source[0]) + _attribute(first + 1, target[0])
    proto = (
        _attribute(_PROTO_NUM, bytes((protocol,)))
        + _attribute(_PROTO_SRC_PORT, struct.pack(">H", source[1]))
        + _attribute(_PROTO_DST_PORT, struct.pack(">H", target[1]))
    )
    return _attribute(
        kind,
        _attribute(_TUPLE_IP, addresses, nested=True)
        + _attribute(_TUPLE_PROTO, proto, nested=True),
        nested=True,
    )


def _nat(kind: int, family: int, end: End) -> bytes:
    # CTA_NAT_V4_MINIP and MAXIP are 1 and 2, those of V6 4 and 5.
    first = 1 if family == _INET else 4
    port = struct.pack(">H", end[1])
    ports = _attribute(_NAT_PORT_MIN, port) + _attribute(_NAT_PORT_MAX, port)
    return _attribute(
        kind,
        _attribute(first, end[0])
        + _attribute(first + 1, end[0])
        + _attribute(_NAT_PROTO, ports, nested=True),
        nested=True,
    )


def _tolerant(tcp: bytes) -> bytes:
    """The new entry has not seen the sequence numbers so far: it must not judge by them."""
    return b"".join(
        _attribute(kind, bytes((value[0] | _BE_LIBERAL, _ALL_TCP_FLAGS)))
        if kind in (_TCP_FLAGS_ORIG, _TCP_FLAGS_REPLY)
        else _attribute(kind, value)
        for kind, value in sorted(_all(tcp, 0).items())
    )
