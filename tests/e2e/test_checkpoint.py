"""A pod's whole state goes into an archive, and a pod starts from it later, elsewhere."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.support import Scene
from lab.cluster import SYSTEM_NAMESPACE, Cluster

KEY = "godwit-e2e-key"
DIRECTORY = "/var/lib/godwit/checkpoints"


@contextlib.contextmanager
def _key(cluster: Cluster, name: str, data: bytes) -> Iterator[None]:
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": SYSTEM_NAMESPACE},
            "type": "godwit.io/checkpoint-key",
            "data": {"key": base64.b64encode(data).decode()},
        }
    )
    try:
        yield
    finally:
        cluster.kubectl("delete", "secret", name, "-n", SYSTEM_NAMESPACE)


@pytest.fixture
def archives(scene: Scene) -> Iterator[Scene]:
    """A key, and no archives afterwards."""
    with _key(scene.cluster, KEY, os.urandom(32)):
        yield scene
    for node in scene.nodes:
        scene.cluster.node_exec(node, "rm", "-rf", f"{DIRECTORY}/{scene.namespace}")


def _ask(scene: Scene, kind: str, name: str, **spec: Any) -> dict[str, Any]:
    """Make the object, await its end, and return its status."""
    scene.cluster.apply(
        {
            "apiVersion": "godwit.io/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "namespace": scene.namespace},
            "spec": {"keySecretName": KEY, **spec},
        }
    )
    end = time.monotonic() + 240
    while True:
        status = scene.cluster.get(kind.lower(), name, scene.namespace).get("status", {})
        if status.get("phase") in ("Succeeded", "Rejected", "Failed"):
            return dict(status)
        assert time.monotonic() < end, status
        time.sleep(0.5)


def _done(status: dict[str, Any]) -> dict[str, Any]:
    assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
    return status


def _carry(scene: Scene, name: str, source: str, target: str) -> None:
    """What an administrator without a shared file system does."""
    path = f"{DIRECTORY}/{scene.namespace}/{name}.godwit"
    text = scene.cluster.node_exec(source, "base64", "-w0", path)
    script = f"mkdir -p {DIRECTORY}/{scene.namespace} && base64 -d > {path}"
    scene.cluster.run("node", "exec", target, "--", "sh", "-c", script, stdin=text)


def test_checkpoint_under_a_client_then_stop_then_restore_elsewhere(archives: Scene) -> None:
    scene = archives
    first, second = scene.nodes[:2]
    pod = scene.start("pod", "redis", first)
    address = scene.pod(pod)["status"]["podIP"]
    scene.cluster.fill(address, 64)
    digest = scene.cluster.redis(address, "DEBUG", "DIGEST")

    with scene.cluster.counter(address) as client:
        left = _done(_ask(scene, "PodCheckpoint", "running", podName=pod))
        report = client.stop()
    assert report["ok"], report
    assert left["freezeMilliseconds"] > 0
    assert left["archiveBytes"] > 64 * 2**20
    assert scene.pod(pod)["status"]["containerStatuses"][0]["restartCount"] == 0
    scene.assert_no_debris()

    digest = scene.cluster.redis(address, "DEBUG", "DIGEST")
    _done(_ask(scene, "PodCheckpoint", "stopped", podName=pod, leaveRunning=False))
    scene.cluster.kubectl(
        "wait", "pod", pod, "-n", scene.namespace, "--for=delete", "--timeout=60s"
    )

    _carry(scene, "stopped", first, second)
    restored = _done(_ask(scene, "PodRestore", "back", archive="stopped", nodeName=second))
    assert restored["node"] == second
    scene.ready_pod("redis")
    seen = scene.pod(pod)
    assert seen["spec"]["nodeName"] == second
    assert seen["status"]["containerStatuses"][0]["restartCount"] == 0
    assert scene.cluster.redis(seen["status"]["podIP"], "DEBUG", "DIGEST") == digest
    scene.assert_no_debris(pod_lives=True)


def test_restore_on_the_same_node_under_another_name(archives: Scene) -> None:
    scene = archives
    pod = scene.start("pod", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    scene.cluster.redis(address, "SET", "a", "before")
    _done(_ask(scene, "PodCheckpoint", "one", podName=pod))
    scene.cluster.redis(address, "SET", "a", "after")
    status = _done(_ask(scene, "PodRestore", "copy", archive="one", podName="second"))
    assert status["node"] == scene.nodes[0]
    scene.cluster.wait_ready("second", scene.namespace)
    copy = scene.pod("second")["status"]["podIP"]
    assert copy != address
    assert scene.cluster.redis(copy, "GET", "a").split()[-1] == "before"
    assert scene.cluster.redis(address, "GET", "a").split()[-1] == "after"


def test_what_is_refused_before_anything_starts(archives: Scene) -> None:
    scene = archives
    node = scene.nodes[0]
    pod = scene.start("pod", "redis", node)
    _done(_ask(scene, "PodCheckpoint", "good", podName=pod))
    path = f"{DIRECTORY}/{scene.namespace}"
    for name, damage in {
        "cut": "truncate -s -1000 cut.godwit",
        "changed": "printf x | dd of=changed.godwit bs=1 seek=300000 conv=notrunc",
        "foreign": "echo something else > foreign.godwit",
    }.items():
        script = f"cd {path} && cp good.godwit {name}.godwit && {damage}"
        scene.cluster.node_exec(node, "sh", "-c", script)
    expected = {
        "cut": "ArchiveDamaged",
        "changed": "ArchiveDamaged",
        "foreign": "ArchiveForeign",
        "absent": "ArchiveNotFound",
    }
    for name, reason in expected.items():
        status = _ask(scene, "PodRestore", name, archive=name, podName="never")
        assert (status["phase"], status["reason"]) == ("Rejected", reason), status
    with _key(scene.cluster, "godwit-e2e-other", os.urandom(32)):
        status = _ask(
            scene,
            "PodRestore",
            "other-key",
            archive="good",
            podName="never",
            keySecretName="godwit-e2e-other",
        )
        assert (status["phase"], status["reason"]) == ("Rejected", "ArchiveKey"), status
    status = _ask(scene, "PodRestore", "taken", archive="good")
    assert status["phase"] == "Rejected", status
    status = _ask(scene, "PodCheckpoint", "again", podName=pod, archive="good")
    assert status["reason"] in ("ArchiveExists", "ArchiveKey"), status
    pods = [item["metadata"]["name"] for item in scene.cluster.list("pods", scene.namespace)]
    assert pods == [pod]
    scene.assert_no_debris()
