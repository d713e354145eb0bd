"""Sender and receiver over real TLS on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fakes.authority import Authority
from godwit_agent.server.auth import node_of_certificate
from godwit_agent.transfer import frames, sender
from godwit_agent.transfer.connection import Connection
from godwit_agent.transfer.frames import FrameError
from godwit_agent.transfer.packing import Unpacker
from godwit_agent.transfer.receiver import TransferServer
from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable
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
        self, name: str = "node-a", *, expect: str = "node-b", streams: int = 1, pack: bool = False
    ) -> sender.Sender:
        identity = self.authority.node_store(self.directory / name, name)
        return self.dial(identity.transfer_context(server=False), expect, streams, pack=pack)

    def dial(
        self,
        context: ssl.SSLContext,
        expect: str = "node-b",
        streams: int = 1,
        *,
        pack: bool = False,
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
            pack=pack,
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


def _memory(got: list[tuple[object, ...]]) -> dict[int, bytes]:
    """What the store holds, by page."""
    found: dict[int, bytes] = {}
    for entry in got:
        if entry[0] == "pages":
            assert isinstance(entry[3], int)
            assert isinstance(entry[4], bytes)
            for at in range(0, len(entry[4]), frames.PAGE):
                found[entry[3] + at] = entry[4][at : at + frames.PAGE]
    return found


@pytest.mark.parametrize("streams", [1, 3])
def test_packed_pages_arrive_whole_and_cost_less(target: Target, streams: int) -> None:
    link = target.connect(streams=streams, pack=True)
    before = link.bytes_sent
    text = b"".join(number.to_bytes(8, "big") for number in range(3 << 17))  # 3 MiB
    noise = os.urandom(1 << 20)
    link.pages("app", 7, 0x100000, text)
    link.pages("app", 7, 0x10000000, noise)
    link.pages("app", 7, 0x20000000, bytes(range(256)) * 16)
    link.sync(5)
    assert _memory(target.store.got) == {
        start + at: data[at : at + frames.PAGE]
        for start, data in (
            (0x100000, text),
            (0x10000000, noise),
            (0x20000000, bytes(range(256)) * 16),
        )
        for at in range(0, len(data), frames.PAGE)
    }
    assert link.bytes_sent - before < len(noise) + len(text) // 2
    link.close()


def test_several_connections_carry_rounds_in_order(target: Target) -> None:
    link = target.connect(streams=3)
    for generation in range(5):
        link.pages("app", 7, 0x100000, bytes([generation]) * (4 << 20))
        link.sync(5)
        pages = [entry for entry in target.store.got if entry[0] == "pages"]
        assert set(_memory(pages).values()) == {bytes([generation]) * frames.PAGE}
    link.close()


def test_a_lane_that_breaks_is_told_by_the_next_call(target: Target) -> None:
    link = target.connect(streams=2)
    target.store.full = True

    def send() -> None:
        for _ in range(64):
            link.pages("app", 7, 0x100000, bytes(1 << 20))
        link.sync(5)

    with pytest.raises(GodwitError, match=r"No space left|transfer stream"):
        send()
    assert not link.usable
    link.close()


@pytest.mark.parametrize("case", ["no zstd", "longer", "shorter", "unsaid", "two", "bomb"])
def test_packed_pages_that_are_not_what_they_say_are_refused(case: str) -> None:
    page = bytes(frames.PAGE)
    small = zstandard.ZstdCompressor()
    body, length = {
        "no zstd": (b"x" * 100, frames.PAGE),
        "longer": (small.compress(page * 2), frames.PAGE),
        "shorter": (small.compress(page), 2 * frames.PAGE),
        "unsaid": (zstandard.ZstdCompressor(write_content_size=False).compress(page), frames.PAGE),
        "two": (small.compress(page) * 2, frames.PAGE),
        "bomb": (small.compress(bytes(64 << 20)), frames.PAGE),
    }[case]
    with pytest.raises(FrameError, match="packed pages"):
        Unpacker().unpack(memoryview(body), length)


@given(st.binary(max_size=512), st.integers(0, frames.MAX_BODY))
def test_random_packed_pages_never_crash(body: bytes, length: int) -> None:
    with contextlib.suppress(FrameError):
        Unpacker().unpack(memoryview(body), length)


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
    with pytest.raises(Aborted, match="No space left") as caught:
        link.sync(5)
    assert caught.value.reason is Reason.NOT_ENOUGH_MEMORY
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


def _treatment(sock: socket.socket) -> tuple[int, int, int]:
    """DSCP byte, priority in the node's own queue, bytes/s that the kernel paces it to."""
    rate = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 47, 8), "little")
    service = sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS)
    return service, sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY), rate


def test_a_copy_stands_back_until_somebody_waits_for_it() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sock,
    ):
        connection = Connection(sock)  # type: ignore[arg-type]
        connection.yield_to_others(50_000_000)
        assert _treatment(sock) == (0x04, 2, 50_000_000)
        connection.hurry()
        assert _treatment(sock) == (0, 0, 2**64 - 1)


def test_a_limit_holds_from_the_first_byte_and_ends(target: Target) -> None:
    link, piece = target.connect(), bytes(1 << 20)
    link.limit(20_000_000)
    times = []
    for _ in range(2):
        start = time.monotonic()
        for number in range(8):
            link.pages("app", 1, number << 20, piece)
        link.sync()
        times.append(time.monotonic() - start)
        link.hurry()
    link.close()
    assert times[0] > 0.3
    assert times[1] < times[0]
