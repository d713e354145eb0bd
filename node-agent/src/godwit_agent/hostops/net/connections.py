"""Translated connections of a pod that moves.

As a server: kube-proxy masquerades what comes from outside the cluster (NodePort, load
balancer, a ClusterIP routed from outside). Of a masqueraded connection the kernel
remembers the interface it left by. When a packet leaves by another one, as after
a change of route, the connection is forgotten and its packet dropped
(``nf_nat_oif_changed``, net/netfilter/nf_nat_core.c); the same when that interface
goes down (``masq_device_event``, nf_nat_masquerade.c). On the source and on the
target of a move both happen. So, in the freeze, each such entry is made anew with
the same addresses and ports as an ordinary source translation, which remembers
no interface.

As a client: a ClusterIP is translated on the pod's own node. The next node would choose
anew among the Service's servers, and a wrong one answers with a reset. So the entries of
the pod's own connections go along.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Outgoing
from godwit_agent.hostops.net.conntrack import (
    KEPT_STATUS,
    Entry,
    deletion,
    dump_request,
    get_request,
    may_concern,
    re_creation,
    read,
)
from godwit_agent.hostops.net.netns import NetnsThread
from godwit_agent.hostops.net.nft import Nft, removal
from godwit_api.errors import GodwitError, Retryable
from godwit_api.reasons import Reason

_TABLE = "godwit_connections"
# linux/netlink.h, linux/netfilter/nfnetlink_compat.h
_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_GROUP_NEW = 1
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IH10x")
_BUFFER_BYTES = 1 << 20
_DUMP_TIMEOUT_S = 5.0


class HostConnections:
    """The real ``Connections``: works in the host's network namespace."""

    def __init__(self, layout: Layout) -> None:
        """Nobody watches yet. What an agent before this one has left would keep new connections
        from the Services that a pod had been reached by."""
        self._layout = layout
        with contextlib.suppress(GodwitError):
            _forget(layout)

    def watch(self, ips: tuple[str, ...]) -> HeldConnections:
        """Knows all connections of ``ips`` from now on. ``Retryable(Internal)``."""
        found: list[_OfAddress] = []
        for ip in ips:
            host = NetnsThread(self._layout.host_netns)
            try:
                found.append(_OfAddress(host, ip))
            except (OSError, GodwitError) as error:
                host.close()
                HeldConnections(found).close()
                raise Retryable(Reason.INTERNAL, f"connections of {ip}: {error}") from error
        return HeldConnections(found)


class HeldConnections:
    """The real ``HeldConnections``: of all addresses of a pod."""

    def __init__(self, parts: Iterable[_OfAddress]) -> None:
        self._parts = tuple(parts)

    def renew(self) -> tuple[int, int]:
        return _sum(part.renew() for part in self._parts)

    def outgoing(self) -> tuple[Outgoing, ...]:
        return tuple(one for part in self._parts for one in part.outgoing())

    def let_go(self) -> None:
        for part in self._parts:
            part.let_go()

    def adopt(self, connections: Iterable[Outgoing]) -> tuple[int, int]:
        """(kept, lost); what is of no address of the pod is lost."""
        wanted = list(connections)
        kept, lost = _sum(part.adopt(wanted) for part in self._parts)
        strangers = [one for one in wanted if not any(part.has(one) for part in self._parts)]
        return kept, lost + len(strangers)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _sum(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    kept = lost = 0
    for one, other in counts:
        kept, lost = kept + one, lost + other
    return kept, lost


class _OfAddress:
    """What the node translates of one address."""

    def __init__(self, host: NetnsThread, ip: str) -> None:
        self._host = host
        self._address = ipaddress.ip_address(ip)
        self._family = socket.AF_INET if self._address.version == 4 else socket.AF_INET6
        self._ip = "ip" if self._address.version == 4 else "ip6"
        self._table = f"{_TABLE}_{self._address.packed.hex()}"
        self._nft = Nft(host)
        self._news = host.call(_subscribed)
        self._requests = host.call(_netlink)
        self._requests_id = self._requests.getsockname()[0]
        self._opened: dict[Entry, None] = {}
        self._ready = {entry: _messages(entry) for entry in self._list()}
        self._guarded = False
        self._nft.run(self._chain() + self._quiet())
        self._guarded = True
        self._hold(self._ready)

    def renew(self) -> tuple[int, int]:
        """(kept, lost) since the last call; what has ended by itself counts as neither.

        Never raises: a lost connection is no reason to undo or to hold up a switch."""
        ready, self._ready = self._ready, {}
        kept = lost = 0
        try:
            late = {entry: _messages(entry) for entry in self._late()}
            self._hold(late)
            ready |= late
        except (GodwitError, OSError):
            lost += 1
        for remove, create in ready.values():
            gone = self._ask(remove)
            if gone == errno.ENOENT:
                continue
            if gone or self._ask(create):
                lost += 1
            else:
                kept += 1
        return kept, lost

    def outgoing(self) -> tuple[Outgoing, ...]:
        return tuple(
            Outgoing(e.protocol, e.client, e.service, e.server, e.status, e.timeout_s, e.tcp)
            for e in self._opened
        )

    def let_go(self) -> None:
        """Never raises, as ``renew``."""
        for entry in self._opened:
            self._ask(deletion(self._family, entry.protocol, entry.client, entry.service))

    def has(self, connection: Outgoing) -> bool:
        return connection.client[0] == self._address.packed

    def adopt(self, connections: Iterable[Outgoing]) -> tuple[int, int]:
        """Of its own address. Never raises, as ``renew``."""
        ours = [one for one in connections if self.has(one)]
        kept = lost = 0
        try:
            self._refuse_translated(ours)
        except (GodwitError, OSError):
            lost += len(ours)
            return kept, lost
        for one in ours:
            for source, target in (
                # The pod has been here before: sequence numbers that are long past.
                (one.client, one.service),
                # The server is here: so far its connection was not translated here.
                (one.client, one.server),
                # What the node before has still translated back.
                (one.service, one.client),
            ):
                self._ask(deletion(self._family, one.protocol, source, target))
            if self._ask(re_creation(_entry(self._family, one))):
                lost += 1
            else:
                kept += 1
        return kept, lost

    def _refuse_translated(self, connections: Iterable[Outgoing]) -> None:
        """Answers that the node before has translated back are repeated by the server. Taken as
        they are they would begin connections of their own, with another port."""
        services = sorted({str(ipaddress.ip_address(one.service[0])) for one in connections})
        if not services:
            return
        ip = self._ip
        self._nft.run(
            f"{self._chain()}"
            f"add rule inet {self._table} pre ct state new {ip} saddr {{ {', '.join(services)} }} "
            f"{ip} daddr {self._address} tcp flags & (syn | ack) != syn drop\n"
        )
        self._guarded = True

    def close(self) -> None:
        """Lets go of everything; what was renewed stays."""
        try:
            if self._guarded:
                self._nft.run(removal(self._table))
        finally:
            self._nft.close()
            self._news.close()
            self._requests.close()
            self._host.close()

    def _list(self) -> Iterator[Entry]:
        """A busy node has tens of thousands of entries, most of them closed: they are looked at
        as bytes, and only the few that matter are decoded."""
        self._requests.send(dump_request(self._family))
        while True:
            for kind, message in _split(self._requests.recv(_BUFFER_BYTES)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", message, 16)[0], "conntrack dump")
                yield from self._ours(message)

    def _late(self) -> Iterator[Entry]:
        """What has been opened since the table was read."""
        with contextlib.suppress(OSError):  # at the end EAGAIN
            while True:
                for _, message in _split(self._news.recv(_BUFFER_BYTES)):
                    sender = struct.unpack_from("=I", message, 12)[0]
                    if sender != self._requests_id and self._address.packed in message:
                        self._requests.send(get_request(self._family, message))
                        for kind, now in _split(self._requests.recv(_BUFFER_BYTES)):
                            if kind not in (_DONE, _ERROR):
                                yield from self._ours(now)

    def _ours(self, message: bytes) -> Iterator[Entry]:
        if may_concern(message, self._address.packed):
            entry = read(self._family, message)
            if entry is None:
                return
            if entry.server[0] == self._address.packed and entry.masqueraded:
                yield entry
            elif entry.client[0] == self._address.packed and not entry.masqueraded:
                self._opened.pop(entry, None)  # what is known of it is the older state
                self._opened[entry] = None

    def _ask(self, message: bytes) -> int:
        """0, or the error number."""
        try:
            self._requests.send(message)
            for kind, answer in _split(self._requests.recv(_BUFFER_BYTES)):
                if kind == _ERROR:
                    return -int(struct.unpack_from("=i", answer, 16)[0])
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _hold(self, entries: dict[Entry, tuple[bytes, bytes]]) -> None:
        """Between an entry's end and its new beginning its packets must not make another one."""
        packed = {e.service[0] for e in entries} | {e.shown_as[0] for e in entries}
        if not packed:
            return
        ends = sorted(str(ipaddress.ip_address(one)) for one in packed)
        to = f"{self._ip} daddr {{ {', '.join(ends)} }}"
        self._nft.run(
            f"{self._chain()}"
            f"add rule inet {self._table} pre ct state new {to} "
            "tcp flags & (syn | ack) != syn drop\n"
            f"add rule inet {self._table} pre ct state new {to} meta l4proto udp drop\n"
        )
        self._guarded = True

    def _quiet(self) -> str:
        """Between the change of the source's route and that of the target's the two nodes send a
        packet to each other until its hop limit ends. Its sender repeats it; told of the end, it
        would give a connection up that it is opening (tcp_v6_err, SYN_SENT). The address is the
        destination of the packet that the message quotes (RFC 792, RFC 4443)."""
        four = self._address.version == 4
        kind, offset, bits = ("icmp", 8 + 16, 32) if four else ("icmpv6", 8 + 24, 128)
        return (
            f"add chain inet {self._table} out {{ type filter hook output priority 0; }}\n"
            f"add rule inet {self._table} out {kind} type time-exceeded "
            f"@th,{offset * 8},{bits} 0x{self._address.packed.hex()} drop\n"
        )

    def _chain(self) -> str:
        """After the connection table (-200), before destinations are translated (-100)."""
        return (
            f"{'' if self._guarded else removal(self._table)}add table inet {self._table}\n"
            f"add chain inet {self._table} pre "
            "{ type filter hook prerouting priority -150; }\n"
        )


def _entry(family: int, one: Outgoing) -> Entry:
    return Entry(
        family=family,
        protocol=one.protocol,
        client=one.client,
        service=one.service,
        server=one.server,
        shown_as=one.client,
        status=one.status & KEPT_STATUS,
        timeout_s=one.timeout_s,
        mark=0,
        tcp=one.tcp,
    )


def _messages(entry: Entry) -> tuple[bytes, bytes]:
    gone = deletion(entry.family, entry.protocol, entry.client, entry.service)
    return gone, re_creation(entry)


def _forget(layout: Layout) -> None:
    host = NetnsThread(layout.host_netns)
    try:
        nft = Nft(host)
        try:
            names = [line.split()[-1] for line in nft.run("list tables inet").splitlines()]
            nft.run(removal(*(name for name in names if name.startswith(f"{_TABLE}_"))))
        finally:
            nft.close()
    finally:
        host.close()


def _netlink() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    made.bind((0, 0))  # the kernel's events are not for sockets without an address
    made.settimeout(_DUMP_TIMEOUT_S)
    return made


def _subscribed() -> socket.socket:
    made = _netlink()
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    made.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _GROUP_NEW)
    return made


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(message type, message with its header) of one datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield kind, data[offset : offset + length]
        offset += (length + 3) & ~3
