"""Volumes that are directories of the node go along when the migration names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from e2e.moving import exec_in, report, use
from e2e.support import Scene
from e2e.test_databases import crash
from godwit_operator.volumes import affinity_to, named_nodes
from lab import workloads
from lab.software import REDIS


def _bound(scene: Scene, claim: str, **source: Any) -> Iterator[str]:
    """A claim that is bound to a PersistentVolume of ``source``, for as long as it is used."""
    name = scene.namespace
    size = {"storage": "1Gi"}
    modes = ["ReadWriteOnce"]
    scene.cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {"capacity": size, "accessModes": modes, "storageClassName": "", **source},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim, "namespace": name},
            "spec": {
                "resources": {"requests": size}, "accessModes": modes,
                "storageClassName": "", "volumeName": name,
            },
        },
    )  # fmt: skip
    yield claim
    kinds = "statefulsets,pods,podmigrations"
    scene.cluster.kubectl("delete", kinds, "--all", "-n", name, "--timeout=120s")
    scene.cluster.kubectl("delete", "persistentvolume", name, "--wait=false")
    for node in scene.nodes:
        scene.cluster.node_exec(node, "rm", "-rf", f"/srv/{name}")


@pytest.fixture
def claimed(scene: Scene) -> Iterator[str]:
    """Name of a claim that is bound to a hostPath PersistentVolume."""
    path = f"/srv/{scene.namespace}/claimed"
    yield from _bound(scene, "claimed", hostPath={"path": path, "type": "DirectoryOrCreate"})


@pytest.fixture
def local(scene: Scene) -> Iterator[str]:
    """Name of a claim that is bound to a local PersistentVolume of the first node."""
    path, node = f"/srv/{scene.namespace}/disk", scene.nodes[0]
    scene.cluster.node_exec(node, "mkdir", "-p", path)
    yield from _bound(scene, "data", local={"path": path}, nodeAffinity=affinity_to(node))


def _there(scene: Scene, node: str) -> str:
    """All that is in the directories of a node."""
    return str(scene.cluster.node_exec(node, "find", "/srv", "-path", f"/srv/{scene.namespace}*"))


def _refusals(status: dict[str, Any]) -> list[str]:
    assert status["phase"] == "Rejected", status
    return [item["message"] for item in status["obstacles"]]


@pytest.mark.support
def test_redis_on_directories_of_its_node(scene: Scene, claimed: str) -> None:
    """Every INCR that was answered is in the file, after a move and a kill on the target."""
    first, second = scene.nodes[0], scene.nodes[1]
    base = f"/srv/{scene.namespace}"
    volumes = {
        "/data": {"hostPath": {"path": f"{base}/data", "type": "DirectoryOrCreate"}},
        "/claimed": {"persistentVolumeClaim": {"claimName": claimed}},
    }
    scene.cluster.apply(
        workloads.pod(
            "server", scene.namespace, scene.cluster.workload_image("servers"), node=first,
            port=6379, command=list(REDIS.command), volumes=volumes,
        )
    )  # fmt: skip
    scene.cluster.wait_ready("server", scene.namespace)
    exec_in(scene, "server", "sh", "-c", "echo kept > /claimed/note; ln -s /etc/shadow /claimed/l")

    told = _refusals(scene.migrate("server", second))
    assert [text for text in told if "v0" in text and "spec.copyVolumes" in text], told
    assert [text for text in told if "v1" in text and "spec.copyVolumes" in text], told

    address = str(scene.pod("server")["status"]["podIP"])
    using = use(scene, REDIS, address)
    names = ["v0", "v1"]
    tried = scene.must_succeed("server", second, dryRun=True, copyVolumes=names)
    assert tried["predictedFreezeMilliseconds"] > 0
    assert _there(scene, second) == ""
    moves = [scene.must_succeed("server", second, copyVolumes=names)]
    assert f"{base}/claimed/note" in _there(scene, second)
    seen = report(using)
    assert seen["error"] is None, seen

    crash(scene, "server", second)
    wanted = [str(-(-answers // 3)) for answers in seen["each"]]
    keys = [f"n:c{number}" for number in range(len(wanted))]
    assert exec_in(scene, "server", "redis-cli", "mget", *keys).split() == wanted
    assert exec_in(scene, "server", "cat", "/claimed/note") == "kept\n"
    assert exec_in(scene, "server", "readlink", "/claimed/l") == "/etc/shadow\n"

    # what it has left behind is a person's to remove
    told = _refusals(scene.migrate("server", first, copyVolumes=names))
    assert [text for text in told if f"{base}/data of the target is not empty" in text], told
    scene.cluster.node_exec(first, "rm", "-rf", base)
    moves.append(scene.must_succeed("server", first, copyVolumes=names))
    assert exec_in(scene, "server", "redis-cli", "mget", *keys).split() == wanted
    scene.record("Redis on hostPath and a claim of it, 50 connections", moves, seen["worst_ms"])


def test_redis_on_a_local_volume_of_its_node(scene: Scene, local: str) -> None:
    """The volume and its claim stay what they are, but for the node; so does a pod that starts
    anew: on the target, with every INCR that was answered."""
    first, second = scene.nodes[0], scene.nodes[1]
    one = workloads.pod(
        "server", scene.namespace, scene.cluster.workload_image("servers"), port=6379,
        command=list(REDIS.command),
        volumes={"/data": {"persistentVolumeClaim": {"claimName": local}}},
    )  # fmt: skip
    labels = {"app": "server"}
    scene.cluster.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": "server", "namespace": scene.namespace},
            "spec": {
                "serviceName": "server",
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": one["spec"]},
            },
        }
    )
    scene.cluster.wait_ready("server-0", scene.namespace)
    before = scene.pod("server-0")
    assert before["spec"]["nodeName"] == first
    told = _refusals(scene.migrate("server-0", second))
    assert [text for text in told if "name v0 in spec.copyVolumes" in text], told

    using = use(scene, REDIS, str(before["status"]["podIP"]))
    scene.must_succeed("server-0", second, copyVolumes=["v0"])
    seen = report(using)
    assert seen["error"] is None, seen
    volume = scene.cluster.get("persistentvolume", scene.namespace)
    assert named_nodes(volume) == [second]
    assert volume["spec"]["claimRef"]["name"] == local

    scene.cluster.kubectl("delete", "pod", "server-0", "-n", scene.namespace)
    scene.cluster.wait_ready("server-0", scene.namespace)
    assert scene.pod("server-0")["spec"]["nodeName"] == second
    wanted = [str(-(-answers // 3)) for answers in seen["each"]]
    keys = [f"n:c{number}" for number in range(len(wanted))]
    assert exec_in(scene, "server-0", "redis-cli", "mget", *keys).split() == wanted
