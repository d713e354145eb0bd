"""Target side of the transfer stream: one thread accepts, one serves each connection."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from godwit_agent import log
from godwit_agent.transfer import frames
from godwit_agent.transfer.frames import FrameError, Hello
from godwit_agent.transfer.packing import Unpacker
from godwit_agent.transfer.wire import FrameReader, FrameWriter, tune
from godwit_api.errors import GodwitError, Rejected
from godwit_api.reasons import Reason

_HANDSHAKE_TIMEOUT_S = 10.0
_MAX_CONNECTIONS = 256


class Sink(Protocol):
    """Where the bytes of one migration go. Returns when they are there."""

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None: ...
    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None: ...
    def image(
        self, container: str, name: str, offset: int, total: int, data: memoryview
    ) -> None: ...
    def file(self, container: str, header: bytes, body: memoryview) -> None: ...
    def packet(self, at_ns: int, data: memoryview) -> None: ...


# (uid, epoch, container names, node of the caller's certificate) -> sink, or GodwitError
Admit = Callable[[str, int, tuple[str, ...], str], Sink]


class TransferServer:
    """Listens on one address; ``context`` is asked for each connection (certificates change)."""

    def __init__(
        self,
        address: str,
        port: int,
        *,
        context: Callable[[], ssl.SSLContext],
        node_of: Callable[[Mapping[str, object] | None], str],
        admit: Admit,
    ) -> None:
        self._context = context
        self._node_of = node_of
        self._admit = admit
        self._listener = socket.create_server((address, port), backlog=64)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stopped = False

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        threading.Thread(target=self._accept, name="transfer-accept", daemon=True).start()

    def stop(self) -> None:
        """Closes the listener and every connection."""
        self._stopped = True
        with self._lock:
            connections = list(self._open)
        for sock in (self._listener, *connections):
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                continue
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopped:
            try:
                plain, peer = self._listener.accept()
            except OSError:
                return
            with self._lock:
                full = len(self._open) >= _MAX_CONNECTIONS
            if full:
                log.warning("transfer connection refused: too many", peer=peer[0])
                plain.close()
                continue
            thread = threading.Thread(
                target=self._serve, args=(plain, peer[0]), name="transfer", daemon=True
            )
            thread.start()

    def _serve(self, plain: socket.socket, peer: str) -> None:
        sock = plain
        try:
            tune(plain)
            plain.settimeout(_HANDSHAKE_TIMEOUT_S)
            sock = self._context().wrap_socket(plain, server_side=True)
            with self._lock:
                self._open.add(sock)
            node = self._node_of(sock.getpeercert())
            receive(sock, node, self._admit)
        except (OSError, GodwitError) as error:
            if not self._stopped:
                log.warning("transfer connection ended", peer=peer, error=error)
        except Exception:
            log.exception("transfer connection failed unexpectedly", peer=peer)
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()


def receive(sock: socket.socket, node: str, admit: Admit) -> None:
    """Serves one connection until its peer closes it; tells the peer why it stops otherwise."""
    reader, writer, unpacker = FrameReader(sock), FrameWriter(sock), Unpacker()
    try:
        first = reader.read()
        if first is None:
            return
        hello = first[0]
        if not isinstance(hello, Hello):
            raise FrameError("HELLO was due")
        sink = admit(hello.uid, hello.epoch, hello.containers, node)
        sock.settimeout(None)
        while (frame := reader.read()) is not None:
            if _apply(sink, hello.containers, unpacker, *frame):
                writer.send(frames.Ack(reader.sequence), flush=True)
    except OSError as error:
        if isinstance(error, ConnectionError | ssl.SSLError | TimeoutError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = Reason.NOT_ENOUGH_MEMORY if full else Reason.TRANSFER_FAILED
        _tell(writer, Rejected(reason, f"the store cannot be written: {error}"))
        raise
    except GodwitError as error:
        _tell(writer, error)
        raise
    except Exception as error:
        _tell(writer, Rejected(Reason.INTERNAL, f"{type(error).__name__}: {error}"))
        raise


def _apply(
    sink: Sink,
    containers: tuple[str, ...],
    unpacker: Unpacker,
    head: frames.Head,
    body: memoryview,
) -> bool:
    """Puts one frame where it belongs; whether the sender waits for an ACK."""
    match head:
        case frames.Packed():
            pages = unpacker.unpack(body, head.length)
            sink.pages(_name(containers, head.container), head.vpid, head.vaddr, pages)
        case frames.Pages():
            sink.pages(_name(containers, head.container), head.vpid, head.vaddr, body)
        case frames.Zero():
            sink.zero(_name(containers, head.container), head.vpid, head.vaddr, head.length)
        case frames.Image():
            container = _name(containers, head.container)
            sink.image(container, head.name, head.offset, head.total, body)
        case frames.File():
            sink.file(_name(containers, head.container), head.header, body)
        case frames.Packet():
            sink.packet(head.at_ns, body)
        case frames.RoundEnd():
            return True
        case _:
            raise FrameError(f"{type(head).__name__} is not expected here")
    return False


def _name(containers: tuple[str, ...], index: int) -> str:
    if index >= len(containers):
        raise FrameError(f"container {index} of {len(containers)}")
    return containers[index]


def _tell(writer: FrameWriter, error: GodwitError) -> None:
    body = error.message.encode()[: frames.MAX_TEXT]
    try:
        writer.send(frames.Failure(error.reason), body, flush=True)
    except OSError:
        return
