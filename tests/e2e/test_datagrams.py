"""UDP servers move while datagrams keep coming; those of the freeze are answered after it."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.moving import CLIENTS, client, report, start, there_and_back
from e2e.support import Scene

pytestmark = pytest.mark.support

_DNS = (
    *("dnsmasq", "--keep-in-foreground", "--user=root", "--no-resolv", "--no-hosts"),
    "--address=/godwit.test/192.0.2.7",
)


@pytest.mark.parametrize(
    ("protocol", "port", "command"),
    [("echo", 7000, ("python3", "/lab/echo.py")), ("dns", 53, _DNS)],
)
def test_datagrams_in_the_freeze_are_answered(
    scene: Scene, protocol: str, port: int, command: tuple[str, ...]
) -> None:
    listens = ["sh", "-c", f"grep -q ':{port:04X} ' /proc/net/udp /proc/net/udp6"]
    probe = {"exec": {"command": listens}, "periodSeconds": 1}
    address = start(scene, "servers", None, *command, readinessProbe=probe)
    asking = client(scene, str(CLIENTS / "datagrams.py"), protocol, address, str(port))
    moves = there_and_back(scene)
    seen = report(asking)
    assert_answered(seen, moves)
    scene.record(f"{protocol.upper()} over UDP, one every 3 ms", moves, seen["worst_ms"])


def assert_answered(seen: dict[str, Any], moves: list[dict[str, Any]]) -> None:
    """What the socket had received and the process had not read is lost, as UDP allows."""
    assert seen["wrong"] == seen["again"] == 0, seen
    assert len(seen["lost"]) <= 5 * len(moves), seen
    # Held and replayed: at least half of what came in the two freezes waited for its answer.
    frozen_ms = sum(status["freezeMilliseconds"] for status in moves)
    assert len(seen["waits_ms"]) >= frozen_ms / 3 / 2, (seen, frozen_ms)
