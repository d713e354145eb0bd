"""A cluster whose pods share a bridge (the other main CNI plugin), from installing to uninstalling.

The tests run in this order: what the last one finds is what all of them have left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from e2e.support import Scene
from lab import workloads
from lab.cluster import LAB_IMAGE, SYSTEM_NAMESPACE, Cluster, CommandFailed

# What an installation might leave on a node: files, what containerd was told, kernel state.
_TRACES = """
ls -d /opt/godwit /etc/godwit /var/lib/godwit /run/godwit /run/criu.kdat 2>/dev/null
ls /opt/cni/bin /etc/containerd /etc/containerd/conf.d 2>/dev/null
containerd config dump | grep -i godwit
crictl info 2>/dev/null | grep -i godwit
cat /proc/sys/fs/pipe-user-pages-soft /proc/sys/fs/pipe-user-pages-hard /proc/sys/fs/pipe-max-size
ip route show proto 114
nft list tables | grep -i godwit
grep godwit /proc/mounts
find /sys/fs/cgroup -maxdepth 3 -name '*godwit*'
true
"""


def traces(cluster: Cluster) -> dict[str, str]:
    """By node, and of the API, everything that tells of Godwit or that it may change."""
    found = {node: cluster.node_exec(node, "sh", "-c", _TRACES) for node in ("n1", "n2")}
    for node in cluster.list("nodes", "default"):
        name, meta = node["metadata"]["name"], node["metadata"]
        marks = [*meta.get("labels", {}), *meta.get("annotations", {})]
        marks += [condition["type"] for condition in node["status"]["conditions"]]
        found[f"marks of {name}"] = " ".join(sorted(m for m in marks if "godwit" in m.lower()))
    kinds = (
        "clusterroles,clusterrolebindings,runtimeclasses,mutatingadmissionpolicies,"
        "mutatingadmissionpolicybindings,priorityclasses"
    )
    names = cluster.kubectl("get", kinds, "-o", "name").split()
    found["API"] = " ".join(sorted(name for name in names if "godwit" in name))
    system = cluster.kubectl(
        "get", "all,serviceaccounts,roles", "-n", SYSTEM_NAMESPACE, "-o", "name"
    )
    found["namespace"] = " ".join(sorted(n for n in system.split() if "default" not in n))
    return found


@dataclass
class Bridged:
    cluster: Cluster
    before: dict[str, str]  # traces, before Godwit was installed


@pytest.fixture(scope="module")
def second() -> Iterator[Bridged]:
    handle = Cluster("e2e-bridge")
    try:
        handle.up(nodes=2, cni="bridge")
        before = traces(handle)
        handle.build_images()
        handle.install()
        yield Bridged(handle, before)
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


def test_neighbours_and_outside_keep_their_connections(second: Bridged) -> None:
    """There and back: beside neighbours that had the address on their link, and new ones."""
    bridged = second.cluster
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
    scene.close("pods")


def test_uninstalling_leaves_the_nodes_as_they_were(second: Bridged) -> None:
    """Refused while a pod needs the runtime handler, and that pod goes on; complete without it."""
    cluster = second.cluster
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
    cluster.run(*uninstall, "--timeout", "4m")
    assert traces(cluster) == second.before
    # an ordinary pod still starts there
    scene = Scene(cluster, "afterwards")
    scene.nodes = ["n1", "n2"]
    scene.open()
    ordinary = workloads.bare_pod("redis", scene.namespace, node="n1")
    del ordinary["spec"]["runtimeClassName"]
    cluster.apply(ordinary)
    cluster.wait_ready("redis", scene.namespace)
