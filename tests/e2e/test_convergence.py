"""Copies of pods that write: slowed down on request, compressed on request, right in any case."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.support import Scene
from lab import workloads

pytestmark = pytest.mark.bridged

_MEGABYTES = 192
_RATE = 200  # MiB/s: more than the link lets through, less than it does at a fifth of the CPU time
_BUDGET_MS = 1000
_BUDGET: dict[str, Any] = {"bandwidthLimit": "100M", "freezeBudgetMilliseconds": _BUDGET_MS}
# Notes of what is slowed down; there are none when nothing is.
_LIMITS = "ls -A /run/godwit/throttle"


def start_dirtier(scene: Scene) -> str:
    """Address of a pod ``dirtier`` that writes all the time."""
    image = scene.cluster.workload_image("dirtier")
    scene.cluster.apply(
        workloads.dirtier("dirtier", scene.namespace, image, _MEGABYTES, node=scene.nodes[0])
    )
    scene.cluster.wait_ready("dirtier", scene.namespace)
    address = str(scene.pod("dirtier")["status"]["podIP"])
    assert scene.cluster.redis(address, "RATE", str(_RATE)) == "+OK"
    return address


def written(scene: Scene, address: str) -> int:
    return scene.cluster.number(address, "WRITTEN")


def test_a_pod_that_writes_too_much_is_refused_and_runs_on(scene: Scene) -> None:
    address = start_dirtier(scene)
    before = scene.pod("dirtier")["metadata"]["uid"]
    with scene.cluster.counter(address) as client:
        status = scene.migrate(
            "dirtier",
            scene.nodes[1],
            **_BUDGET,
        )
        report = client.stop()
    assert report["ok"], report
    assert status["phase"] == "Aborted", status
    assert "FreezeBudgetExceeded" in str(status), status
    assert status["predictedFreezeMilliseconds"] > _BUDGET_MS
    assert scene.pod("dirtier")["metadata"]["uid"] == before
    assert scene.cluster.redis(address, "VERIFY") == ":0"


def test_throttled_it_moves_and_gets_its_time_back(scene: Scene) -> None:
    address = start_dirtier(scene)
    slowest = [100]

    def look(item: dict[str, Any]) -> None:
        slowest[0] = min(slowest[0], item.get("status", {}).get("cpuPercent", 100))

    with scene.cluster.counter(address) as client:
        name = scene.apply_migration(
            "dirtier",
            scene.nodes[1],
            **_BUDGET,
            convergence="Throttle",
        )
        end = scene.cluster.watch_migration(name, scene.namespace, seen=look)["status"]
        assert end["phase"] == "Succeeded", end
        assert slowest[0] < 100
        # it writes again as fast as it did: two seconds' worth, however long that takes here
        goal = written(scene, address) + 2 * _RATE * 256
        while written(scene, address) < goal:
            pass
        report = client.stop()
    assert report["ok"], report
    assert scene.cluster.redis(address, "VERIFY") == ":0"
    for node in scene.nodes[:2]:
        assert not scene.cluster.node_exec(node, "sh", "-c", _LIMITS).strip()


def test_compressed_it_is_a_fraction_and_the_same(scene: Scene) -> None:
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    scene.cluster.fill(address, 100)
    digest = scene.cluster.redis(address, "DEBUG", "DIGEST")
    sent = {}
    for target, compression in ((scene.nodes[1], "None"), (scene.nodes[0], "Zstd")):
        status = scene.must_succeed(pod, target, compression=compression)
        sent[compression] = status["transferredBytes"]
        assert scene.cluster.redis(address, "DEBUG", "DIGEST") == digest
    assert sent["None"] > 80 << 20
    assert sent["Zstd"] < sent["None"] / 3, sent
