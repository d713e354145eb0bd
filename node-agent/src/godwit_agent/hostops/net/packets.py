"""Packets that reach a pod in the freeze: captured at the host's end of its link, injected later.

AF_PACKET with PACKET_VNET_HDR on both sockets, so that partial checksums and
packets larger than the MTU (GSO) pass unchanged; only the MACs are rewritten.
The kernel's own time stamps decide what came when. See packet(7).
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable

from godwit_agent.hostops.model import Packet
from godwit_agent.hostops.net import udpframes

_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_SO_RCVBUFFORCE = 33
_SO_TIMESTAMPNS = 35
# ETH_P_IP would miss what the host sends (only ETH_P_ALL taps see outgoing frames).
_ETH_P_ALL = 3
_PACKET_OUTGOING = 4
_BUFFER_BYTES = 64 << 20
_VNET_BYTES = 10
_IP_TYPES = (b"\x08\x00", b"\x86\xdd")
_MAX_FRAME = 70_000
_TIMESPEC = struct.Struct("@qq")
_KEEP_BYTES = 256 << 20
_WINDOW_NS = 500_000_000


class Capture:
    """Records every IP frame that the host sends to the pod until it is closed."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.bind((interface, _ETH_P_ALL))
        self._frames: deque[Packet] = deque()
        self._bytes = 0
        self._held_from_ns: int | None = None
        self._lock = threading.Lock()
        self._wake, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._wake.fileno() in ready:
                return
            with contextlib.suppress(OSError):
                while self._take():
                    pass

    def _take(self) -> bool:
        # Locked from the socket to the list: what one thread has in hand the other cannot miss.
        with self._lock:
            try:
                data, control, _, address = self._socket.recvmsg(
                    _MAX_FRAME, 64, socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return False
            if address[2] != _PACKET_OUTGOING or data[22:24] not in _IP_TYPES:
                return True
            stamp = time.time_ns()
            for level, kind, value in control:
                if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                    seconds, nanoseconds = _TIMESPEC.unpack(value[: _TIMESPEC.size])
                    stamp = seconds * 1_000_000_000 + nanoseconds
            self._keep(Packet(at_ns=stamp, data=data))
        return True

    def _keep(self, packet: Packet) -> None:
        self._frames.append(packet)
        self._bytes += len(packet.data)
        oldest = self._held_from_ns or packet.at_ns - _WINDOW_NS
        while self._frames and (self._frames[0].at_ns < oldest or self._bytes > _KEEP_BYTES):
            self._bytes -= len(self._frames.popleft().data)

    def hold_from(self, at_ns: int) -> None:
        """From now on keep everything since ``at_ns``; before, only the last moments are kept."""
        with self._lock:
            self._held_from_ns = at_ns

    def frames(self) -> list[Packet]:
        """What has been captured so far, in the kernel's order."""
        with contextlib.suppress(OSError):
            while self._take():
                pass
        with self._lock:
            return list(self._frames)

    def close(self) -> None:
        """Stop capturing."""
        with contextlib.suppress(OSError):
            self._end.send(b"x")
        self._thread.join(5)
        for sock in (self._socket, self._wake, self._end):
            sock.close()


class Injector:
    """Sends frames out of the host's end of a link, into the pod."""

    def __init__(self, interface: str, pod_mac: str, host_mac: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self._socket.bind((interface, 0))
        self._macs = bytes.fromhex(pod_mac.replace(":", "") + host_mac.replace(":", ""))

    def send(self, packets: Iterable[Packet]) -> int:
        """Send in the given order; a frame the link refuses is dropped as a network would."""
        sent = 0
        for packet in packets:
            frame = packet.data
            with contextlib.suppress(OSError):
                self._socket.send(frame[:_VNET_BYTES] + self._macs + frame[_VNET_BYTES + 12 :])
                sent += 1
        return sent

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def send_inside(packets: Iterable[Packet]) -> None:
    """In the namespace of the caller, by its loopback interface. See raw(7), ipv6(7)."""
    with contextlib.ExitStack() as stack:
        out: dict[int, socket.socket] = {}
        for packet in packets:
            to = udpframes.destination(packet.data)
            family = socket.AF_INET if to.version == 4 else socket.AF_INET6
            with contextlib.suppress(OSError):
                if family not in out:  # IPPROTO_RAW: the header is ours
                    made = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
                    out[family] = stack.enter_context(made)
                out[family].sendto(packet.data[udpframes.START :], (str(to), 0))


def is_handshake(frame: bytes) -> bool:
    """Whether a frame is a TCP SYN without ACK (the first packet of a connection)."""
    start = _segment(frame)
    return start is not None and len(frame) > start + 13 and frame[start + 13] & 0x12 == 0x02


def is_tcp(frame: bytes) -> bool:
    """Whether a frame is a TCP segment."""
    return _segment(frame) is not None


def _segment(frame: bytes) -> int | None:
    """Where the TCP header begins; None for whatever is not TCP, or behind IPv6 extensions."""
    start = _VNET_BYTES + 14
    kind = frame[22:24]
    if kind == b"\x08\x00" and len(frame) > start + 20:
        protocol, header = frame[start + 9], (frame[start] & 15) * 4
    elif kind == b"\x86\xdd" and len(frame) > start + 40:
        protocol, header = frame[start + 6], 40
    else:
        return None
    return start + header if protocol == socket.IPPROTO_TCP else None
