"""One connection of the transfer stream: frames over a blocking (TLS) socket.

A connection is used in lockstep: the sender writes, and reads only after it
asked for an ACK; the receiver reads, and writes only that ACK (or its ERROR,
as its last act). So no two threads are ever inside one TLS object.
"""

from __future__ import annotations

import socket
import struct
import threading
from enum import Enum

from godwit_agent.transfer import frames
from godwit_agent.transfer.courtesy import Sample
from godwit_agent.transfer.frames import FrameError, Head, Hello, Prefix

_OUT_BUFFER = 1 << 20
_DIRECT_FROM = 128 * 1024

Buffer = bytes | bytearray | memoryview


def tune(sock: socket.socket) -> None:
    """No delay, and a dead peer is noticed within seconds."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)


class Urgency(Enum):
    """(IP_TOS, SO_PRIORITY) of a connection's packets.

    In the background: DSCP LE (RFC 8622) for the network, TC_PRIO_BULK for this node's own
    queue: ``pfifo_fast``, the kernel's default, then sends the pods' packets first.
    """

    ORDINARY = (0, 0)
    BACKGROUND = (0x04, 2)


_SO_MAX_PACING_RATE = 47  # asm-generic/socket.h; TCP paces itself then, whatever the queue is
_UNLIMITED = (1 << 64) - 1
# struct tcp_info (linux/tcp.h): tcpi_rtt, tcpi_bytes_acked, tcpi_min_rtt
_INFO = struct.Struct("=68xI48xQ20xI")


def pace(sock: socket.socket, bytes_per_s: int) -> None:
    """Spreads what is sent; 0: as fast as it goes."""
    rate = (bytes_per_s or _UNLIMITED).to_bytes(8, "little")
    sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate)


def mark(sock: socket.socket, urgency: Urgency) -> None:
    """How the packets are treated beside others."""
    service, priority = urgency.value
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, service)
    else:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, service)  # with a priority, hence first
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)


def sample(sock: socket.socket) -> Sample:
    """What the kernel knows of the way to the peer."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    rtt_us, acked, min_rtt_us = _INFO.unpack(info)
    return Sample(rtt_us, min_rtt_us, acked)


class FrameWriter:
    """Numbers frames and writes them, small ones together. Thread-safe.

    All its memory is touched when it is made: first use of a page costs
    microseconds that a freeze should not pay.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray(_OUT_BUFFER)
        self._view = memoryview(self._buffer)
        self._used = 0
        self._sequence = 0
        self._lock = threading.Lock()
        self.bytes_sent = 0

    def send(self, head: Head, body: Buffer = b"", *, flush: bool = False) -> int:
        """Queues or writes one frame; its sequence number."""
        length = len(body)
        with self._lock:
            self._sequence += 1
            start = frames.encode(head, self._sequence, length)
            if self._used + len(start) + length > _OUT_BUFFER:
                self._flush()
            self._put(start)
            if length >= _DIRECT_FROM:
                self._flush()
                self._sock.sendall(body)
                self.bytes_sent += length
            else:
                self._put(body)
            if flush:
                self._flush()
            return self._sequence

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def _put(self, data: Buffer) -> None:
        end = self._used + len(data)
        self._view[self._used : end] = data
        self._used = end

    def _flush(self) -> None:
        if self._used:
            used, self._used = self._used, 0
            self._sock.sendall(self._view[:used])
            self.bytes_sent += used


class FrameReader:
    """Reads frames; the body of the last one stays valid until the next ``read``."""

    def __init__(self, sock: socket.socket, *, max_body: int = frames.MAX_BODY) -> None:
        self._sock = sock
        self._prefix = bytearray(frames.PREFIX.size)
        self._head = bytearray(frames.MAX_HEAD)
        self._body = bytearray(max_body)
        self.sequence = 0

    def read(self) -> tuple[Head, memoryview] | None:
        """The next frame and its body; None when the peer closed between two frames."""
        view = memoryview(self._prefix)
        if not self._fill(view, may_end=True):
            return None
        prefix: Prefix = frames.decode_prefix(view, self.sequence + 1)
        if prefix.body_length > len(self._body):
            raise FrameError(f"{prefix.kind.name} is not expected in this direction")
        head_view = memoryview(self._head)[: prefix.head_length]
        self._fill(head_view)
        head = frames.decode_head(prefix, head_view)
        body = memoryview(self._body)[: prefix.body_length]
        self._fill(body)
        self.sequence = prefix.sequence
        if isinstance(head, Hello):
            head = frames.decode_hello_body(head, bytes(body))
        return head, body

    def _fill(self, view: memoryview, *, may_end: bool = False) -> bool:
        done = 0
        while done < len(view):
            count = self._sock.recv_into(view[done:])
            if not count:
                if may_end and not done:
                    return False
                raise FrameError("ended inside a frame")
            done += count
        return True
