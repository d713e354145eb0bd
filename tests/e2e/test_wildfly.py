"""WildFly with a servlet that counts in memory: the integer goes on, whatever happens."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.moving import many, report, there_and_back
from e2e.support import Scene
from lab import workloads
from lab.cluster import SYSTEM_NAMESPACE

pytestmark = pytest.mark.support
PORT = 8080
KEY = "godwit-e2e-wildfly"
DIRECTORY = "/var/lib/godwit/checkpoints"
WORKLOAD = "WildFly 38 on OpenJDK 25, a servlet that counts"

_FIRST = """
import sys, time, urllib.request
end = time.monotonic() + 180
while True:
    try:
        print(urllib.request.urlopen(f"http://{sys.argv[1]}:8080/counter/", timeout=5).read().decode())
        break
    except OSError:
        if time.monotonic() > end:
            raise
        time.sleep(0.02)
"""  # noqa: E501


@pytest.fixture
def key(scene: Scene) -> Iterator[bytes]:
    data = os.urandom(32)
    give_key(scene, data)
    yield data
    scene.cluster.kubectl("delete", "secret", KEY, "-n", SYSTEM_NAMESPACE)
    for node in scene.nodes:
        scene.cluster.node_exec(node, "rm", "-rf", f"{DIRECTORY}/{scene.namespace}")


def give_key(scene: Scene, data: bytes) -> None:
    scene.cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": KEY, "namespace": SYSTEM_NAMESPACE},
            "type": "godwit.io/checkpoint-key",
            "data": {"key": base64.b64encode(data).decode()},
        }
    )


def wildfly(scene: Scene, name: str = "server") -> None:
    """Ready when its port is open; the servlet answers a little later."""
    scene.cluster.apply(
        workloads.pod(
            name, scene.namespace, scene.cluster.workload_image("java"), node=scene.nodes[0],
            port=PORT, command=["/opt/wildfly/bin/standalone.sh", "-b", "0.0.0.0"],
            env=[{"name": "JAVA_OPTS", "value": "-Xms64m -Xmx256m"}],
        )
    )  # fmt: skip


def first_answer(scene: Scene, pod: str = "server") -> int:
    """Asks without pause until the servlet gives a number."""
    scene.cluster.kubectl(
        *("wait", "pod", pod, "-n", scene.namespace, "--timeout=180s"),
        "--for=jsonpath={.status.podIP}",
    )
    address = scene.pod(pod)["status"]["podIP"]
    said = scene.cluster.run("client", "exec", "--", sys.executable, "-c", _FIRST, address)
    return int(said)


def finished(scene: Scene, kind: str, name: str, **spec: Any) -> dict[str, Any]:
    """Make a PodCheckpoint or PodRestore and await its success."""
    scene.cluster.apply(
        {
            "apiVersion": "godwit.io/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "namespace": scene.namespace},
            "spec": {"keySecretName": KEY, **spec},
        }
    )
    scene.cluster.kubectl(
        *("wait", kind.lower(), name, "-n", scene.namespace, "--timeout=240s"),
        "--for=jsonpath={.status.phase}=Succeeded",
    )
    return dict(scene.cluster.get(kind.lower(), name, scene.namespace)["status"])


def test_the_integer_continues_through_moves(scene: Scene) -> None:
    wildfly(scene)
    assert first_answer(scene) == 1
    address = scene.pod("server")["status"]["podIP"]
    using = many(scene, "http", address, PORT, 1, "--pause-ms", "10")
    moves = there_and_back(scene)
    seen = report(using)
    assert seen["error"] is None, seen["error"]
    assert seen["numbers"] == list(range(2, seen["answers"] + 2))
    assert first_answer(scene) == seen["answers"] + 2
    scene.record(WORKLOAD, moves, seen["worst_ms"])


def test_the_integer_continues_through_a_checkpoint_that_leaves_it_running(
    scene: Scene, key: bytes
) -> None:
    wildfly(scene)
    first_answer(scene)
    address = scene.pod("server")["status"]["podIP"]
    using = many(scene, "http", address, PORT, 1, "--pause-ms", "10")
    status = finished(scene, "PodCheckpoint", "running", podName="server")
    seen = report(using)
    assert seen["error"] is None, seen["error"]
    assert seen["numbers"] == list(range(2, seen["answers"] + 2))
    moves = [
        {
            "freezeMilliseconds": status["freezeMilliseconds"],
            "transferredBytes": status["archiveBytes"],
        }
    ]
    scene.record("WildFly, checkpoint that leaves it running", moves, seen["worst_ms"])


def test_the_integer_continues_after_all_nodes_were_gone(
    scene: Scene, key: bytes, tmp_path: Path
) -> None:
    """Checkpoint and stop; cluster destroyed, another made; restore beside a fresh start."""
    wildfly(scene)
    last = first_answer(scene)
    for _ in range(5):
        last = first_answer(scene)
    finished(scene, "PodCheckpoint", "stopped", podName="server", leaveRunning=False)
    file, path = tmp_path / "archive", f"{DIRECTORY}/{scene.namespace}/stopped.godwit"
    with file.open("wb") as out:
        command = scene.cluster.argv("node", "exec", scene.nodes[0], "--", "cat", path)
        subprocess.run(command, stdout=out, check=True)

    scene.cluster.down()
    scene.cluster.up(len(scene.nodes))
    scene.cluster.build_images()
    scene.cluster.install()
    scene.open()
    give_key(scene, key)
    there = scene.nodes[1]
    script = f"mkdir -p {DIRECTORY}/{scene.namespace} && cat > {path}"
    with file.open("rb") as archive:
        command = scene.cluster.argv("node", "exec", there, "--", "sh", "-c", script)
        subprocess.run(command, stdin=archive, check=True)

    scene.cluster.workload_image("java")
    begun = time.monotonic()
    wildfly(scene, "fresh")
    assert first_answer(scene, "fresh") == 1
    fresh = time.monotonic() - begun
    begun = time.monotonic()
    finished(scene, "PodRestore", "back", archive="stopped", nodeName=there)
    assert first_answer(scene) == last + 1
    restored = time.monotonic() - begun
    assert first_answer(scene) == last + 2
    scene.note(first_answer="WildFly 38", fresh_s=round(fresh, 2), restored_s=round(restored, 2))
