"""Source side of the transfer stream."""

from __future__ import annotations

import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable

from godwit_agent.transfer import frames
from godwit_agent.transfer.frames import Ack, Failure, FrameError, Hello
from godwit_agent.transfer.wire import Buffer, FrameReader, FrameWriter, tune
from godwit_api.errors import GodwitError, Retryable
from godwit_api.identity import node_dns_name
from godwit_api.reasons import Reason

_CONNECT_TIMEOUT_S = 10.0
_DEFAULT_TIMEOUT_S = 60.0


class Connection:
    """One TLS connection to the target."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._writer = FrameWriter(sock)
        self._reader = FrameReader(sock, max_body=frames.MAX_TEXT)
        self._sync_lock = threading.Lock()
        self._broken = False

    def greet(self, hello: Hello) -> None:
        """First frame."""
        self.send(hello, frames.hello_body(hello.containers), flush=True)

    @property
    def bytes_sent(self) -> int:
        return self._writer.bytes_sent

    @property
    def usable(self) -> bool:
        return not self._broken

    def send(self, head: frames.Head, body: Buffer = b"", *, flush: bool = False) -> None:
        try:
            self._writer.send(head, body, flush=flush)
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        try:
            self._writer.flush()
        except OSError as error:
            raise self._failed(error) from error

    def sync(self, number: int, timeout_s: float = _DEFAULT_TIMEOUT_S) -> None:
        """Returns when everything sent so far is in the target's store."""
        with self._sync_lock:
            try:
                sequence = self._writer.send(frames.RoundEnd(number), flush=True)
                self._sock.settimeout(timeout_s)
                frame = self._reader.read()
                self._sock.settimeout(_DEFAULT_TIMEOUT_S)
            except (OSError, FrameError) as error:
                raise self._failed(error) from error
            match frame:
                case (Ack(sequence=acked), _) if acked == sequence:
                    return
                case (Failure() as failure, body):
                    raise self._told(failure, body)
            raise self._failed(FrameError("an ACK was due"))

    def close(self) -> None:
        """Lets the receiver see a clean end."""
        self._broken = True
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        finally:
            self._sock.close()

    def abort(self) -> None:
        """From any thread: everything that blocks on this connection fails now."""
        self._broken = True
        try:
            # the plain socket's shutdown: an SSLSocket's would drop its TLS object under a reader
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            return

    def _failed(self, error: Exception) -> GodwitError:
        already, self._broken = self._broken, True
        if not already and isinstance(error, OSError):
            told = self._last_words()
            if told:
                return told
        return Retryable(Reason.TRANSFER_FAILED, f"transfer stream: {error}")

    def _last_words(self) -> GodwitError | None:
        """An ERROR that the receiver sent before it closed."""
        try:
            self._sock.settimeout(1.0)
            frame = self._reader.read()
        except (OSError, FrameError, ValueError):
            return None
        if frame and isinstance(frame[0], Failure):
            return self._told(frame[0], frame[1])
        return None

    def _told(self, failure: Failure, body: memoryview) -> GodwitError:
        self._broken = True
        text = bytes(body).decode(errors="replace")
        return Retryable(failure.reason, f"target: {text}")


class Sender:
    """All connections of one migration: the first carries control, every one carries pages.

    Pages of one round may go over any connection; ``sync`` between the rounds
    keeps an older copy of a page from overtaking a newer one.
    """

    def __init__(self, connections: list[Connection], containers: tuple[str, ...]) -> None:
        self._connections = connections
        self._control = connections[0]
        self._next = itertools.cycle(connections)
        self._index = {name: index for index, name in enumerate(containers)}
        self._rounds = itertools.count(1)
        self._limiter: Callable[[int], None] | None = None

    @property
    def bytes_sent(self) -> int:
        return sum(connection.bytes_sent for connection in self._connections)

    @property
    def usable(self) -> bool:
        return all(connection.usable for connection in self._connections)

    def limit(self, bytes_per_s: int) -> None:
        """Upper limit of the sending rate; 0 for none."""
        self._limiter = RateLimit(bytes_per_s).spend if bytes_per_s else None

    def pages(self, container: str, vpid: int, vaddr: int, data: Buffer) -> None:
        """Whole pages, at most ``frames.MAX_BODY`` per frame; the buffer may be reused after."""
        view = memoryview(data)
        for start in range(0, len(view), frames.MAX_BODY):
            part = view[start : start + frames.MAX_BODY]
            head = frames.Pages(self._index[container], vpid, vaddr + start)
            next(self._next).send(head, part)
            self._spend(len(part))

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        next(self._next).send(frames.Zero(self._index[container], vpid, vaddr, length))

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
        for connection in self._connections:
            connection.flush()

    def sync(self, timeout_s: float = _DEFAULT_TIMEOUT_S) -> None:
        """Returns when everything sent so far is in the target's store."""
        number = next(self._rounds)
        for connection in self._connections:
            connection.sync(number, timeout_s)

    def close(self) -> None:
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
) -> Sender:
    """Opens the stream to ``node``, whose certificate must say that name."""
    connections: list[Connection] = []
    try:
        for stream in range(streams):
            sock = _dial(node, address, port, context)
            connections.append(Connection(sock))
            connections[-1].greet(Hello(uid, epoch, stream, streams, containers))
        sender = Sender(connections, containers)
        sender.sync(_CONNECT_TIMEOUT_S)
    except (OSError, GodwitError) as error:
        for connection in connections:
            connection.close()
        if isinstance(error, GodwitError):
            raise
        message = f"{node} at {address}:{port}: {error}"
        raise Retryable(Reason.TRANSFER_FAILED, message) from error
    return sender


def _dial(node: str, address: str, port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT_S)
    try:
        tune(plain)
        sock = context.wrap_socket(plain, server_hostname=node_dns_name(node))
    except BaseException:
        plain.close()
        raise
    sock.settimeout(_DEFAULT_TIMEOUT_S)
    return sock


class RateLimit:
    """Token bucket; sleeps in the sending thread. Holds a tenth of a second."""

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
