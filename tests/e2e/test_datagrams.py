"""UDP servers move while datagrams keep coming; those of the freeze are answered after it."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.moving import report, start_it, there_and_back, use
from e2e.support import Scene
from lab.software import DNS, UDP_ECHO, Software

pytestmark = pytest.mark.support


@pytest.mark.parametrize("software", [UDP_ECHO, DNS], ids=["echo", "dns"])
def test_datagrams_in_the_freeze_are_answered(scene: Scene, software: Software) -> None:
    listens = ["sh", "-c", f"grep -q ':{software.port:04X} ' /proc/net/udp /proc/net/udp6"]
    probe = {"exec": {"command": listens}, "periodSeconds": 1}
    asking = use(scene, software, start_it(scene, software, readinessProbe=probe))
    moves = there_and_back(scene)
    seen = report(asking)
    assert_answered(seen, moves)
    scene.record(software.row, moves, seen["worst_ms"])


def assert_answered(seen: dict[str, Any], moves: list[dict[str, Any]]) -> None:
    """Only what is on its way while the nodes change their routes may be lost, as UDP allows."""
    assert seen["wrong"] == seen["again"] == 0, seen
    assert len(seen["lost"]) <= 5 * len(moves), seen
    # Held and replayed: at least half of what came in the two freezes waited for its answer.
    frozen_ms = sum(status["freezeMilliseconds"] for status in moves)
    assert len(seen["waits_ms"]) >= frozen_ms / 3 / 2, (seen, frozen_ms)
