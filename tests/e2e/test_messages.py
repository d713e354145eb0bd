"""Messages: none is lost or doubled by a move."""

from __future__ import annotations

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
