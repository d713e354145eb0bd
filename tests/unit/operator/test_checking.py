"""Each reason why a pod cannot move, and why a node cannot take it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
import pytest

from godwit_api.pods import Node, Pod
from godwit_api.reasons import Reason
from godwit_operator.checking import pod_obstacles
from godwit_operator.quantity import number
from godwit_operator.status import describe_obstacles as describe
from godwit_operator.targets import Free, candidates, fits_affinity, node_obstacles, tolerated

Object = dict[str, Any]
ROOM = Free(Decimal(4), Decimal(2**32))


def pod(**changes: Any) -> Object:
    body: Object = {
        "metadata": {"name": "p", "namespace": "n", "uid": "u"},
        "spec": {
            "nodeName": "n1",
            "runtimeClassName": "godwit",
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "1", "memory": "1Gi"}}}],
        },
        "status": {"phase": "Running", "podIP": "10.0.0.1"},
    }
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        place = body
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return body


def container(**fields: Any) -> Object:
    return pod(spec__containers=[{"name": "c"} | fields])


def owner(kind: str) -> Object:
    reference = {"kind": kind, "name": "o", "uid": "o", "controller": True}
    return pod(metadata__ownerReferences=[reference])


REFUSED: list[tuple[str, Object, Reason]] = [
    ("terminating", pod(metadata__deletionTimestamp="now"), Reason.POD_TERMINATING),
    ("pending", pod(status__phase="Pending"), Reason.POD_NOT_RUNNING),
    ("no address", pod(status__podIP=""), Reason.POD_NOT_RUNNING),
    ("runtime class", pod(spec__runtimeClassName="other"), Reason.WRONG_RUNTIME_CLASS),
    ("no runtime class", pod(spec__runtimeClassName=None), Reason.WRONG_RUNTIME_CLASS),
    ("finalizers", pod(metadata__finalizers=["a/b"]), Reason.POD_FINALIZERS),
    ("daemon set", owner("DaemonSet"), Reason.DAEMON_SET_POD),
    ("job", owner("Job"), Reason.UNSUPPORTED_OWNER),
    ("static", owner("Node"), Reason.STATIC_POD),
    (
        "mirror",
        pod(metadata__annotations={"kubernetes.io/config.mirror": "x"}),
        Reason.STATIC_POD,
    ),
    ("host network", pod(spec__hostNetwork=True), Reason.HOST_NETWORK),
    ("host pid", pod(spec__hostPID=True), Reason.HOST_PID),
    ("host ipc", pod(spec__hostIPC=True), Reason.HOST_IPC),
    ("shared pids", pod(spec__shareProcessNamespace=True), Reason.SHARED_PROCESS_NAMESPACE),
    ("user namespace", pod(spec__hostUsers=False), Reason.USER_NAMESPACE),
    ("claims", pod(spec__resourceClaims=[{"name": "gpu"}]), Reason.DEVICE),
    (
        "container that has ended",
        pod(status__containerStatuses=[{"name": "c", "state": {"terminated": {"exitCode": 0}}}]),
        Reason.CONTAINER_NOT_RUNNING,
    ),
    (
        "sidecar that restarts",
        pod(
            spec__initContainers=[{"name": "s", "restartPolicy": "Always"}],
            status__initContainerStatuses=[{"name": "s", "state": {"waiting": {}}}],
        ),
        Reason.CONTAINER_NOT_RUNNING,
    ),
    (
        "sidecar with a terminal",
        pod(spec__initContainers=[{"name": "s", "restartPolicy": "Always", "tty": True}]),
        Reason.TERMINAL,
    ),
    ("debug", pod(spec__ephemeralContainers=[{"name": "d"}]), Reason.EPHEMERAL_CONTAINERS),
    ("host port", container(ports=[{"containerPort": 1, "hostPort": 2}]), Reason.HOST_PORT),
    (
        "postStart http",
        container(lifecycle={"postStart": {"httpGet": {"port": 1}}}),
        Reason.POST_START_HTTP_HOOK,
    ),
    (
        "preStop http",
        container(lifecycle={"preStop": {"httpGet": {"port": 1}}}),
        Reason.PRE_STOP_HTTP_HOOK,
    ),
    (
        "preStop tcp",
        container(lifecycle={"preStop": {"tcpSocket": {"port": 1}}}),
        Reason.PRE_STOP_HTTP_HOOK,
    ),
    ("stdin once", container(stdin=True, stdinOnce=True), Reason.TERMINAL),
    (
        "a terminal before another container",
        pod(spec__containers=[{"name": "a", "tty": True}, {"name": "b"}]),
        Reason.TERMINAL,
    ),
    ("raw block", container(volumeDevices=[{"name": "v"}]), Reason.VOLUME_CANNOT_FOLLOW),
    ("huge pages", container(resources={"limits": {"hugepages-2Mi": "2Mi"}}), Reason.HUGE_PAGES),
    ("device", container(resources={"limits": {"nvidia.com/gpu": 1}}), Reason.DEVICE),
]


def test_profiles_that_a_node_must_have() -> None:
    def profile(name: str) -> Object:
        return {"type": "Localhost", "localhostProfile": name}

    body = pod(
        spec__securityContext={"seccompProfile": profile("a/b.json")},
        spec__containers=[
            {"name": "c", "securityContext": {"appArmorProfile": profile("strict")}},
            {"name": "d", "securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}},
        ],
        spec__initContainers=[
            {"name": "i", "securityContext": {"seccompProfile": profile("init.json")}}
        ],
    )
    spec = msgspec.convert(body, Pod).spec
    assert spec.apparmor_profiles == ["strict"]
    assert spec.seccomp_profiles == ["a/b.json", "init.json"]


@pytest.mark.parametrize(("body", "reason"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_refused(body: Object, reason: Reason) -> None:
    found = pod_obstacles(msgspec.convert(body, Pod))
    assert [item.reason for item in found] == [reason]
    assert all(item.message for item in found)


@pytest.mark.parametrize(
    "body",
    [
        pod(),
        owner("StatefulSet"),
        owner("ReplicaSet"),
        container(lifecycle={"preStop": {"exec": {"command": ["x"]}}}),
        container(lifecycle={"postStart": {"exec": {"command": ["x"]}}}),
        pod(spec__containers=[{"name": "a"}, {"name": "b"}]),
        container(stdin=True),
        container(stdin=True, stdinOnce=True, tty=True),
        pod(spec__containers=[{"name": "a"}, {"name": "b", "tty": True}]),
        pod(
            spec__initContainers=[{"name": "i"}, {"name": "s", "restartPolicy": "Always"}],
            status__initContainerStatuses=[
                {"name": "i", "state": {"terminated": {"exitCode": 0}}},
                {"name": "s", "state": {"running": {}}},
            ],
        ),
    ],
)
def test_accepted(body: Object) -> None:
    assert pod_obstacles(msgspec.convert(body, Pod)) == []


def test_all_at_once() -> None:
    body = pod(spec__hostNetwork=True, spec__hostPID=True, status__phase="Pending")
    found = pod_obstacles(msgspec.convert(body, Pod))
    assert {item.reason for item in found} == {
        Reason.HOST_NETWORK,
        Reason.HOST_PID,
        Reason.POD_NOT_RUNNING,
    }
    assert "HostNetwork: " in describe(found)


def node(name: str = "n2", **changes: Any) -> Node:
    body: Object = {
        "metadata": {"name": name, "labels": {"godwit.io/node": "ready"}},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
    for path, value in changes.items():
        parent, leaf = path.split("__")
        body.setdefault(parent, {})[leaf] = value
    return msgspec.convert(body, Node)


READY = {"godwit.io/node": "ready"}


@pytest.mark.parametrize(
    ("target", "body", "reason"),
    [
        (node(status__conditions=[]), pod(), Reason.TARGET_NOT_READY),
        (node(metadata__labels={}), pod(), Reason.NODE_NOT_PREPARED),
        (node("n9"), pod(), Reason.AGENT_MISSING),
        (node(spec__unschedulable=True), pod(), Reason.TARGET_UNSCHEDULABLE),
        (
            node(spec__taints=[{"key": "a", "effect": "NoSchedule"}]),
            pod(),
            Reason.TARGET_UNSCHEDULABLE,
        ),
        (
            node(metadata__labels=READY | {"kubernetes.io/arch": "arm64"}),
            pod(),
            Reason.ARCHITECTURE_DIFFERS,
        ),
        (node(), pod(spec__nodeSelector={"disk": "ssd"}), Reason.TARGET_UNSCHEDULABLE),
        (
            node(),
            container(resources={"requests": {"memory": "8Gi"}}),
            Reason.NOT_ENOUGH_MEMORY,
        ),
        (node(), container(resources={"requests": {"cpu": "8"}}), Reason.TARGET_UNSCHEDULABLE),
    ],
)
def test_node_refused(target: Node, body: Object, reason: Reason) -> None:
    source = node("n1", metadata__labels=READY)
    found = node_obstacles(target, msgspec.convert(body, Pod), source, {"n2"}, ROOM)
    assert [item.reason for item in found] == [reason]


def test_node_accepted() -> None:
    taint = {"key": "a", "value": "b", "effect": "NoSchedule"}
    toleration = {"key": "a", "operator": "Exists"}
    body = msgspec.convert(pod(spec__tolerations=[toleration]), Pod)
    target = node(spec__taints=[taint])
    assert node_obstacles(target, body, node("n1"), {"n2"}, ROOM) == []
    assert tolerated(target.spec.taints[0], body)


def test_the_pin_of_an_earlier_migration_does_not_count() -> None:
    pinned = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}
                ]
            }
        }
    }
    assert not fits_affinity(node("n2"), pinned)
    body = pod(spec__affinity=pinned, metadata__annotations={"godwit.io/original-affinity": "null"})
    assert node_obstacles(node("n2"), msgspec.convert(body, Pod), None, {"n2"}, ROOM) == []


def test_the_emptiest_candidate_first() -> None:
    nodes = [node("n1"), node("n2"), node("n3")]
    room = {
        n.name: Free(Decimal(1), Decimal(size)) for n, size in zip(nodes, (9, 1, 5), strict=True)
    }
    assert [n.name for n in candidates(nodes, None, "n1", room)] == ["n3", "n2"]
    assert candidates(nodes, {"a": "b"}, "n1", room) == []


@pytest.mark.parametrize(
    ("text", "value"), [("50M", 50_000_000), ("1Gi", 2**30), (7, 7), ("250m", Decimal("0.25"))]
)
def test_quantity(text: str | int, value: Decimal | int) -> None:
    assert number(text) == value
