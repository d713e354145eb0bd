"""Pods that share a bridge with a pod that has moved away.

They have its address on their link and ask for it there (ARP, neighbour discovery). This
node answers in its place: a proxy entry (``ip neighbour add proxy``), and an
announcement, since they have learnt the address of an interface that has gone. Without
a bridge (``ptp``) no interface has such a subnet, and nothing is done.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from godwit_agent.hostops import checksum

_NTF_PROXY = 0x08  # linux/neighbour.h
_BROADCAST = b"\xff" * 6
_ETHERTYPE_ARP = 0x0806
_ARP_REQUEST = 1
_ETHERTYPE_IPV6 = 0x86DD
_ALL_NODES = ipaddress.IPv6Address("ff02::1").packed
_NEIGHBOUR_ADVERTISEMENT = 136
_OVERRIDE = 0x20000000
_TARGET_LINK_ADDRESS = 2


def through(interface: Any) -> int:
    """Index of what packets for a pod behind ``interface`` are routed to: its bridge, if any."""
    master = interface.get_attr("IFLA_MASTER")
    return int(master if master else interface["index"])


def stand_in(netlink: IPRoute, ip: str) -> None:
    """Answer for ``ip`` on the link that it belongs to. Never raises: this is called where
    nothing may hold up the process that moves."""
    with contextlib.suppress(NetlinkError, OSError):
        found = _home(netlink, ip)
        if found is not None:
            index, name, address = found
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            netlink.neigh("replace", dst=ip, ifindex=index, flags=_NTF_PROXY, family=family)
            if ":" in ip:
                # entries for IPv6 count only with this (net/ipv6/ndisc.c, ndisc_recv_ns)
                Path(f"/proc/sys/net/ipv6/conf/{name}/proxy_ndp").write_text("1")
            _announce(name, bytes.fromhex(address.replace(":", "")), ip)


def stand_back(netlink: IPRoute, ip: str) -> None:
    """The pod answers by itself again, or has gone for good."""
    with contextlib.suppress(NetlinkError, OSError):
        found = _home(netlink, ip)
        if found is not None:
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            netlink.neigh("del", dst=ip, ifindex=found[0], flags=_NTF_PROXY, family=family)


def _home(netlink: IPRoute, ip: str) -> tuple[int, str, str] | None:
    """(index, name, link address) of the interface whose subnet has ``ip``."""
    wanted = ipaddress.ip_address(ip)
    family = socket.AF_INET if wanted.version == 4 else socket.AF_INET6
    for item in netlink.get_addr(family=family):
        own = ipaddress.ip_interface(f"{item.get_attr('IFA_ADDRESS')}/{item['prefixlen']}")
        if item["prefixlen"] < wanted.max_prefixlen and wanted in own.network:
            (link,) = netlink.get_links(item["index"])
            return item["index"], link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_ADDRESS")
    return None


def _announce(interface: str, address: bytes, ip: str) -> None:
    """A gratuitous request (RFC 5227, 2.3), or an advertisement that nobody has asked for
    (RFC 4861, 7.2.6): whoever knows the address updates it."""
    packed = ipaddress.ip_address(ip).packed
    if len(packed) == 16:
        _send(interface, _advertisement(address, packed))
        return
    frame = _BROADCAST + address + struct.pack("!H", _ETHERTYPE_ARP)
    frame += struct.pack("!HHBBH", 1, 0x0800, 6, 4, _ARP_REQUEST)
    frame += address + packed + bytes(6) + packed
    _send(interface, frame)


def _advertisement(address: bytes, ip: bytes) -> bytes:
    """To all nodes: ``ip`` is at the link address ``address``."""
    body = struct.pack("!BBHI", _NEIGHBOUR_ADVERTISEMENT, 0, 0, _OVERRIDE) + ip
    body += bytes((_TARGET_LINK_ADDRESS, 1)) + address
    pseudo = ip + _ALL_NODES + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
    body = body[:2] + struct.pack("!H", checksum.internet(pseudo + body)) + body[4:]
    header = struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255)
    link = b"\x33\x33" + _ALL_NODES[-4:] + address + struct.pack("!H", _ETHERTYPE_IPV6)
    return link + header + ip + _ALL_NODES + body


def _send(interface: str, frame: bytes) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
        out.bind((interface, 0))
        out.send(frame)
