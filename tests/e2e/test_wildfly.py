"""The classic demonstration: WildFly with a servlet whose integer is nowhere but in the heap."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest

from e2e import archives as kept
from e2e.archives import ask, carry, done
from e2e.moving import CLIENTS, client, report, there_and_back, use
from e2e.support import Scene
from lab import workloads
from lab.software import WILDFLY

pytestmark = pytest.mark.support

archives = pytest.fixture(kept.archives)
_MARKER = "/opt/wildfly/standalone/deployments/counter.war.deployed"
_PATH = "/counter/"


def wildfly(scene: Scene, name: str) -> list[dict[str, Any]]:
    """A pod, and a Service that leads to it from its first moment on."""
    service = workloads.service(name, scene.namespace)
    service["spec"] |= {"publishNotReadyAddresses": True, "ports": [{"port": WILDFLY.port}]}
    pod = workloads.pod(
        name, scene.namespace, scene.cluster.workload_image(WILDFLY.image), node=scene.nodes[0],
        command=list(WILDFLY.command),
        env=[{"name": key, "value": value} for key, value in WILDFLY.environment],
        readinessProbe={"exec": {"command": ["test", "-e", _MARKER]}, "periodSeconds": 1},
    )  # fmt: skip
    return [service, pod]


def started(scene: Scene, name: str = "server") -> str:
    """Address of a WildFly that has deployed its servlet."""
    scene.cluster.apply(*wildfly(scene, name))
    scene.cluster.wait_ready(name, scene.namespace)
    return str(scene.pod(name)["status"]["podIP"])


def number(scene: Scene, address: str) -> int:
    """What it answers now, or as soon as it answers."""
    asking = client(scene, str(CLIENTS / "first.py"), address, str(WILDFLY.port), _PATH)
    return int(_said(asking))


def _said(asking: subprocess.Popen[str]) -> str:
    """It ends by itself. Not by ``communicate``, which knows nothing of what ``readline`` has read
    ahead: the answer may have come with the client's first word."""
    with asking:
        assert asking.stdout
        said = asking.stdout.read()
    assert asking.returncode == 0, said
    return said


def test_the_integer_continues_through_moves(scene: Scene) -> None:
    using = use(scene, WILDFLY, started(scene))
    moves = there_and_back(scene)
    seen = report(using)
    assert seen["error"] is None, seen["error"]
    assert sorted(seen["numbers"]) == list(range(1, seen["answers"] + 1))
    scene.record(WILDFLY.row, moves, seen["worst_ms"])


def test_the_integer_continues_through_a_checkpoint(archives: Scene) -> None:
    """The pod runs on under its clients; the archive's copy has the integer of that moment."""
    scene = archives
    using = use(scene, WILDFLY, started(scene))
    left = done(ask(scene, "PodCheckpoint", "running", podName="server"))
    seen = report(using)
    assert seen["error"] is None, seen["error"]
    assert sorted(seen["numbers"]) == list(range(1, seen["answers"] + 1))
    scene.note(checkpoint="WildFly 38", freeze_ms=left["freezeMilliseconds"],
               gap_ms=seen["worst_ms"], bytes=left["archiveBytes"])  # fmt: skip
    done(ask(scene, "PodRestore", "copy", archive="running", podName="copy",
             nodeName=scene.nodes[0]))  # fmt: skip
    copy = number(scene, str(scene.pod("copy")["status"]["podIP"]))
    assert 1 < copy <= seen["answers"]
    assert number(scene, str(scene.pod("server")["status"]["podIP"])) == seen["answers"] + 1


def test_the_integer_continues_after_a_reboot_of_all_nodes(archives: Scene) -> None:
    """Written, power off, power on, restored on another node; beside it a fresh start there."""
    scene = archives
    address = started(scene)
    assert [number(scene, address) for _ in range(5)] == [1, 2, 3, 4, 5]
    done(ask(scene, "PodCheckpoint", "stopped", podName="server", leaveRunning=False))
    scene.cluster.kubectl(
        "wait", "pod", "server", "-n", scene.namespace, "--for=delete", "--timeout=60s"
    )
    scene.cluster.reboot()
    first, second = scene.nodes[:2]
    carry(scene, "stopped", first, second)

    def first_answer(service: str, *objects: dict[str, Any]) -> tuple[int, float]:
        target = scene.cluster_ip(service)
        asking = client(scene, str(CLIENTS / "first.py"), target, str(WILDFLY.port), _PATH)
        begin = time.monotonic()
        scene.cluster.apply(*objects)
        said = _said(asking)
        return int(said), time.monotonic() - begin

    restore = {
        "apiVersion": "godwit.io/v1alpha1",
        "kind": "PodRestore",
        "metadata": {"name": "back", "namespace": scene.namespace},
        "spec": {"archive": "stopped", "keySecretName": kept.KEY, "nodeName": second},
    }
    try:
        continued, restored_s = first_answer("server", restore)
    except AssertionError as late:
        seen = scene.cluster.get("podrestore", "back", scene.namespace).get("status")
        raise AssertionError(seen) from late
    assert continued == 6
    service, pod = wildfly(scene, "fresh")
    pod["spec"]["affinity"] = workloads.preferring(second)["affinity"]
    scene.cluster.apply(service)
    anew, started_s = first_answer("fresh", pod)
    assert anew < 6  # a request that came before the servlet was ready may have been counted
    scene.note(start="WildFly 38 with one servlet, heap up to 256 MiB",
               restored_s=round(restored_s, 2), started_s=round(started_s, 2))  # fmt: skip
