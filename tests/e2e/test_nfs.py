"""A pod whose volume lies on NFS, mounted by the kubelet. Skipped where the kernel has no NFS, or
where its server is not installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import nfs
from e2e.support import Scene
from lab import workloads

_ABSENT = nfs.missing() if os.geteuid() == 0 else "needs root"
pytestmark = pytest.mark.skipif(_ABSENT is not None, reason=str(_ABSENT))

_SIZE, _MODES = {"storage": "1Gi"}, ["ReadWriteMany"]


@pytest.fixture
def export(scene: Scene) -> Iterator[Path]:
    """What the server exports, which is outside the cluster; bound to the claim ``shared``."""
    name = scene.namespace
    with nfs.serving(*scene.cluster.argv("client", "exec", "--")) as directory:
        address = scene.cluster.outside_address()
        common = {"accessModes": _MODES, "storageClassName": ""}
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                **common,
                "capacity": _SIZE,
                "nfs": {"server": address, "path": "/"},
                # the testbed's nodes have no mount.nfs, which would find these out
                "mountOptions": ["vers=4.2", "proto=tcp", f"addr={address}"],
            },
        }
        claim = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "shared", "namespace": name},
            "spec": {**common, "resources": {"requests": _SIZE}, "volumeName": name},
        }
        scene.cluster.apply(volume, claim)
        yield directory
        kinds = "statefulsets,podmigrations,pods"
        scene.cluster.kubectl("delete", kinds, "--all", "-n", name, "--timeout=120s")
        scene.cluster.kubectl("delete", "persistentvolume", name, "--wait=false")


def test_redis_goes_on_with_its_log_on_nfs(scene: Scene, export: Path) -> None:
    """Append-only file on the volume; there and back with a client that counts."""
    manifest = workloads.stateful_set("redis", scene.namespace, node=scene.nodes[0])
    spec = manifest["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    container["command"] += ["--dir", "/net", "--appendonly", "yes"]
    container["volumeMounts"] = [{"name": "net", "mountPath": "/net"}]
    spec["volumes"] = [{"name": "net", "persistentVolumeClaim": {"claimName": "shared"}}]
    scene.cluster.apply(workloads.service("redis", scene.namespace), manifest)
    scene.cluster.wait_ready("redis-0", scene.namespace)
    address = scene.pod("redis-0")["status"]["podIP"]
    with scene.cluster.counter(address) as client:
        moves = [scene.must_succeed("redis-0", node) for node in (scene.nodes[1], scene.nodes[0])]
        seen = client.stop()
    assert seen["ok"], seen
    assert [move["epoch"] for move in moves] == [1, 1]
    os.sync()  # what was written last may still be with the client
    logs = sorted((export / "appendonlydir").glob("*.incr.aof"))
    counted = sum(log.read_bytes().upper().count(b"INCR\r\n") for log in logs)
    assert counted == seen["count"]
    scene.record("Redis, append-only file on NFS", moves, seen["worst_ms"])
