"""What processes hold moves with them: one of each, checked by the program that holds it."""

from __future__ import annotations

import json
import sys
from typing import Any

from e2e.support import Scene
from lab import workloads

PORT = 7000
_ASK = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
connection.settimeout(60)
connection.sendall(b"?")
while data := connection.recv(65536):
    sys.stdout.write(data.decode())
"""


def ask(scene: Scene, address: str) -> dict[str, str]:
    """Result of every check of ``lab/kernelobjects`` that is not ``ok``."""
    said = scene.cluster.run("client", "exec", "--", sys.executable, "-c", _ASK, address, str(PORT))
    results: dict[str, str] = json.loads(said)
    assert len(results) > 60
    return {name: result for name, result in results.items() if result != "ok"}


def test_every_kernel_object_there_and_back(scene: Scene) -> None:
    image = scene.cluster.workload_image("kernelobjects")
    volumes: dict[str, dict[str, Any]] = {
        "/data": {"emptyDir": {}},
        "/memory": {"emptyDir": {"medium": "Memory"}},
    }
    scene.cluster.apply(
        workloads.pod(
            "objects", scene.namespace, image, node=scene.nodes[0], port=PORT, volumes=volumes
        )
    )
    scene.cluster.wait_ready("objects", scene.namespace)
    address = scene.pod("objects")["status"]["podIP"]
    before = ask(scene, address)
    assert before == {}
    for target in (scene.nodes[1], scene.nodes[0]):
        scene.must_succeed("objects", target)
        after = ask(scene, address)
        assert after == {}, "\n".join(f"{name}: {said}" for name, said in after.items())
