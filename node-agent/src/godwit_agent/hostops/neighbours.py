"""Pods that share a bridge with a pod that has moved away.

They have its address on their link and ask for it there (ARP). This node answers in
its place: a proxy entry (``ip neighbour add proxy``), and an announcement, since
they have learnt the address of an interface that has gone. Without a bridge
(``ptp``) no interface has such a subnet, and nothing is done.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

_NTF_PROXY = 0x08  # linux/neighbour.h
_BROADCAST = b"\xff" * 6
_ETHERTYPE_ARP = 0x0806
_ARP_REQUEST = 1


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
            netlink.neigh("replace", dst=ip, ifindex=index, flags=_NTF_PROXY)
            _announce(name, bytes.fromhex(address.replace(":", "")), ip)


def stand_back(netlink: IPRoute, ip: str) -> None:
    """The pod answers by itself again, or has gone for good."""
    with contextlib.suppress(NetlinkError, OSError):
        found = _home(netlink, ip)
        if found is not None:
            netlink.neigh("del", dst=ip, ifindex=found[0], flags=_NTF_PROXY)


def _home(netlink: IPRoute, ip: str) -> tuple[int, str, str] | None:
    """(index, name, link address) of the interface whose subnet has ``ip``."""
    wanted = ipaddress.ip_address(ip)
    if wanted.version != 4:
        return None
    for item in netlink.get_addr(family=socket.AF_INET):
        own = ipaddress.ip_interface(f"{item.get_attr('IFA_ADDRESS')}/{item['prefixlen']}")
        if item["prefixlen"] < 32 and wanted in own.network:
            (link,) = netlink.get_links(item["index"])
            return item["index"], link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_ADDRESS")
    return None


def _announce(interface: str, address: bytes, ip: str) -> None:
    """A gratuitous request (RFC 5227, 2.3): whoever knows the address updates it."""
    packed = ipaddress.ip_address(ip).packed
    frame = _BROADCAST + address + struct.pack("!H", _ETHERTYPE_ARP)
    frame += struct.pack("!HHBBH", 1, 0x0800, 6, 4, _ARP_REQUEST)
    frame += address + packed + bytes(6) + packed
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
        out.bind((interface, 0))
        out.send(frame)
