"""One TLS connection of the source side, and what it says when it breaks."""

from __future__ import annotations

import socket
import ssl
import threading
import time

from godwit_agent.transfer import frames, wire
from godwit_agent.transfer.courtesy import Courtesy
from godwit_agent.transfer.frames import Ack, Failure, FrameError, Hello
from godwit_agent.transfer.wire import Buffer, FrameReader, FrameWriter, tune
from godwit_api.errors import Aborted, GodwitError, Retryable
from godwit_api.identity import node_dns_name
from godwit_api.reasons import Reason

CONNECT_TIMEOUT_S = 10.0
TIMEOUT_S = 60.0
_FINAL = frozenset(
    {
        Reason.AGENT_RESTARTED,
        Reason.WRONG_STEP,
        Reason.STALE_EPOCH,
        Reason.UNKNOWN_MIGRATION,
        Reason.WRONG_PEER,
        Reason.NOT_ENOUGH_MEMORY,
    }
)
"""What the target says the same about, however often it is asked."""
_OBSERVED_BYTES = 64 << 10


class Connection:
    """One TLS connection to the target."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._writer = FrameWriter(sock)
        self._reader = FrameReader(sock, max_body=frames.MAX_TEXT)
        self._sync_lock = threading.Lock()
        self._broken = False
        self._courtesy: Courtesy | None = None
        self._pace = 0

    def greet(self, hello: Hello) -> None:
        """First frame."""
        self.send(hello, frames.hello_body(hello.containers), flush=True)

    @property
    def bytes_sent(self) -> int:
        return self._writer.bytes_sent

    @property
    def usable(self) -> bool:
        return not self._broken

    def yield_to_others(self, limit: int) -> None:
        """From here on it is a copy in the background, of at most ``limit`` bytes/s (0: any)."""
        self._courtesy = Courtesy(limit)
        self._set(limit, wire.Urgency.BACKGROUND)

    def hurry(self) -> None:
        """From here on somebody waits for what is sent."""
        self._courtesy = None
        self._set(0, wire.Urgency.ORDINARY)

    def send(self, head: frames.Head, body: Buffer = b"", *, flush: bool = False) -> None:
        try:
            self._writer.send(head, body, flush=flush)
            if self._courtesy and len(body) >= _OBSERVED_BYTES:
                pace = self._courtesy.observe(time.monotonic(), wire.sample(self._sock))
                if pace != self._pace:
                    self._pace = pace
                    wire.pace(self._sock, pace)
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        try:
            self._writer.flush()
        except OSError as error:
            raise self._failed(error) from error

    def sync(self, number: int, timeout_s: float = TIMEOUT_S) -> None:
        """Returns when everything sent so far is in the target's store."""
        with self._sync_lock:
            try:
                sequence = self._writer.send(frames.RoundEnd(number), flush=True)
                self._sock.settimeout(timeout_s)
                frame = self._reader.read()
                self._sock.settimeout(TIMEOUT_S)
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

    def _set(self, pace: int, urgency: wire.Urgency) -> None:
        try:
            self._pace = pace
            wire.pace(self._sock, pace)
            wire.mark(self._sock, urgency)
        except OSError as error:
            raise self._failed(error) from error

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
        text = f"target: {bytes(body).decode(errors='replace')}"
        if failure.reason in _FINAL:
            return Aborted(failure.reason, text)
        return Retryable(failure.reason, text)


def dial(node: str, address: str, port: int, context: ssl.SSLContext) -> Connection:
    """To ``node``, whose certificate must say that name. Raises OSError."""
    plain = socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S)
    try:
        tune(plain)
        sock = context.wrap_socket(plain, server_hostname=node_dns_name(node))
    except BaseException:
        plain.close()
        raise
    sock.settimeout(TIMEOUT_S)
    return Connection(sock)
