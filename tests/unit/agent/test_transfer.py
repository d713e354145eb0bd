"""Sender and receiver over real TLS on loopback."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fakes.authority import Authority
from godwit_agent.server.auth import node_of_certificate
from godwit_agent.transfer import frames, sender
from godwit_agent.transfer.receiver import TransferServer
from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.identity import OPERATOR_DNS_NAME
from godwit_api.reasons import Reason

UID = "01234567-89ab-cdef-0123-456789abcdef"


@dataclass
class Store:
    """Remembers what arrived."""

    got: list[tuple[object, ...]] = field(default_factory=list)
    full: bool = False

    def pages(self, container: str, vpid: int, vaddr: int, data: memoryview) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.got.append(("pages", container, vpid, vaddr, bytes(data)))

    def zero(self, container: str, vpid: int, vaddr: int, length: int) -> None:
        self.got.append(("zero", container, vpid, vaddr, length))

    def image(self, container: str, name: str, offset: int, total: int, data: memoryview) -> None:
        self.got.append(("image", container, name, offset, total, len(data)))

    def file(self, container: str, header: bytes, body: memoryview) -> None:
        self.got.append(("file", container, header, bytes(body)))

    def packet(self, at_ns: int, data: memoryview) -> None:
        self.got.append(("packet", at_ns, bytes(data)))


@dataclass
class Target:
    authority: Authority
    directory: Path
    store: Store = field(default_factory=Store)
    calls: list[tuple[str, int, tuple[str, ...], str]] = field(default_factory=list)

    def admit(self, uid: str, epoch: int, containers: tuple[str, ...], node: str) -> Store:
        self.calls.append((uid, epoch, containers, node))
        if node != "node-a":
            raise Rejected(Reason.WRONG_PEER, f"{node} is not the source")
        return self.store

    def __post_init__(self) -> None:
        identity = self.authority.node_store(self.directory / "target", "node-b")
        self.server = TransferServer(
            "127.0.0.1",
            0,
            context=lambda: identity.transfer_context(server=True),
            node_of=node_of_certificate,
            admit=self.admit,
        )
        self.server.start()

    def connect(
        self, name: str = "node-a", *, expect: str = "node-b", streams: int = 1
    ) -> sender.Sender:
        identity = self.authority.node_store(self.directory / name, name)
        return self.dial(identity.transfer_context(server=False), expect, streams)

    def dial(
        self, context: ssl.SSLContext, expect: str = "node-b", streams: int = 1
    ) -> sender.Sender:
        return sender.connect(
            node=expect,
            address="127.0.0.1",
            port=self.server.port,
            context=context,
            uid=UID,
            epoch=3,
            containers=("app", "side"),
            streams=streams,
        )


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    target = Target(Authority(), tmp_path)
    yield target
    target.server.stop()


def test_an_ack_says_that_everything_is_in_the_store(target: Target) -> None:
    link = target.connect()
    big = bytes(range(256)) * 16 * 1025  # more than one frame
    link.pages("app", 7, 0x10000, big)
    link.zero("side", 8, 0x2000, 4096)
    link.image("app", "core-1.img", b"i" * 10)
    link.image("side", "empty.img", b"")
    link.file("app", b"header", b"content")
    link.packet(5, b"frame")
    link.sync(5)
    got = target.store.got
    pages = [entry for entry in got if entry[0] == "pages"]
    assert [entry[3] for entry in pages] == [0x10000, 0x10000 + frames.MAX_BODY]
    assert b"".join(entry[4] for entry in pages) == big  # type: ignore[misc]
    assert got[len(pages) :] == [
        ("zero", "side", 8, 0x2000, 4096),
        ("image", "app", "core-1.img", 0, 10, 10),
        ("image", "side", "empty.img", 0, 0, 0),
        ("file", "app", b"header", b"content"),
        ("packet", 5, b"frame"),
    ]
    assert target.calls == [(UID, 3, ("app", "side"), "node-a")]
    assert link.bytes_sent > len(big)
    link.close()


def test_several_streams_are_one_barrier(target: Target) -> None:
    link = target.connect(streams=3)
    for page in range(30):
        link.pages("app", 1, page * 4096, bytes(4096))
    link.sync(5)
    assert len(target.store.got) == 30
    link.close()


def test_another_node_is_refused_and_told_why(target: Target) -> None:
    with pytest.raises(GodwitError) as caught:
        target.connect("node-c")
    assert caught.value.reason is Reason.WRONG_PEER


def test_the_target_must_be_the_named_node(target: Target) -> None:
    with pytest.raises(Retryable, match="certificate"):
        target.connect(expect="node-x")


def test_the_operator_has_no_business_on_the_stream(target: Target, tmp_path: Path) -> None:
    identity = target.authority.store(tmp_path / "op", OPERATOR_DNS_NAME)
    with pytest.raises(GodwitError):
        target.dial(identity.transfer_context(server=False))
    assert target.calls == []


def test_another_authority_is_refused(target: Target, tmp_path: Path) -> None:
    context = Authority().node_store(tmp_path / "alien", "node-a").transfer_context(server=False)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with pytest.raises(GodwitError):
        target.dial(context)
    assert target.calls == []


def test_plain_tcp_gets_nowhere(target: Target) -> None:
    with socket.create_connection(("127.0.0.1", target.server.port), timeout=5) as sock:
        hello = frames.Hello(UID, 1, 0, 1, ("app",))
        sock.sendall(frames.encode(hello, 1, 3) + b"app")
        sock.settimeout(5)
        with contextlib.suppress(OSError):
            while sock.recv(100):
                pass
    assert target.calls == []


def test_a_full_store_is_reported(target: Target) -> None:
    target.store.full = True
    link = target.connect()
    link.pages("app", 1, 4096, bytes(4096))
    with pytest.raises(Retryable, match="No space left") as caught:
        link.sync(5)
    assert caught.value.reason is Reason.TRANSFER_FAILED
    assert not link.usable
    link.close()


def test_abort_wakes_a_sender_that_waits(target: Target) -> None:
    link = target.connect()
    target.store.pages = lambda *_: threading.Event().wait(1)  # type: ignore[assignment,method-assign]
    link.pages("app", 1, 4096, bytes(4096))
    threading.Timer(0.1, link.abort).start()
    with pytest.raises(Retryable):
        link.sync(30)
    link.close()


def test_rate_limit() -> None:
    limit = sender.RateLimit(1_000_000)
    start = time.monotonic()
    for _ in range(30):
        limit.spend(10_000)
    assert 0.15 < time.monotonic() - start < 1.0
