"""The cluster whose pods share a bridge (the other main CNI plugin), and its end: uninstalling.

These come last of its tests (conftest.py): what the last one finds is what all have left.
"""

from __future__ import annotations

import json

import pytest

from e2e.support import Scene
from e2e.traces import Bridged, traces
from lab import workloads
from lab.cluster import LAB_IMAGE, SYSTEM_NAMESPACE, Cluster, CommandFailed
from lab.debris import tasks

pytestmark = pytest.mark.bridged


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


def _await_the_last_pods(cluster: Cluster) -> None:
    """Return when none of the system's pods is left; helm does not wait for a Deployment's."""
    names = cluster.kubectl("get", "pods", "-n", SYSTEM_NAMESPACE, "-o", "name").split()
    if names:
        words = ("-n", SYSTEM_NAMESPACE, "--for=delete", "--timeout=60s")
        cluster.kubectl("wait", *names, *words)


def test_neighbours_and_outside_keep_their_connections(bridged: Bridged) -> None:
    """There and back: beside neighbours that had the address on their link, and new ones."""
    scene = Scene(bridged.cluster, "bridge")
    scene.open()
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    near = [_neighbour(scene, node, address) for node in scene.nodes]
    with bridged.cluster.counter(address, "count", "--key", "outside") as client:
        for target in (scene.nodes[1], scene.nodes[0]):
            scene.must_succeed(pod, target)
        outside = client.stop()
    reports = {name: _report(scene, name) for name in near} | {"outside": outside}
    assert all(report["ok"] for report in reports.values()), reports
    scene.close("pods")


def test_uninstalling_leaves_the_nodes_as_they_were(bridged: Bridged) -> None:
    """Refused while a pod needs the runtime handler, and that pod goes on; complete without it."""
    cluster = bridged.cluster
    scene = Scene(cluster, "uninstall")
    scene.open()
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    uninstall = ("helm", "uninstall", "godwit", "--namespace", SYSTEM_NAMESPACE, "--wait")
    with cluster.counter(address) as client:
        with pytest.raises(CommandFailed):
            cluster.run(*uninstall, "--timeout", "2m")
        report = client.stop()
    assert report["ok"], report
    scene.close("pods")
    try:
        cluster.run(*uninstall, "--timeout", "4m")
    except CommandFailed as failure:
        words = ("logs", "-l", "job-name=godwit-retire", "-n", SYSTEM_NAMESPACE, "--prefix")
        said = cluster.kubectl(*words, check=False)
        raise AssertionError([said, *tasks(cluster, scene.nodes)]) from failure
    _await_the_last_pods(cluster)
    assert traces(cluster) == bridged.before
    # an ordinary pod still starts there
    scene = Scene(cluster, "afterwards")
    scene.nodes = ["n1", "n2"]
    scene.open()
    ordinary = workloads.bare_pod("redis", scene.namespace, node="n1")
    del ordinary["spec"]["runtimeClassName"]
    cluster.apply(ordinary)
    cluster.wait_ready("redis", scene.namespace)
