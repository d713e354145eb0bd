"""Messages and datagrams: none is lost or doubled by a move, those of the freeze come after it."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.moving import CLIENTS, client, report, start, there_and_back
from e2e.support import Scene

pytestmark = pytest.mark.support


def test_nats_delivers_every_message_once_and_in_order(scene: Scene) -> None:
    address = start(scene, "servers", 4222, "nats-server", "-a", "0.0.0.0")
    using = client(scene, str(CLIENTS / "pubsub.py"), address, "4222")
    moves = there_and_back(scene)
    seen = report(using)
    assert seen["error"] is None, seen
    assert seen["delivered"] == 8 * seen["published"]
    scene.record("NATS, 4 publishers and 8 subscribers", moves, seen["worst_ms"])


def answered_after_the_freeze(seen: dict[str, Any], moves: list[dict[str, Any]]) -> None:
    """One datagram every 3 ms: those of the freeze have waited for its end.

    What a socket had received and the process had not read is not in CRIU's images: one
    datagram a move may be lost so, as docs/support.md says.
    """
    assert seen["wrong"] == seen["again"] == 0, seen
    assert len(seen["lost"]) <= len(moves), seen
    frozen = sum(move["freezeMilliseconds"] for move in moves)
    assert len(seen["waits_ms"]) > frozen / 3 / 2, seen


def test_udp_echo_answers_what_came_in_the_freeze(scene: Scene) -> None:
    address = start(scene, "servers", None, "python3", "/lab/echo.py")
    using = client(scene, str(CLIENTS / "datagrams.py"), "echo", address, "7000")
    moves = there_and_back(scene)
    seen = report(using)
    answered_after_the_freeze(seen, moves)
    scene.record("UDP echo, a datagram every 3 ms", moves, seen["worst_ms"])


def test_dns_server_answers_what_came_in_the_freeze(scene: Scene) -> None:
    address = start(
        scene, "servers", 53, "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts",
        "--user=root", "--address=/godwit.test/192.0.2.7",
    )  # fmt: skip
    using = client(scene, str(CLIENTS / "datagrams.py"), "dns", address, "53")
    moves = there_and_back(scene)
    seen = report(using)
    answered_after_the_freeze(seen, moves)
    scene.record("dnsmasq, a question every 3 ms", moves, seen["worst_ms"])
