"""Pods with a volume of a real network file system (sshfs over FUSE), mounted by a CSI driver."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.moving import CLIENTS, client, exec_in, report, there_and_back
from e2e.support import Scene
from lab import network_volume, workloads

pytestmark = pytest.mark.support

_AWAY_MS = 5  # so far is the server: what is written comes there late
_CLAIM = {"/net": {"persistentVolumeClaim": {"claimName": "shared"}}}
_WRITER = """
import itertools, time
with open('/net/log', 'a') as log:
    for number in itertools.count(1):
        print(number, file=log, flush=True)
        time.sleep(0.01)
"""


@pytest.fixture
def volume(scene: Scene) -> Iterator[str]:
    """Path of the volume in its server, the pod ``files``; pods mount it with ``_CLAIM``."""
    image = scene.cluster.workload_image("netfiles")
    name = scene.namespace
    scene.cluster.apply(
        network_volume.server("files", name, image, away_ms=_AWAY_MS),
        *network_volume.driver(name, image),
    )
    scene.cluster.wait_ready("files", name)
    address = str(scene.pod("files")["status"]["podIP"])
    scene.cluster.apply(*network_volume.volume(name, name, "shared", address))
    yield "/export"
    ((label, value),) = network_volume.LABELS.items()
    scene.cluster.kubectl(
        *("delete", "statefulsets,podmigrations", "--all", "-n", name, "--timeout=120s")
    )
    # before the driver, which has to unmount
    scene.cluster.kubectl(
        *("delete", "pods", "-n", name, "-l", f"{label}!={value}", "--timeout=120s")
    )
    # before the next one, which has the same sockets
    scene.cluster.kubectl(
        *("delete", "daemonsets", "--all", "-n", name, "--cascade=foreground", "--timeout=60s")
    )
    scene.cluster.kubectl("delete", "persistentvolume", name, "--wait=false")
    scene.cluster.kubectl("delete", "csidriver", network_volume.DRIVER)


def _start(
    scene: Scene,
    name: str,
    node: str,
    *command: str,
    port: int | None = None,
    directory: str | None = None,
) -> None:
    """A StatefulSet ``name`` of one pod; ``directory``: all that it sees of the volume."""
    image = scene.cluster.workload_image("servers")
    manifest = workloads.pod(
        name, scene.namespace, image, node=node, port=port, command=list(command), volumes=_CLAIM
    )
    if directory is not None:
        (mount,) = manifest["spec"]["containers"][0]["volumeMounts"]
        mount["subPath"] = directory
    scene.cluster.apply(workloads.replicated(manifest))
    scene.cluster.wait_ready(f"{name}-0", scene.namespace)


def _mounts(scene: Scene, node: str) -> str:
    """All of the lab's file system that a node has mounted."""
    return str(
        scene.cluster.node_exec(
            node, "grep", "-F", " fuse.sshfs ", "/proc/1/mountinfo", check=False
        )
    )


def _await_released(scene: Scene, node: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while left := _mounts(scene, node):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def _done(scene: Scene, did: str, pod_uid: str) -> float:
    """When a driver has done something for a pod, once (Unix seconds)."""
    ((label, value),) = network_volume.LABELS.items()
    logs = scene.cluster.kubectl(
        *("logs", "-n", scene.namespace, "-l", f"{label}={value}", "--tail=-1")
    )
    said = [json.loads(line) for line in logs.splitlines() if line.startswith("{")]
    (at,) = [one["at"] for one in said if one["did"] == did and f"/{pod_uid}/" in one["path"]]
    return float(at)


def _digests(scene: Scene, pod: str, directory: str) -> dict[str, str]:
    names = ("appended", "written", "mapped")
    shown = exec_in(scene, pod, "sha256sum", *(f"{directory}/{name}" for name in names))
    return {line.rpartition("/")[2]: line.split()[0] for line in shown.splitlines()}


def test_every_line_is_there_once(scene: Scene, volume: str) -> None:
    """Appended, written at a descriptor's offset, and through a shared map; nothing is synced."""
    first, second = scene.nodes[:2]
    _start(scene, "ledger", first, "python3", "/lab/ledger.py", "/net", port=7000)
    before = scene.pod("ledger-0")
    assert _mounts(scene, first)
    assert not _mounts(scene, second)
    using = client(scene, str(CLIENTS / "ledgers.py"), before["status"]["podIP"], "7000")
    moves: list[dict[str, Any]] = []
    for source, target in ((first, second), (second, first)):
        old = scene.pod("ledger-0")["metadata"]["uid"]
        moves.append(scene.must_succeed("ledger-0", target))
        new = scene.pod("ledger-0")["metadata"]["uid"]
        _await_released(scene, source)
        assert _done(scene, "mounted", new) < _done(scene, "unmounted", old)
    seen = report(using)
    assert seen["error"] is None, seen
    wanted = {"appended": seen["content"], "written": seen["content"], "mapped": seen["mapped"]}
    assert _digests(scene, "ledger-0", "/net") == wanted
    assert _digests(scene, "files", volume) == wanted
    scene.record("files on sshfs (CSI, ReadWriteMany), 4 connections", moves, seen["worst_ms"])


def test_reader_of_what_another_node_writes(scene: Scene, volume: str) -> None:
    """The file grows while its reader stands still: it opens it again as it is then."""
    _start(scene, "writer", scene.nodes[1], "python3", "-c", _WRITER, directory="logs")
    reader = ("python3", "/lab/reader.py", "/net/log", "/tmp/seen")
    _start(scene, "reader", scene.nodes[0], *reader, directory="logs")
    until = "until [ $(cat /tmp/seen || echo 0) -gt $0 ]; do sleep 0.1; done; cat /tmp/seen"

    def read_on(after: str) -> str:
        return exec_in(scene, "reader-0", "timeout", "60", "bash", "-c", until, after)

    seen = read_on("0")
    moves = there_and_back(scene, "reader-0")
    assert [one["epoch"] for one in moves] == [1, 1]
    end = exec_in(scene, "files", "tail", "-n1", f"{volume}/logs/log").strip()
    assert int(seen) < int(end) <= int(read_on(end))
    (container,) = scene.pod("reader-0")["status"]["containerStatuses"]
    assert container["restartCount"] == 0


def test_refused_by_name(scene: Scene, volume: str) -> None:
    holder = ("python3", "/lab/holder.py", "/net", "locked", "removed")
    _start(scene, "holder", scene.nodes[0], *holder, port=7000)
    before = scene.pod("holder-0")
    status = scene.migrate("holder-0", scene.nodes[1])
    assert status["phase"] == "Rejected", status
    assert {one["reason"] for one in status["obstacles"]} == {"FileCannotFollow"}, status
    told = [one["message"] for one in status["obstacles"]]
    assert len(told) == 2
    assert [text for text in told if "holds a lock on /net/locked" in text], told
    assert [text for text in told if "removed file of a network file system" in text], told
    after = scene.pod("holder-0")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["containerStatuses"] == before["status"]["containerStatuses"]
    assert not _mounts(scene, scene.nodes[1])
    assert volume in exec_in(scene, "files", "ls", "-d", f"{volume}/locked")
