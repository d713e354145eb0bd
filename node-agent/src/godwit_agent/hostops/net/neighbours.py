"""Who knows which link address: this node, and pods that share a bridge with one that moves.

A pod that comes back to a bridge has an interface of its own each time. What the node knows of the
former one counts as reachable for up to 45 s and is asked for again some seconds later
(``base_reachable_time_ms``, NUD_DELAY and NUD_PROBE in net/core/neighbour.c): so long every packet
would go nowhere, unless the pod itself sends one first. So the node is told.

Neighbours on the bridge have the address of a pod that has left on their link and ask for it there
(ARP, neighbour discovery). This node answers in its place: a proxy entry (``ip neighbour add
proxy``), and an announcement, since they have learnt the address of an interface that has gone; and
another one when the pod is back. Without a bridge (``ptp``) no interface has such a subnet, and
nobody is told.
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

from godwit_agent.hostops.net import checksum

_NTF_PROXY = 0x08  # linux/neighbour.h
_NUD_REACHABLE = 0x02
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


def learn(netlink: IPRoute, ip: str, index: int, pod_mac: str) -> None:
    """This node finds ``ip`` at ``pod_mac``, behind the interface ``index``. Never raises, as
    ``stand_in``."""
    with contextlib.suppress(NetlinkError, OSError):
        netlink.neigh(
            "replace",
            dst=ip,
            lladdr=pod_mac,
            ifindex=index,
            state=_NUD_REACHABLE,
            family=_family(ip),
        )


def stand_in(netlink: IPRoute, ip: str) -> None:
    """Answer for ``ip`` on the link that it belongs to. Never raises: this is called where
    nothing may hold up the process that moves."""
    with contextlib.suppress(NetlinkError, OSError):
        found = _home(netlink, ip)
        if found is not None:
            index, name, address = found
            netlink.neigh("replace", dst=ip, ifindex=index, flags=_NTF_PROXY, family=_family(ip))
            if ":" in ip:
                # entries for IPv6 count only with this (net/ipv6/ndisc.c, ndisc_recv_ns)
                Path(f"/proc/sys/net/ipv6/conf/{name}/proxy_ndp").write_text("1")
            _announce(name, address, ip)


def stand_back(netlink: IPRoute, ip: str, pod_mac: str | None) -> None:
    """The pod is here again, and whoever has ``ip`` on the link finds it at ``pod_mac``; or it has
    gone for good (None). Never raises, as ``stand_in``."""
    with contextlib.suppress(NetlinkError, OSError):
        found = _home(netlink, ip)
        if found is None:
            return
        index, name, _ = found
        with contextlib.suppress(NetlinkError):  # it may not have stood in
            netlink.neigh("del", dst=ip, ifindex=index, flags=_NTF_PROXY, family=_family(ip))
        if pod_mac:
            _announce(name, pod_mac, ip)


def _family(ip: str) -> int:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def _home(netlink: IPRoute, ip: str) -> tuple[int, str, str] | None:
    """(index, name, link address) of the interface whose subnet has ``ip``."""
    wanted = ipaddress.ip_address(ip)
    for item in netlink.get_addr(family=_family(ip)):
        own = ipaddress.ip_interface(f"{item.get_attr('IFA_ADDRESS')}/{item['prefixlen']}")
        if item["prefixlen"] < wanted.max_prefixlen and wanted in own.network:
            (link,) = netlink.get_links(item["index"])
            return item["index"], link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_ADDRESS")
    return None


def _announce(interface: str, mac: str, ip: str) -> None:
    """A gratuitous request (RFC 5227, 2.3), or an advertisement that nobody has asked for
    (RFC 4861, 7.2.6): whoever knows the address updates it."""
    address = bytes.fromhex(mac.replace(":", ""))
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
