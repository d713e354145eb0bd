"""Messages of the kernel's connection table (nfnetlink_conntrack), made and read.

Attributes by pyroute2; what must be quick is looked at as bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from pyroute2.netlink.nfnetlink.nfctsocket import (
    IP_CT_TCP_FLAG_BE_LIBERAL,
    IPS_ASSURED,
    IPS_CONFIRMED,
    IPS_SEEN_REPLY,
    IPS_SRC_NAT,
    TCP_CONNTRACK_CLOSE_WAIT,
    TCP_CONNTRACK_ESTABLISHED,
    TCP_CONNTRACK_FIN_WAIT,
    NFCTAttrTuple,
    nfct_msg,
)

_INET = 2
_TCP, _UDP = 6, 17
_ALL_TCP_FLAGS = 0x0F
_OPEN_STATES = (TCP_CONNTRACK_ESTABLISHED, TCP_CONNTRACK_FIN_WAIT, TCP_CONNTRACK_CLOSE_WAIT)
# linux/netlink.h, linux/netfilter/nfnetlink_conntrack.h
_NEW, _GET, _DELETE = 0x100, 0x101, 0x102
_REQUEST, _ACK, _EXCLUSIVE, _CREATE = 0x001, 0x004, 0x200, 0x400
_TYPE_MASK = 0x3FFF
_TUPLE_ORIG, _PROTOINFO = 1, 4
_BODY = 20  # struct nlmsghdr, struct nfgenmsg


@dataclass(frozen=True, slots=True)
class Entry:
    """A connection whose source is translated. Ends are (address, port)."""

    family: int
    protocol: int
    client: tuple[str, int]
    service: tuple[str, int]
    pod: tuple[str, int]
    shown_as: tuple[str, int]
    """What the pod sees as its client."""
    status: int = field(compare=False)
    timeout_s: int = field(compare=False)
    mark: int = field(compare=False)
    tcp: tuple[tuple[str, Any], ...] = field(compare=False)
    """State, window scales and flags, as the kernel names them."""


def may_concern(message: bytes, address: bytes) -> bool:
    """Whether a message is about ``address`` and, when TCP, not about a closed connection."""
    if address not in message:
        return False
    found = _attribute(message, _PROTOINFO)
    if found is None or found[1] < 13:
        return True
    # CTA_PROTOINFO, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_STATE: three headers.
    return message[found[0] + 12] in _OPEN_STATES


def get_request(family: int, message: bytes) -> bytes:
    """Asks for the present state of the entry that ``message`` is about."""
    start, length = _attribute(message, _TUPLE_ORIG) or (_BODY, 0)
    return (
        struct.pack("=IHHIIBBH", _BODY + length, _GET, _REQUEST, 1, 0, family, 0, 0)
        + message[start : start + length]
    )


def read(family: int, message: bytes) -> Entry | None:
    """One entry; None for what is not a TCP or UDP connection with a translated source."""
    decoded = nfct_msg(message)
    decoded.decode()
    status = int(decoded.get_attr("CTA_STATUS") or 0)
    orig, reply = decoded.get_attr("CTA_TUPLE_ORIG"), decoded.get_attr("CTA_TUPLE_REPLY")
    if not status & IPS_SRC_NAT or orig is None or reply is None:
        return None
    protocol = orig.get_nested("CTA_TUPLE_PROTO", "CTA_PROTO_NUM")
    if protocol not in (_TCP, _UDP):
        return None
    (client, service), (pod, shown_as) = _ends(family, orig), _ends(family, reply)
    info = decoded.get_nested("CTA_PROTOINFO", "CTA_PROTOINFO_TCP")
    return Entry(
        family=family,
        protocol=protocol,
        client=client,
        service=service,
        pod=pod,
        shown_as=shown_as,
        status=status & (IPS_SEEN_REPLY | IPS_ASSURED),
        timeout_s=max(int(decoded.get_attr("CTA_TIMEOUT") or 0), 1),
        mark=int(decoded.get_attr("CTA_MARK") or 0),
        tcp=tuple(
            (f"CTA_PROTOINFO_TCP_{name}", info.get_attr(f"CTA_PROTOINFO_TCP_{name}"))
            for name in (
                *("STATE", "WSCALE_ORIGINAL", "WSCALE_REPLY"),
                *("FLAGS_ORIGINAL", "FLAGS_REPLY"),
            )
        )
        if info
        else (),
    )


def deletion(entry: Entry) -> bytes:
    """Removes it."""
    return _encode(entry, _DELETE, _REQUEST | _ACK, tuple_orig=_tuple(entry))


def re_creation(entry: Entry) -> bytes:
    """Makes it anew with fixed translations. The reply is given untranslated: the kernel
    derives it from the two translations (``ctnetlink_setup_nat``)."""
    orig = _tuple(entry)
    return _encode(
        entry,
        _NEW,
        _REQUEST | _ACK | _EXCLUSIVE | _CREATE,
        tuple_orig=orig,
        tuple_reply=orig.reverse(),
        timeout=entry.timeout_s,
        status=entry.status | IPS_CONFIRMED,
        mark=entry.mark or None,
        nat_dst=_nat(entry.family, entry.pod),
        nat_src=_nat(entry.family, entry.shown_as),
        protoinfo=_tcp(entry) if entry.tcp else None,
    )


def _attribute(message: bytes, wanted: int) -> tuple[int, int] | None:
    """(offset, padded length) of a top-level attribute."""
    offset = _BODY
    while offset + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, offset)
        padded = max((length + 3) & ~3, 4)
        if kind & _TYPE_MASK == wanted:
            return offset, padded
        offset += padded
    return None


def _encode(entry: Entry, kind: int, flags: int, **attributes: Any) -> bytes:
    message = nfct_msg.create_from(**attributes)
    message["nfgen_family"] = entry.family
    message["header"]["type"] = kind
    message["header"]["flags"] = flags
    message["header"]["sequence_number"] = 1
    message.encode()
    return bytes(message.data)


def _tuple(entry: Entry) -> NFCTAttrTuple:
    return NFCTAttrTuple(
        entry.family,
        *(entry.client[0], entry.service[0], entry.protocol, entry.client[1], entry.service[1]),
    )


def _version(family: int) -> str:
    return "V4" if family == _INET else "V6"


def _ends(family: int, half: Any) -> tuple[tuple[str, int], tuple[str, int]]:
    return (
        (
            half.get_nested("CTA_TUPLE_IP", f"CTA_IP_{_version(family)}_SRC"),
            half.get_nested("CTA_TUPLE_PROTO", "CTA_PROTO_SRC_PORT"),
        ),
        (
            half.get_nested("CTA_TUPLE_IP", f"CTA_IP_{_version(family)}_DST"),
            half.get_nested("CTA_TUPLE_PROTO", "CTA_PROTO_DST_PORT"),
        ),
    )


def _nat(family: int, end: tuple[str, int]) -> dict[str, Any]:
    ports = [["CTA_PROTONAT_PORT_MIN", end[1]], ["CTA_PROTONAT_PORT_MAX", end[1]]]
    return {
        "attrs": [
            [f"CTA_NAT_{_version(family)}_MINIP", end[0]],
            [f"CTA_NAT_{_version(family)}_MAXIP", end[0]],
            ["CTA_NAT_PROTO", {"attrs": ports}],
        ]
    }


def _tcp(entry: Entry) -> dict[str, Any]:
    """The new entry has not seen the sequence numbers so far: it must not judge by them."""
    attributes = [
        [
            name,
            (value[0] | IP_CT_TCP_FLAG_BE_LIBERAL, _ALL_TCP_FLAGS) if "FLAGS" in name else value,
        ]
        for name, value in entry.tcp
        if value is not None
    ]
    return {"attrs": [["CTA_PROTOINFO_TCP", {"attrs": attributes}]]}
