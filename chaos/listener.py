"""Hears the numbers that a moving process tells, and from which node each one comes.

Run as ``python3 -m chaos.listener PORT`` in the place outside the cluster. The process sends one
number after the other in datagrams; the frame that brings one carries the link address of the
node that sent it, which no process can know or forge. Prints JSON lines: ``move`` when another
node speaks, ``wrong`` for what two copies would do, ``tick`` once a second.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field

_ETH_P_IP = 0x0800
_INCOMING = (0, 3)  # PACKET_HOST, PACKET_OTHERHOST
_REMEMBERED = 50_000
_PACKET_STATISTICS = 6


@dataclass
class Numbers:
    """What is wrong with a series of (number, node)."""

    highest: int = 0
    node: str = ""
    heard: int = 0
    late: int = 0
    """Numbers that came after a higher one of the same node: the network may do that."""
    _recent: set[int] = field(default_factory=set)
    _order: deque[int] = field(default_factory=deque)

    def take(self, number: int, node: str) -> str:
        """Empty, or why two copies must have been running, or one began anew."""
        self.heard += 1
        wrong = ""
        if number in self._recent:
            wrong = f"number {number} came twice, now from {node}"
        elif number < self.highest:
            self.late += 1
            if node != self.node:
                wrong = f"number {number} from {node} came after {self.highest} from {self.node}"
            elif number < self.highest - _REMEMBERED:
                wrong = f"number {number} from {node} came after {self.highest}: it began anew"
        self._recent.add(number)
        self._order.append(number)
        if len(self._order) > _REMEMBERED:
            self._recent.discard(self._order.popleft())
        if number > self.highest:
            self.highest, self.node = number, node
        return wrong


def datagram(packet: bytes, port: int) -> int | None:
    """The number in an IPv4 packet to this UDP port; None for any other packet."""
    header = (packet[0] & 0xF) * 4
    if len(packet) < header + 8 or packet[9] != socket.IPPROTO_UDP:
        return None
    _, to, length = struct.unpack_from("!HHH", packet, header)
    text = packet[header + 8 : header + length]
    return int(text) if to == port and text.isdigit() else None


def say(kind: str, **fields: object) -> None:
    """One line."""
    print(json.dumps({"type": kind, "at": time.time(), **fields}), flush=True)


def _end_with_input(ears: socket.socket) -> None:
    sys.stdin.read()
    ears.close()


def main() -> None:
    """Until standard input ends."""
    port = int(sys.argv[1])
    sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # so that nobody answers "refused"
    sink.bind(("0.0.0.0", port))
    ears = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_IP))
    ears.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
    ears.bind(("br0", _ETH_P_IP))
    ears.settimeout(0.5)
    threading.Thread(target=_end_with_input, args=(ears,), daemon=True).start()
    numbers, next_tick, lost = Numbers(), 0.0, 0
    say("tick", heard=0)
    while True:
        try:
            packet, origin = ears.recvfrom(2048)
        except TimeoutError:
            packet = b""
        except OSError:
            return
        number = datagram(packet, port) if packet and origin[2] in _INCOMING else None
        if number is not None:
            node = origin[4].hex(":")
            if node != numbers.node:
                say("move", node=node, number=number)
            if wrong := numbers.take(number, node):
                say("wrong", what=wrong)
        if time.monotonic() > next_tick:
            next_tick = time.monotonic() + 1
            lost += struct.unpack("II", ears.getsockopt(263, _PACKET_STATISTICS, 8))[1]
            say("tick", heard=numbers.heard, highest=numbers.highest, late=numbers.late, lost=lost)


if __name__ == "__main__":
    main()
