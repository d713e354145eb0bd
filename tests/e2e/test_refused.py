"""What cannot move is refused with every reason at once, and is not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from e2e.support import Scene, refused
from lab import workloads
from lab.cluster import Cluster

Change = Callable[[dict[str, Any]], None]


def _spec(**fields: Any) -> Change:
    return lambda pod: pod["spec"].update(fields)


def _container(**fields: Any) -> Change:
    return lambda pod: pod["spec"]["containers"][0].update(fields)


def _host_path(pod: dict[str, Any]) -> None:
    pod["spec"]["volumes"] = [{"name": "v", "hostPath": {"path": "/etc"}}]
    pod["spec"]["containers"][0]["volumeMounts"] = [
        {"name": "v", "mountPath": "/host", "readOnly": True}
    ]


PODS: dict[str, Change] = {
    "WrongRuntimeClass": lambda pod: pod["spec"].pop("runtimeClassName"),
    "HostNetwork": _spec(hostNetwork=True),
    "HostPID": _spec(hostPID=True),
    "HostIPC": _spec(hostIPC=True),
    "SharedProcessNamespace": _spec(shareProcessNamespace=True),
    "PreStopHTTPHook": _container(lifecycle={"preStop": {"httpGet": {"port": 6379}}}),
    "Terminal": _container(tty=True, stdin=True),
    "HostPort": _container(ports=[{"containerPort": 6379, "hostPort": 16379}]),
    "VolumeCannotFollow": _host_path,
}


@pytest.fixture(scope="module")
def gallery(cluster: Cluster) -> Iterator[Scene]:
    """One namespace with a pod for each reason, all started at once."""
    scene = Scene(cluster, "gallery")
    scene.open()
    for reason, change in PODS.items():
        pod = workloads.bare_pod(reason.lower(), scene.namespace, node=scene.nodes[0])
        change(pod)
        cluster.apply(pod)
    cluster.apply(_several(scene))
    cluster.apply(_daemon_set(scene))
    cluster.kubectl(
        *("wait", "pod", "--all", "-n", scene.namespace),
        *("--for=condition=Ready", "--timeout=180s"),
    )
    yield scene
    scene.close()


def _several(scene: Scene) -> dict[str, Any]:
    pod = workloads.bare_pod("several", scene.namespace, node=scene.nodes[0])
    for reason in ("HostIPC", "PreStopHTTPHook", "SharedProcessNamespace"):
        PODS[reason](pod)
    return pod


def _daemon_set(scene: Scene) -> dict[str, Any]:
    spec = workloads.redis_pod_spec(node=None)
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "everywhere", "namespace": scene.namespace},
        "spec": {
            "selector": {"matchLabels": {"app": "everywhere"}},
            "template": {
                "metadata": {"labels": {"app": "everywhere"}},
                "spec": {**spec, "nodeSelector": {"kubernetes.io/hostname": scene.nodes[0]}},
            },
        },
    }


@pytest.mark.parametrize("reason", PODS)
def test_pod_that_cannot_move(gallery: Scene, reason: str) -> None:
    pod = reason.lower()
    before = gallery.pod(pod)
    name = gallery.apply_migration(pod, gallery.nodes[1])
    status = gallery.final(name, seconds=60)
    assert status["phase"] == "Rejected", status
    assert reason in [item["reason"] for item in status["obstacles"]]
    checked = next(item for item in status["conditions"] if item["type"] == "Checked")
    assert checked["status"] == "False"
    told = [event["message"] for event in gallery.events("PodMigration", name)]
    assert any(reason in message for message in told), told
    after = gallery.pod(pod)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["containerStatuses"] == before["status"]["containerStatuses"]


def test_all_reasons_come_at_once(gallery: Scene) -> None:
    status = gallery.migrate("several", "no-such-node")
    found = {item["reason"] for item in status["obstacles"]}
    assert {"HostIPC", "PreStopHTTPHook", "SharedProcessNamespace", "TargetNotFound"} <= found


def test_daemon_set_pod(gallery: Scene) -> None:
    status = gallery.migrate(gallery.ready_pod("everywhere"), gallery.nodes[1])
    assert status["phase"] == "Rejected"
    assert "DaemonSetPod" in [item["reason"] for item in status["obstacles"]]


@pytest.mark.parametrize(
    ("target", "reason"), [("no-such-node", "TargetNotFound"), ("same", "TargetIsSource")]
)
def test_target_that_cannot_be(gallery: Scene, target: str, reason: str) -> None:
    node = gallery.pod("several")["spec"]["nodeName"] if target == "same" else target
    status = gallery.migrate("several", node)
    assert status["phase"] == "Rejected"
    assert reason in [item["reason"] for item in status["obstacles"]]


def test_unknown_pod(gallery: Scene) -> None:
    status = gallery.migrate("no-such-pod", gallery.nodes[1])
    assert status["phase"] == "Rejected"
    assert [item["reason"] for item in status["obstacles"]] == ["PodNotFound"]


def test_two_migrations_of_one_pod(scene: Scene) -> None:
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    scene.cluster.fill(address, 100)
    with scene.cluster.counter(address) as client:
        slow = scene.apply_migration(pod, scene.nodes[1], bandwidthLimit=50_000_000)
        scene.until_phase(slow, "Copying")
        second = scene.migrate(pod, scene.nodes[2])
        assert second["phase"] == "Rejected"
        assert "AlreadyMigrating" in [item["reason"] for item in second["obstacles"]]
        assert scene.final(slow)["phase"] == "Succeeded"
        report = client.stop()
    assert report["ok"], report


SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "no pod": ({"target": {"nodeName": "n1"}}, "spec.podName"),
    "empty pod": ({"podName": "", "target": {"nodeName": "n1"}}, "spec.podName"),
    "bad pod name": ({"podName": "A_b", "target": {"nodeName": "n1"}}, "spec.podName"),
    "two targets": (
        {"podName": "a", "target": {"nodeName": "n1", "nodeSelector": {"a": "b"}}},
        "spec.target",
    ),
    "negative budget": (
        {"podName": "a", "freezeBudgetMilliseconds": -1},
        "freezeBudgetMilliseconds",
    ),
    "budget as text": (
        {"podName": "a", "freezeBudgetMilliseconds": "x"},
        "freezeBudgetMilliseconds",
    ),
}


@pytest.mark.parametrize("case", SPECS)
def test_malformed_spec_is_refused_by_the_api_server(gallery: Scene, case: str) -> None:
    spec, field = SPECS[case]
    manifest = workloads.migration("bad", gallery.namespace, "x", "y")
    manifest["spec"] = spec
    assert field in refused(gallery.cluster, manifest)


def test_spec_is_immutable(gallery: Scene) -> None:
    name = gallery.apply_migration("no-such-pod", gallery.nodes[1])
    gallery.final(name)
    patch = '{"spec":{"podName":"other"}}'
    said = ""
    try:
        gallery.cluster.kubectl(
            "patch", "pmig", name, "-n", gallery.namespace, "--type=merge", "-p", patch
        )
    except RuntimeError as failure:
        said = str(failure)
    assert "immutable" in said
