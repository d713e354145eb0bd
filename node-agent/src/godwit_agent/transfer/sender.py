"""Source side of the transfer stream."""

from __future__ import annotations

import itertools
import ssl
import threading
import time
from collections.abc import Callable

from godwit_agent.transfer import frames
from godwit_agent.transfer.connection import CONNECT_TIMEOUT_S, TIMEOUT_S, Connection, dial
from godwit_agent.transfer.frames import Hello
from godwit_agent.transfer.lanes import PIECE_BYTES, Lanes, carry
from godwit_agent.transfer.packing import Packer
from godwit_agent.transfer.wire import Buffer
from godwit_api.errors import GodwitError, Retryable
from godwit_api.reasons import Reason

# Less is done before a lane would have been woken.
_LANE_BYTES = 64 << 10


class Sender:
    """All connections of one migration: the first carries control, every one carries pages.

    Pages of one round may go over any connection; ``sync`` between the rounds
    keeps an older copy of a page from overtaking a newer one.
    """

    def __init__(
        self, connections: list[Connection], containers: tuple[str, ...], *, pack: bool = False
    ) -> None:
        self._connections = connections
        self._control = connections[0]
        self._packer = Packer() if pack else None
        self._lanes: Lanes | None = None
        if pack or len(connections) > 1:
            self._lanes = Lanes(connections, pack=pack, carried=self._spend)
        self._index = {name: index for index, name in enumerate(containers)}
        self._rounds = itertools.count(1)
        self._limiter: Callable[[int], None] | None = None

    @property
    def takes_shared(self) -> bool:
        return True

    @property
    def bytes_sent(self) -> int:
        return sum(connection.bytes_sent for connection in self._connections)

    @property
    def usable(self) -> bool:
        return all(connection.usable for connection in self._connections)

    def limit(self, bytes_per_s: int) -> None:
        """A copy in the background from here on, with an upper limit of its rate; 0 for none."""
        self._limiter = RateLimit(bytes_per_s).spend if bytes_per_s else None
        for connection in self._connections:
            connection.yield_to_others(bytes_per_s)

    def hurry(self) -> None:
        """No limit from here on, and nobody goes first."""
        self._limiter = None
        for connection in self._connections:
            connection.hurry()

    def pages(self, container: str, vpid: int, vaddr: int, data: Buffer) -> None:
        """Whole pages, at most ``frames.MAX_BODY`` per frame; the buffer may be reused after."""
        view, index = memoryview(data), self._index[container]
        step = PIECE_BYTES if self._lanes else frames.MAX_BODY
        for start in range(0, len(view), step):
            part, head = view[start : start + step], frames.Pages(index, vpid, vaddr + start)
            if self._lanes and len(part) >= _LANE_BYTES:
                self._lanes.put(head, part)
            else:
                self._spend(carry(self._control, self._packer, head, part))

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        self._control.send(frames.Zero(self._index[container], vpid, vaddr, length))

    def image(self, container: str, name: str, content: Buffer) -> None:
        """One whole image file."""
        view, total = memoryview(content), len(content)
        for start in range(0, max(total, 1), frames.MAX_BODY):
            part = view[start : start + frames.MAX_BODY]
            self._control.send(frames.Image(self._index[container], start, total, name), part)

    def file(self, container: str, header: bytes, body: Buffer) -> None:
        """One record of the file copy."""
        self._control.send(frames.File(self._index[container], header), body)
        self._spend(len(body))

    def packet(self, at_ns: int, data: Buffer) -> None:
        self._control.send(frames.Packet(at_ns), data)

    def flush(self) -> None:
        if self._lanes:
            self._lanes.settle()
        for connection in self._connections:
            connection.flush()

    def sync(self, timeout_s: float = TIMEOUT_S) -> None:
        """Returns when everything sent so far is in the target's store."""
        number = next(self._rounds)
        if self._lanes:
            self._lanes.settle()
        for connection in self._connections:
            connection.sync(number, timeout_s)

    def close(self) -> None:
        lanes, self._lanes = self._lanes, None
        if lanes:
            if not lanes.idle:
                self.abort()
            lanes.stop()
        for connection in self._connections:
            connection.close()

    def abort(self) -> None:
        for connection in self._connections:
            connection.abort()

    def _spend(self, count: int) -> None:
        if self._limiter:
            self._limiter(count)


def connect(
    *,
    node: str,
    address: str,
    port: int,
    context: ssl.SSLContext,
    uid: str,
    epoch: int,
    containers: tuple[str, ...],
    streams: int = 1,
    pack: bool = False,
) -> Sender:
    """Opens ``streams`` connections to ``node``; ``pack``: pages are compressed."""
    connections: list[Connection] = []
    try:
        for stream in range(streams):
            connections.append(dial(node, address, port, context))
            connections[-1].greet(Hello(uid, epoch, stream, streams, containers))
        sender = Sender(connections, containers, pack=pack)
        sender.sync(CONNECT_TIMEOUT_S)
    except (OSError, GodwitError) as error:
        for connection in connections:
            connection.close()
        if isinstance(error, GodwitError):
            raise
        message = f"{node} at {address}:{port}: {error}"
        raise Retryable(Reason.TRANSFER_FAILED, message) from error
    return sender


class RateLimit:
    """Token bucket over all connections; sleeps in the sending thread. Each connection is paced
    by the kernel besides, as what the bucket holds would stand in the link's queue at once."""

    def __init__(self, bytes_per_s: int) -> None:
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def spend(self, count: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.1) + count / self._rate
            wait = self._free_at - now
        if wait > 0:
            time.sleep(wait)
