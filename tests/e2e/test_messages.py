"""Messages: none is lost or doubled by a move."""

from __future__ import annotations

import pytest

from e2e.moving import report, start_it, there_and_back, use
from e2e.support import Scene
from lab.software import NATS

pytestmark = pytest.mark.support


def test_nats_delivers_every_message_once_and_in_order(scene: Scene) -> None:
    using = use(scene, NATS, start_it(scene, NATS))
    moves = there_and_back(scene)
    seen = report(using)
    assert seen["error"] is None, seen
    assert seen["delivered"] == 8 * seen["published"]
    scene.record(NATS.row, moves, seen["worst_ms"])
