"""Translated connections of a pod that moves away.

kube-proxy masquerades what comes from outside the cluster (NodePort, load
balancer, a ClusterIP routed from outside). The kernel forgets a masqueraded
connection when the interface it first left by goes down (``masq_device_event``,
net/netfilter/nf_nat_masquerade.c): that is the source's end of the pod's link,
which goes with the source's sandbox. So, while that link still stands, each such
entry is made anew with the same addresses and ports as an ordinary source
translation, which remembers no interface.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
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
    NFCTSocket,
    nfct_msg,
)

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.netns import NetnsThread
from godwit_agent.hostops.nft import Nft
from godwit_api.errors import Retryable
from godwit_api.reasons import Reason

_TABLE = "godwit_connections"
_PORTS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
_ALL_TCP_FLAGS = 0x0F
_OPEN_STATES = (TCP_CONNTRACK_ESTABLISHED, TCP_CONNTRACK_FIN_WAIT, TCP_CONNTRACK_CLOSE_WAIT)
# linux/netlink.h, linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
_NETLINK_NETFILTER = 12
_GET = 1 << 8 | 1
_REQUEST_DUMP = 0x001 | 0x300
_ERROR, _DONE = 2, 3
_TYPE_MASK = 0x3FFF
_PROTOINFO = 4
_HEADER = struct.Struct("=IH10x")
_MOVED_STATUS = IPS_SEEN_REPLY | IPS_ASSURED


@dataclass(frozen=True, slots=True)
class Translated:
    """One entry of the connection table whose source is translated."""

    protocol: int
    client: tuple[str, int]
    service: tuple[str, int]
    pod: tuple[str, int]
    shown_as: tuple[str, int]
    """What the pod sees as its client."""
    status: int
    timeout_s: int
    mark: int
    tcp: dict[str, Any]
    """State and window scales, as the kernel names them."""


class HostConnections:
    """The real ``Connections``: works in the host's network namespace."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def keep(self, ip: str) -> int:
        """How many connections with ``ip`` no longer depend on its interface."""
        family = _family(ip)
        host = NetnsThread(self._layout.host_netns)
        try:
            found = host.call(lambda: _translated(family, ip))
            if not found:
                return 0
            nft = Nft(host)
            try:
                nft.run(_remove() + _hold(family, found))
                return host.call(lambda: _renew(family, found))
            finally:
                nft.run(_remove())
                nft.close()
        except (NetlinkError, OSError) as error:
            raise Retryable(Reason.INTERNAL, f"connections of {ip}: {error}") from error
        finally:
            host.close()


def _family(ip: str) -> int:
    return socket.AF_INET if ipaddress.ip_address(ip).version == 4 else socket.AF_INET6


def _remove() -> str:
    return f"add table inet {_TABLE}\ndelete table inet {_TABLE}\n"


def _hold(family: int, found: list[Translated]) -> str:
    """Between an entry's end and its new beginning its packets must not make another one."""
    ends = sorted({item.service[0] for item in found} | {item.shown_as[0] for item in found})
    to = f"{'ip' if family == socket.AF_INET else 'ip6'} daddr {{ {', '.join(ends)} }}"
    return (
        f"add table inet {_TABLE}\n"
        # After the connection table (-200), before destinations are translated (-100).
        f"add chain inet {_TABLE} pre {{ type filter hook prerouting priority -150; }}\n"
        f"add rule inet {_TABLE} pre ct state new {to} tcp flags & (syn | ack) != syn drop\n"
        f"add rule inet {_TABLE} pre ct state new {to} meta l4proto udp drop\n"
    )


def _translated(family: int, ip: str) -> list[Translated]:
    found = []
    for payload in _dump(family):
        if _may_concern(payload, ipaddress.ip_address(ip).packed):
            message = nfct_msg(payload)
            message.decode()
            item = _read(family, message)
            if item and item.pod[0] == ip:
                found.append(item)
    return found


def _dump(family: int) -> Iterator[bytes]:
    """Messages of the whole table. A busy node has tens of thousands of entries, most of them
    closed: they are looked at as bytes, and only the few that matter are decoded."""
    request = struct.pack("=IHHIIBBH", 20, _GET, _REQUEST_DUMP, 1, 0, family, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.settimeout(10)
        netlink.send(request)
        while True:
            data = netlink.recv(1 << 18)
            offset = 0
            while offset + _HEADER.size <= len(data):
                length, kind = _HEADER.unpack_from(data, offset)
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", data, offset + 16)[0], "conntrack")
                yield data[offset : offset + length]
                offset += (length + 3) & ~3


def _may_concern(payload: bytes, address: bytes) -> bool:
    """Whether a message is about ``address`` and, when TCP, not about a closed connection."""
    if address not in payload:
        return False
    offset = 20
    while offset + 4 <= len(payload):
        length, kind = struct.unpack_from("=HH", payload, offset)
        if kind & _TYPE_MASK == _PROTOINFO and length >= 13:
            # CTA_PROTOINFO, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_STATE: three headers.
            return payload[offset + 12] in _OPEN_STATES
        offset += max((length + 3) & ~3, 4)
    return True


def _read(family: int, message: Any) -> Translated | None:
    """One entry of a dump; None for what is not a translated TCP or UDP connection."""
    status = int(message.get_attr("CTA_STATUS") or 0)
    orig, reply = message.get_attr("CTA_TUPLE_ORIG"), message.get_attr("CTA_TUPLE_REPLY")
    if not status & IPS_SRC_NAT or orig is None or reply is None:
        return None
    if orig.get_nested("CTA_TUPLE_PROTO", "CTA_PROTO_NUM") not in _PORTS:
        return None
    orig_from, orig_to = _ends(family, orig)
    reply_from, reply_to = _ends(family, reply)
    info = message.get_nested("CTA_PROTOINFO", "CTA_PROTOINFO_TCP")
    return Translated(
        protocol=orig.get_nested("CTA_TUPLE_PROTO", "CTA_PROTO_NUM"),
        client=orig_from,
        service=orig_to,
        pod=reply_from,
        shown_as=reply_to,
        status=status & _MOVED_STATUS,
        timeout_s=max(int(message.get_attr("CTA_TIMEOUT") or 0), 1),
        mark=int(message.get_attr("CTA_MARK") or 0),
        tcp={
            name: info.get_attr(name)
            for name in (
                "CTA_PROTOINFO_TCP_STATE",
                "CTA_PROTOINFO_TCP_WSCALE_ORIGINAL",
                "CTA_PROTOINFO_TCP_WSCALE_REPLY",
                "CTA_PROTOINFO_TCP_FLAGS_ORIGINAL",
                "CTA_PROTOINFO_TCP_FLAGS_REPLY",
            )
        }
        if info
        else {},
    )


def _ends(family: int, half: Any) -> tuple[tuple[str, int], tuple[str, int]]:
    version = "V4" if family == socket.AF_INET else "V6"
    return (
        (
            half.get_nested("CTA_TUPLE_IP", f"CTA_IP_{version}_SRC"),
            half.get_nested("CTA_TUPLE_PROTO", "CTA_PROTO_SRC_PORT"),
        ),
        (
            half.get_nested("CTA_TUPLE_IP", f"CTA_IP_{version}_DST"),
            half.get_nested("CTA_TUPLE_PROTO", "CTA_PROTO_DST_PORT"),
        ),
    )


def _renew(family: int, found: list[Translated]) -> int:
    kept, lost = 0, ""
    with NFCTSocket(nfgen_family=family) as table:
        for item in found:
            orig = NFCTAttrTuple(family, *_tuple(item))
            entry = _entry(family, item, orig)
            try:
                table.entry("del", tuple_orig=orig)
            except NetlinkError:
                continue  # it has ended meanwhile
            try:
                table.entry("add", **entry)
                kept += 1
            except NetlinkError as error:
                lost = f"{item.client} to {item.service}: {error}"
    if lost:
        raise Retryable(Reason.INTERNAL, f"a translated connection was lost, {lost}")
    return kept


def _tuple(item: Translated) -> tuple[str, str, int, int, int]:
    return (item.client[0], item.service[0], item.protocol, item.client[1], item.service[1])


def _entry(family: int, item: Translated, orig: NFCTAttrTuple) -> dict[str, Any]:
    """What makes the entry anew. The reply is given untranslated: the kernel derives it
    from the two translations (``ctnetlink_setup_nat``)."""
    return {
        "tuple_orig": orig,
        "tuple_reply": orig.reverse(),
        "timeout": item.timeout_s,
        "status": item.status | IPS_CONFIRMED,
        "mark": item.mark or None,
        "nat_dst": _nat(family, item.pod),
        "nat_src": _nat(family, item.shown_as),
        "protoinfo": _tcp(item.tcp) if item.tcp else None,
    }


def _nat(family: int, end: tuple[str, int]) -> dict[str, Any]:
    version = "V4" if family == socket.AF_INET else "V6"
    ports = [["CTA_PROTONAT_PORT_MIN", end[1]], ["CTA_PROTONAT_PORT_MAX", end[1]]]
    return {
        "attrs": [
            [f"CTA_NAT_{version}_MINIP", end[0]],
            [f"CTA_NAT_{version}_MAXIP", end[0]],
            ["CTA_NAT_PROTO", {"attrs": ports}],
        ]
    }


def _tcp(info: dict[str, Any]) -> dict[str, Any]:
    """The entry has not seen the sequence numbers so far: it must not judge by them."""
    attrs = []
    for name, value in info.items():
        if value is None:
            continue
        if name.startswith("CTA_PROTOINFO_TCP_FLAGS"):
            value = (value[0] | IP_CT_TCP_FLAG_BE_LIBERAL, _ALL_TCP_FLAGS)
        attrs.append([name, value])
    return {"attrs": [["CTA_PROTOINFO_TCP", {"attrs": attrs}]]}
