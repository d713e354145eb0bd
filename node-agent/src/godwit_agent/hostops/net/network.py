"""One pod's network during a switch: hold, drop, capture, inject, open and close the door."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from godwit_agent.hostops.layout import Layout
from godwit_agent.hostops.model import Moment, Packet
from godwit_agent.hostops.net import udpframes
from godwit_agent.hostops.net.netns import NetnsThread
from godwit_agent.hostops.net.nft import CRIU_MARK, Nft, removal
from godwit_agent.hostops.net.packets import (
    Capture,
    Injector,
    is_handshake,
    is_tcp,
    send_inside,
)
from godwit_api.errors import Retryable
from godwit_api.reasons import Reason

DOOR_TABLE = "godwit_door"  # the hook's CNI plugin makes it
FREEZE_TABLE = "godwit_freeze"
HANDSHAKE_TABLE = "godwit_handshake"


# The kernel's answers to whoever asks for the pod's link address. ARP is in no such table; without
# these a router would hear nothing for the time of the freeze, and ask again only a second later.
_NEIGHBOURS = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }"

# Where two interfaces have one address, only one may answer for it: arp_ignore
# (Documentation/networking/ip-sysctl.rst) of 8 answers for none. Neighbour discovery is in the
# tables.
_SILENT, _ANSWERING = "8", "0"


def _closed(table: str, priority: int, *pass_too: str) -> str:
    chains = "".join(
        f"add chain inet {table} {hook} {{ type filter hook {hook} priority {priority}; "
        f"policy drop; }}\n"
        f"add rule inet {table} {hook} meta mark {CRIU_MARK:#x} accept\n"
        f'add rule inet {table} {hook} {side} "lo" accept\n'
        + "".join(f"add rule inet {table} {hook} {what} accept\n" for what in pass_too)
        for hook, side in (("input", "iifname"), ("output", "oifname"))
    )
    return f"add table inet {table}\n{chains}"


_CLOSE_DOOR = _closed(DOOR_TABLE, -300)
_DROP_ALL = _closed(FREEZE_TABLE, -310, _NEIGHBOURS)
_DROP_ALL_IN_SILENCE = _closed(FREEZE_TABLE, -310)
_HOLD_HANDSHAKES = (
    f"add table inet {HANDSHAKE_TABLE}\n"
    f"add chain inet {HANDSHAKE_TABLE} input "
    "{ type filter hook input priority -320; policy accept; }\n"
    f'add rule inet {HANDSHAKE_TABLE} input iifname != "lo" '
    "tcp flags & (syn | ack) == syn drop\n"
)


class HostPodNetwork:
    """The real ``PodNetwork``."""

    def __init__(
        self,
        thread: NetnsThread,
        interface: str,
        host_interface: str,
        pod_mac: str,
        host_mac: str,
        *,
        host_netns: str | None,
    ) -> None:
        self._thread = thread
        self._answers = Path(f"/proc/sys/net/ipv4/conf/{interface}/arp_ignore")
        self._nft = Nft(thread)
        host = NetnsThread(host_netns)
        self._capture = host.call(lambda: Capture(host_interface))
        self._injector = host.call(lambda: Injector(host_interface, pod_mac, host_mac))
        host.close()
        self._held_from_ns: int | None = None
        # The first transaction of a context loads modules and reads the rule set.
        self._nft.run(removal(HANDSHAKE_TABLE, FREEZE_TABLE))

    def hold_syns(self) -> int:
        before = self._held_from_ns = time.time_ns()
        self._capture.hold_from(before)
        self._nft.run(removal(HANDSHAKE_TABLE) + _HOLD_HANDSHAKES)
        return before

    def drop(self) -> Moment:
        self._capture.hold_from(self._held_from_ns or time.time_ns())
        return self._change(removal(FREEZE_TABLE) + _DROP_ALL)

    def lift(self) -> Moment:
        return self._change(removal(HANDSHAKE_TABLE, FREEZE_TABLE))

    def open_door(self) -> Moment:
        opened = self._change(removal(DOOR_TABLE))
        self._arp(_ANSWERING)
        return opened

    def _change(self, rules: str) -> Moment:
        before_ns = time.time_ns()
        self._nft.run(rules)
        return Moment(before_ns, time.time_ns())

    def close_door(self) -> None:
        self._arp(_SILENT)
        self._nft.run(removal(DOOR_TABLE) + _CLOSE_DOOR)

    def fall_silent(self) -> None:
        self._arp(_SILENT)
        self._nft.run(removal(FREEZE_TABLE) + _DROP_ALL_IN_SILENCE)

    def _arp(self, value: str) -> None:
        # /proc/sys/net shows the network namespace of the thread that opens it
        self._thread.call(lambda: self._answers.write_text(value))

    def held(
        self, *, syn_since_ns: int, since: Moment, until: Moment | None = None
    ) -> tuple[Packet, ...]:
        def wanted(packet: Packet) -> bool:
            at_ns, data = packet.at_ns, packet.data
            if until and at_ns >= until.before_ns and (at_ns >= until.after_ns or not is_tcp(data)):
                return False
            if at_ns >= since.after_ns or (at_ns >= since.before_ns and is_tcp(data)):
                return True
            return at_ns >= syn_since_ns and is_handshake(data)

        return tuple(filter(wanted, self._capture.frames()))

    def inject(self, packets: Iterable[Packet], own: Iterable[str] = ()) -> int:
        addresses = tuple(own)
        outside: list[Packet] = []
        inside: list[Packet] = []
        for packet in packets:
            stays = udpframes.stays_inside(packet.data, addresses)
            (inside if stays else outside).append(packet)
        if inside:
            self._thread.call(lambda: send_inside(inside))
        return self._injector.send(outside) + len(inside)

    def close(self) -> None:
        self._capture.close()
        self._injector.close()
        self._nft.close()
        self._thread.close()


class HostNetworks:
    """The real ``Networks``."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def _enter(self, netns: str) -> NetnsThread:
        # /var/run is a symbolic link to /run on every distribution; an absolute link must not be
        # followed from the host's root into our own.
        if netns.startswith("/var/run/"):
            netns = "/run/" + netns.removeprefix("/var/run/")
        return NetnsThread(netns if netns.startswith("/proc/") else str(self._layout.local(netns)))

    def open(
        self, netns: str, interface: str, host_interface: str, pod_mac: str, host_mac: str
    ) -> HostPodNetwork:
        thread = self._enter(netns)
        try:
            return HostPodNetwork(
                thread,
                interface,
                host_interface,
                pod_mac,
                host_mac,
                host_netns=self._layout.host_netns,
            )
        except OSError as error:
            thread.close()
            raise Retryable(
                Reason.INTERNAL, f"interface {host_interface} of {netns}: {error}"
            ) from error

    def reset(self, netns: str) -> None:
        thread = self._enter(netns)
        try:
            nft = Nft(thread)
            nft.run(removal(HANDSHAKE_TABLE, FREEZE_TABLE))
            nft.close()
        finally:
            thread.close()
