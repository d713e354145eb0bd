"""A pod that writes more than the link carries moves all the same, where it was asked for.

Not in ``make test``: an agent that is killed takes its time to come back (``make support``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.link import limited
from e2e.support import Scene
from e2e.test_convergence import written
from lab import workloads

pytestmark = pytest.mark.support

_MEGABYTES = 128
_RATE = 100  # MiB/s
_MBIT = 200
_AGENT = "python3 -m godwit_agent$"
_CUT = (
    "nft 'table inet cut { chain in { type filter hook input priority -300; "
    "tcp dport { 9460, 9461 } drop; tcp sport { 9460, 9461 } drop; }; }' && "
    "sleep 5; nft delete table inet cut"
)


def kill(scene: Scene, node: str) -> None:
    scene.cluster.node_exec(node, "pkill", "-KILL", "-f", _AGENT)


FAULTS: dict[str, Callable[[Scene], object]] = {
    "": lambda scene: None,
    "source agent killed": lambda scene: kill(scene, scene.nodes[0]),
    "target agent killed": lambda scene: kill(scene, scene.nodes[1]),
    "link cut": lambda scene: scene.cluster.node_exec(scene.nodes[0], "sh", "-c", _CUT),
}


def start_dirtier(scene: Scene) -> str:
    """Address of a pod ``dirtier`` that writes more than the link will carry."""
    image = scene.cluster.workload_image("dirtier")
    scene.cluster.apply(
        workloads.dirtier("dirtier", scene.namespace, image, _MEGABYTES, node=scene.nodes[0])
    )
    scene.cluster.wait_ready("dirtier", scene.namespace)
    address = str(scene.pod("dirtier")["status"]["podIP"])
    assert scene.cluster.redis(address, "RATE", str(_RATE)) == "+OK"
    return address


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rest_follows_and_every_page_is_right(scene: Scene, fault: str) -> None:
    address = start_dirtier(scene)
    done: list[int] = []

    def look(item: dict[str, Any]) -> None:
        """Once, with most of the pages outstanding."""
        status = item.get("status", {})
        if status.get("step") == "AwaitPages" and not done:
            done.append(status["remainingBytes"])
            FAULTS[fault](scene)

    with (
        scene.cluster.counter(address) as client,
        limited(scene.cluster, scene.nodes[:2], _MBIT),
    ):
        name = scene.apply_migration("dirtier", scene.nodes[1], convergence="PostCopy")
        end = scene.cluster.watch_migration(name, scene.namespace, seen=look)["status"]
        assert end["phase"] == "Succeeded", end
        report = client.stop()
    print(report, end)
    assert report["ok"], report
    assert done
    assert done[0] > 32 << 20
    assert end["postCopyBytes"] > 64 << 20
    assert end["remainingBytes"] == 0
    # all that it had, in one more lap
    goal = written(scene, address) + _MEGABYTES * 256
    assert scene.cluster.redis(address, "VERIFY") == ":0"
    while written(scene, address) < goal:
        pass
    assert scene.cluster.redis(address, "VERIFY") == ":0"
    assert scene.pod("dirtier")["spec"]["nodeName"] == scene.nodes[1]
    scene.assert_no_debris(pod_lives=True)


@pytest.mark.parametrize(
    ("which", "reason", "why"),
    [
        (0, "PagesLost", "no longer stands frozen on the source"),
        (1, "NodeLost", "the node it ran on was restarted"),
    ],
    ids=["source", "target"],
)
def test_what_is_lost_with_a_node_that_loses_its_power_is_said(
    scene: Scene, which: int, reason: str, why: str
) -> None:
    """With pages outstanding; the pod starts anew on the target, as after any such loss."""
    start_dirtier(scene)
    node, target = scene.nodes[which], scene.nodes[1]
    done: list[int] = []

    def look(item: dict[str, Any]) -> None:
        status = item.get("status", {})
        if status.get("step") == "AwaitPages" and not done:
            done.append(status["remainingBytes"])
            scene.cluster.run("crash", node)
            scene.cluster.run("boot", node)

    with limited(scene.cluster, scene.nodes[:2], _MBIT):
        name = scene.apply_migration("dirtier", target, convergence="PostCopy")
        end = scene.cluster.watch_migration(name, scene.namespace, seconds=400, seen=look)["status"]
    print(end)
    assert done
    assert end["phase"] == "Aborted", end
    (told,) = (one for one in end["conditions"] if one["type"] == "Succeeded")
    assert told["reason"] == reason, told
    assert "memory that was still on its source" in told["message"], told
    assert why in told["message"], told
    # another process, and nothing that only looks like the one that was lost
    scene.cluster.kubectl(
        *("wait", "pod/dirtier", "-n", scene.namespace, "--for=condition=Ready", "--timeout=150s")
    )
    assert scene.pod("dirtier")["spec"]["nodeName"] == target
    address = str(scene.pod("dirtier")["status"]["podIP"])
    assert written(scene, address) == 0
    scene.assert_no_debris(pod_lives=True)
