"""What cannot move is refused with every reason at once, and is not touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from e2e.support import Scene, refused
from lab import workloads

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


@pytest.mark.parametrize("reason", PODS)
def test_pod_that_cannot_move(scene: Scene, reason: str) -> None:
    pod = workloads.bare_pod("redis", scene.namespace, node=scene.nodes[0])
    PODS[reason](pod)
    scene.cluster.apply(pod)
    scene.cluster.wait_ready("redis", scene.namespace)
    before = scene.pod("redis")
    name = scene.apply_migration("redis", scene.nodes[1])
    status = scene.final(name, seconds=60)
    assert status["phase"] == "Rejected", status
    assert reason in [item["reason"] for item in status["obstacles"]]
    checked = next(item for item in status["conditions"] if item["type"] == "Checked")
    assert checked["status"] == "False"
    told = [event["message"] for event in scene.events("PodMigration", name)]
    assert any(reason in message for message in told), told
    after = scene.pod("redis")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["containerStatuses"] == before["status"]["containerStatuses"]


def test_all_reasons_come_at_once(scene: Scene) -> None:
    pod = workloads.bare_pod("redis", scene.namespace, node=scene.nodes[0])
    for reason in ("HostPID", "PreStopHTTPHook", "SharedProcessNamespace"):
        PODS[reason](pod)
    scene.cluster.apply(pod)
    scene.cluster.wait_ready("redis", scene.namespace)
    status = scene.migrate("redis", "no-such-node")
    found = {item["reason"] for item in status["obstacles"]}
    assert {"HostPID", "PreStopHTTPHook", "SharedProcessNamespace", "TargetNotFound"} <= found


def test_daemon_set_pod(scene: Scene) -> None:
    spec = workloads.redis_pod_spec(node=None)
    scene.cluster.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": "redis", "namespace": scene.namespace},
            "spec": {
                "selector": {"matchLabels": {"app": "redis"}},
                "template": {
                    "metadata": {"labels": {"app": "redis"}},
                    "spec": {**spec, "nodeSelector": {"kubernetes.io/hostname": scene.nodes[0]}},
                },
            },
        }
    )
    pod = scene.ready_pod("redis")
    status = scene.migrate(pod, scene.nodes[1])
    assert status["phase"] == "Rejected"
    assert "DaemonSetPod" in [item["reason"] for item in status["obstacles"]]


@pytest.mark.parametrize(
    ("target", "reason"), [("no-such-node", "TargetNotFound"), ("same", "TargetIsSource")]
)
def test_target_that_cannot_be(scene: Scene, target: str, reason: str) -> None:
    pod = scene.start("pod", "redis", scene.nodes[0])
    status = scene.migrate(pod, scene.nodes[0] if target == "same" else target)
    assert status["phase"] == "Rejected"
    assert reason in [item["reason"] for item in status["obstacles"]]


def test_unknown_pod(scene: Scene) -> None:
    status = scene.migrate("no-such-pod", scene.nodes[1])
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
def test_malformed_spec_is_refused_by_the_api_server(scene: Scene, case: str) -> None:
    spec, field = SPECS[case]
    manifest = workloads.migration("bad", scene.namespace, "x", "y")
    manifest["spec"] = spec
    assert field in refused(scene.cluster, manifest)


def test_spec_is_immutable(scene: Scene) -> None:
    name = scene.apply_migration("no-such-pod", scene.nodes[1])
    scene.final(name)
    patch = '{"spec":{"podName":"other"}}'
    said = ""
    try:
        scene.cluster.kubectl(
            "patch", "pmig", name, "-n", scene.namespace, "--type=merge", "-p", patch
        )
    except RuntimeError as failure:
        said = str(failure)
    assert "immutable" in said
