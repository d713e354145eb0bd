"""What cannot move is refused with every reason at once, and is not touched.

What one machine cannot show (another CPU, another architecture, other versions, a network that
is not routed) is tested in tests/contract/agent and tests/unit.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from e2e import gallery as pods
from e2e.support import Scene, refused
from lab import workloads
from lab.cluster import LAB_IMAGE, Cluster

_PODS = (*pods.SPECS, *pods.PROGRAMS, *pods.CALLS)
_READY = [*_PODS, "several"]
_ALONE = {*_PODS, *pods.PENDING}
# The kubelet's directory; see staticPodPath in the testbed's configuration.
_STATIC = "/etc/kubernetes/manifests/static.json"


@dataclass
class Gallery:
    """Pods that cannot move, and the end of a migration of each."""

    scene: Scene
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    migrations: dict[str, str] = field(default_factory=dict)

    def ask(self, reason: str, pod: str) -> None:
        """Apply a migration; all of them are under way at once."""
        self.before[reason] = self.scene.pod(pod)
        self.migrations[reason] = self.scene.apply_migration(pod, self.scene.nodes[1])

    def check(self, reason: str, *, changes: bool = False) -> None:
        """Refused for that reason in status and Events, untouched.

        ``changes``: its status changes by itself.
        """
        name, before = self.migrations[reason], self.before[reason]
        status = self.scene.final(name, seconds=60)
        assert status["phase"] == "Rejected", status
        assert reason in [item["reason"] for item in status["obstacles"]], status
        checked = next(item for item in status["conditions"] if item["type"] == "Checked")
        assert checked["status"] == "False"
        pod = before["metadata"]["name"]
        for kind, about in (("PodMigration", name), ("Pod", pod)):
            told = [event["message"] for event in self.scene.events(kind, about)]
            assert any(reason in message for message in told), (kind, told)
        after = self.scene.pod(pod)
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        if not changes:
            assert after["status"]["containerStatuses"] == before["status"]["containerStatuses"]


@contextmanager
def _profile(scene: Scene) -> Iterator[None]:
    """A seccomp profile that the first node has and the second has not."""
    path = f"/var/lib/kubelet/seccomp/{pods.PROFILE}"
    script = f"mkdir -p $(dirname {path}) && cat > {path}"
    text = '{"defaultAction": "SCMP_ACT_ALLOW"}'
    scene.cluster.run("node", "exec", scene.nodes[0], "--", "sh", "-c", script, stdin=text)
    try:
        yield
    finally:
        scene.cluster.node_exec(scene.nodes[0], "rm", "-f", path)


@contextmanager
def _static_pod(scene: Scene) -> Iterator[str]:
    """Name of a pod that the kubelet of the first node keeps by itself."""
    node, text = scene.nodes[0], json.dumps(pods.static(scene.namespace))
    script = f"mkdir -p $(dirname {_STATIC}) && cat > {_STATIC}"
    scene.cluster.run("node", "exec", node, "--", "sh", "-c", script, stdin=text)
    try:
        yield f"static-{node}"
    finally:
        scene.cluster.node_exec(node, "rm", "-f", _STATIC)


@contextmanager
def _terminating(scene: Scene) -> Iterator[str]:
    name = "podterminating"
    scene.cluster.apply(pods.terminating(scene.namespace, scene.nodes[0]))
    scene.cluster.wait_ready(name, scene.namespace)
    words = ("pod", name, "-n", scene.namespace)
    scene.cluster.kubectl("delete", *words, "--wait=false")
    try:
        yield name
    finally:
        scene.cluster.kubectl(
            "delete", *words, "--grace-period=0", "--force", "--wait=false", check=False
        )


@contextmanager
def _finalized(scene: Scene) -> Iterator[None]:
    """The namespace can go afterwards."""
    yield
    patch = '{"metadata":{"finalizers":null}}'
    words = ("patch", "pod", "podfinalizers", "-n", scene.namespace, "--type=merge", "-p", patch)
    scene.cluster.kubectl(*words)


@contextmanager
def _foreign(scene: Scene) -> Iterator[None]:
    """Somebody is in the pod by kubectl exec."""
    words = ("exec", "foreignprocess", "-n", scene.namespace, "--", "sh", "-c")
    command = scene.cluster.argv("kubectl", *words, "echo there; exec sleep 600")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as there:
        try:
            assert there.stdout
            assert there.stdout.readline() == "there\n"
            yield
        finally:
            there.kill()


@pytest.fixture(scope="module")
def gallery(cluster: Cluster) -> Iterator[Gallery]:
    """One namespace with a pod for each reason; all start at once, and are asked for at once."""
    scene = Scene(cluster, "gallery")
    scene.open()
    place = (scene.namespace, scene.nodes[0])
    with ExitStack() as stack:
        stack.enter_context(_profile(scene))
        cluster.apply(
            *(pods.redis(reason, *place) for reason in (*pods.SPECS, *pods.PENDING)),
            *(pods.program(reason, *place) for reason in (*pods.PROGRAMS, *pods.CALLS)),
            *(pods.several(*place), pods.daemon_set(*place), pods.job(*place)),
        )
        static = stack.enter_context(_static_pod(scene))
        terminating = stack.enter_context(_terminating(scene))
        stack.enter_context(_finalized(scene))
        for name in _READY:
            if name != "ContainerNotRunning":
                cluster.wait_ready(name.lower(), scene.namespace, 180)
        cluster.kubectl(
            *("wait", "pod", "containernotrunning", "-n", scene.namespace, "--timeout=60s"),
            "--for=jsonpath={.status.containerStatuses[?(@.name=='second')].state.terminated}",
        )
        cluster.wait_ready(static, scene.namespace)
        cluster.kubectl(
            *("debug", "ephemeralcontainers", "-n", scene.namespace, "--image", LAB_IMAGE),
            *("--image-pull-policy=IfNotPresent", "--profile=general", "--attach=false"),
            *("--", "sleep", "600"),
        )
        stack.enter_context(_foreign(scene))
        made = Gallery(scene)
        for reason in sorted(_ALONE):
            made.ask(reason, reason.lower())
        made.ask("PodTerminating", terminating)
        made.ask("StaticPod", static)
        made.ask("DaemonSetPod", scene.ready_pod("everywhere"))
        made.ask("UnsupportedOwner", scene.ready_pod("job"))
        yield made
    scene.close()


@pytest.mark.parametrize(
    "reason",
    [*_PODS, "StaticPod", "DaemonSetPod", "UnsupportedOwner"],
)
def test_pod_that_cannot_move(gallery: Gallery, reason: str) -> None:
    gallery.check(reason, changes=reason == "EphemeralContainers")


@pytest.mark.parametrize("reason", [*pods.PENDING, "PodTerminating"])
def test_pod_that_does_not_run_as_it_should(gallery: Gallery, reason: str) -> None:
    gallery.check(reason, changes=True)


def test_all_reasons_come_at_once(gallery: Gallery) -> None:
    status = gallery.scene.migrate("several", "no-such-node")
    found = {item["reason"] for item in status["obstacles"]}
    assert {"HostIPC", "PreStopHTTPHook", "SharedProcessNamespace", "TargetNotFound"} <= found


def _obstacles(status: dict[str, Any]) -> list[str]:
    assert status["phase"] == "Rejected", status
    return [item["reason"] for item in status["obstacles"]]


@contextmanager
def _ghost(cluster: Cluster) -> Iterator[None]:
    """A node whose machine there is not."""
    cluster.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "ghost"}})
    try:
        yield
    finally:
        cluster.kubectl("delete", "node", "ghost")


def test_targets_that_cannot_be(scene: Scene) -> None:
    """The pod may run on the first node only; no other is one for it."""
    here, cluster = scene.nodes[0], scene.cluster
    pod = workloads.bare_pod("redis", scene.namespace)
    pod["spec"] |= {"nodeSelector": {"kubernetes.io/hostname": here}}
    cluster.apply(pod)
    cluster.wait_ready("redis", scene.namespace)
    before = scene.pod("redis")
    expected = {
        "no-such-node": {"TargetNotFound"},
        here: {"TargetIsSource"},
        scene.nodes[1]: {"TargetUnschedulable"},
        "ghost": {"TargetNotReady", "AgentMissing", "NodeNotPrepared", "TargetUnschedulable"},
    }
    with _ghost(cluster):
        for target, reasons in expected.items():
            assert reasons <= set(_obstacles(scene.migrate("redis", target))), target
    manifest = workloads.migration("nowhere", scene.namespace, "redis", "")
    manifest["spec"]["target"] = {"nodeSelector": {"no": "such"}}
    cluster.apply(manifest)
    assert "NoTarget" in _obstacles(scene.final("nowhere"))
    after = scene.pod("redis")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["containerStatuses"] == before["status"]["containerStatuses"]


def test_target_without_room(scene: Scene) -> None:
    """Two pods request more than half of a node's memory each."""
    node = scene.cluster.get("node", scene.nodes[0])
    room = int(node["status"]["allocatable"]["memory"].removesuffix("Ki")) * 1024
    for name, where in (("one", scene.nodes[0]), ("two", scene.nodes[1])):
        scene.cluster.apply(pods.large(name, scene.namespace, where, room * 6 // 10))
        scene.cluster.wait_ready(name, scene.namespace)
    assert "NotEnoughMemory" in _obstacles(scene.migrate("one", scene.nodes[1]))


def test_unknown_pod(gallery: Gallery) -> None:
    status = gallery.scene.migrate("no-such-pod", gallery.scene.nodes[1])
    assert _obstacles(status) == ["PodNotFound"]


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
def test_malformed_spec_is_refused_by_the_api_server(gallery: Gallery, case: str) -> None:
    spec, field = SPECS[case]
    manifest = workloads.migration("bad", gallery.scene.namespace, "x", "y")
    manifest["spec"] = spec
    assert field in refused(gallery.scene.cluster, manifest)


def test_spec_is_immutable(gallery: Gallery) -> None:
    name = gallery.scene.apply_migration("no-such-pod", gallery.scene.nodes[1])
    gallery.scene.final(name)
    patch = '{"spec":{"podName":"other"}}'
    said = ""
    try:
        gallery.scene.cluster.kubectl(
            "patch", "pmig", name, "-n", gallery.scene.namespace, "--type=merge", "-p", patch
        )
    except RuntimeError as failure:
        said = str(failure)
    assert "immutable" in said
