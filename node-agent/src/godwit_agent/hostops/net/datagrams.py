"""What UDP sockets of a frozen pod have received and their processes have not read.

CRIU dumps no such queue. It is looked for in the freeze, when nothing is delivered any
more, and taken out only after the commit: a rollback finds every socket as it was. The
target injects it as it does what was held: the socket there receives it anew.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum

from godwit_agent.hostops import descriptors, procs
from godwit_agent.hostops.model import Packet, PodState
from godwit_agent.hostops.net import udpframes
from godwit_agent.hostops.net.udpframes import Address, Datagram

_MAX_BYTES = 64 << 20
_MAX_PAYLOAD = 1 << 16


class _Kind(IntEnum):
    """Of control messages: linux/in.h, linux/in6.h, linux/udp.h."""

    TOS = 1
    TTL = 2
    DESTINATION = 20
    HOP_LIMIT = 52
    CLASS = 67
    DESTINATION6 = 74
    JOINED = 104


# IP_RECVTTL, IP_RECVTOS, IP_RECVORIGDSTADDR; IPV6_RECVHOPLIMIT, _RECVTCLASS, _RECVORIGDSTADDR
_SWITCHES = [
    *((socket.IPPROTO_IP, option) for option in (12, 13, 20)),
    *((socket.IPPROTO_IPV6, option) for option in (51, 66, 74)),
]


class HostDatagrams:
    """The real ``Datagrams``."""

    def find(self, pod: PodState) -> Unread:
        """Opens the sockets that have something; touches nothing. Never raises."""
        waiting = {
            inode
            for name in ("net/udp", "net/udp6")
            for inode in _waiting(procs.lines(pod.sandbox.pid, name))
        }
        found: dict[int, socket.socket] = {}
        if waiting:
            for pid, number, inode in _descriptors(pod):
                if inode in waiting and inode not in found:
                    with contextlib.suppress(OSError):
                        found[inode] = socket.socket(fileno=descriptors.of_process(pid, number))
        return Unread(found.values())


class Unread:
    """The real ``UnreadDatagrams``."""

    def __init__(self, sockets: Iterable[socket.socket]) -> None:
        self._sockets = list(sockets)

    def before(self, held: tuple[Packet, ...], until_ns: int) -> tuple[Packet, ...]:
        unread: list[Datagram] = []
        for one in self._sockets:
            # after the commit nothing may stop for a datagram
            with contextlib.suppress(OSError, ValueError, struct.error):
                unread.extend(_read(one))
        self.close()
        data = [frame for one in unread for frame in udpframes.frames(one)]
        first_ns = min((packet.at_ns for packet in held), default=until_ns) - len(data)
        return (
            *(Packet(first_ns + number, frame) for number, frame in enumerate(data)),
            *udpframes.without(held, unread, until_ns),
        )

    def close(self) -> None:
        for one in self._sockets:
            one.close()
        self._sockets.clear()


def _waiting(lines: Iterable[str]) -> Iterator[int]:
    """Inodes of sockets with a receive queue; the format is of net/ipv4/udp.c, udp4_format_sock."""
    for line in lines:
        fields = line.split()
        _, _, received = fields[4].partition(":") if len(fields) > 9 else ("", "", "")
        if received.strip("0") and received != "rx_queue":
            yield int(fields[9])


def _descriptors(pod: PodState) -> Iterator[tuple[int, int, int]]:
    """(pid, number, inode) of all sockets of the pod."""
    for container in pod.containers:
        for pid in procs.tree(container.init_pid) if container.init_pid else ():
            for number, inode in descriptors.sockets(pid):
                yield pid, number, inode


def _read(one: socket.socket) -> Iterator[Datagram]:
    """In the order in which the socket would have given them."""
    for level, option in _SWITCHES:
        with contextlib.suppress(OSError):  # an IPv4 socket has no options of IPv6
            one.setsockopt(level, option, 1)
    port = one.getsockname()[1]
    total = 0
    while total < _MAX_BYTES:
        try:
            payload, control, _, sender = one.recvmsg(_MAX_PAYLOAD, 512, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        total += max(len(payload), 1)
        yield from _datagrams(payload, control, sender, port)


def _datagrams(
    payload: bytes, control: Iterable[tuple[int, int, bytes]], sender: tuple[str, int], port: int
) -> Iterator[Datagram]:
    """One, or several that the kernel had joined (UDP_GRO). None without a destination."""
    source = _plain(ipaddress.ip_address(sender[0].partition("%")[0]))
    destination: Address | None = None
    traffic_class, hops, size = 0, 64, 0
    for level, kind, value in control:
        match level, kind:
            case (socket.IPPROTO_IP, _Kind.DESTINATION):
                destination = ipaddress.ip_address(value[4:8])
            case (socket.IPPROTO_IPV6, _Kind.DESTINATION6):
                destination = _plain(ipaddress.ip_address(value[8:24]))
            case (socket.IPPROTO_IP, _Kind.TOS):
                traffic_class = value[0]
            case (socket.IPPROTO_IP, _Kind.TTL) | (socket.IPPROTO_IPV6, _Kind.HOP_LIMIT):
                (hops,) = struct.unpack_from("=i", value)
            case (socket.IPPROTO_IPV6, _Kind.CLASS):
                (traffic_class,) = struct.unpack_from("=i", value)
            case (socket.IPPROTO_UDP, _Kind.JOINED):
                (size,) = struct.unpack_from("=i", value)
    if destination is None or destination.version != source.version:
        return
    step = size or max(len(payload), 1)
    for at in range(0, max(len(payload), 1), step):
        piece = payload[at : at + step]
        yield Datagram((source, sender[1]), (destination, port), piece, traffic_class, hops)


def _plain(address: Address) -> Address:
    """An IPv6 socket shows what came by IPv4 so (RFC 4291, 2.5.5.2)."""
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address
