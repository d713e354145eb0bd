"""Nodes whose pods share a bridge: the other main CNI plugin of the testbed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from e2e.support import Scene
from lab.cluster import LAB_IMAGE, Cluster


@pytest.fixture(scope="module")
def bridged() -> Iterator[Cluster]:
    handle = Cluster("e2e-bridge")
    try:
        handle.up(nodes=2, cni="bridge")
        handle.build_images()
        handle.install()
        yield handle
    finally:
        handle.down()


def _neighbour(scene: Scene, node: str, address: str) -> str:
    """A pod on ``node`` that counts in a key of its own on one connection."""
    name = f"near-{node}"
    container = {
        "name": "client",
        "image": LAB_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "stdin": True,
        "command": ["python3", "/lab/client.py", "count", address, "6379", "--key", name],
    }
    scene.cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": scene.namespace},
            "spec": {
                "nodeName": node,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 10,
                "containers": [container],
            },
        }
    )
    scene.cluster.wait_ready(name, scene.namespace)
    return name


def _report(scene: Scene, name: str) -> dict[str, object]:
    scene.cluster.kubectl("exec", "-n", scene.namespace, name, "--", "sh", "-c", "kill -TERM 1")
    scene.cluster.kubectl(
        *("wait", "pod", name, "-n", scene.namespace, "--timeout=60s"),
        "--for=jsonpath={.status.containerStatuses[0].state.terminated}",
    )
    lines = scene.cluster.kubectl("logs", "-n", scene.namespace, name, "--tail=1")
    found = json.loads(lines)
    assert isinstance(found, dict)
    return found


def test_neighbours_and_outside_keep_their_connections(bridged: Cluster) -> None:
    """There and back: beside neighbours that had the address on their link, and new ones."""
    scene = Scene(bridged, "bridge")
    scene.open()
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    near = [_neighbour(scene, node, address) for node in scene.nodes]
    with bridged.counter(address, "count", "--key", "outside") as client:
        for target in (scene.nodes[1], scene.nodes[0]):
            scene.must_succeed(pod, target)
        outside = client.stop()
    reports = {name: _report(scene, name) for name in near} | {"outside": outside}
    assert all(report["ok"] for report in reports.values()), reports
    scene.close()
