"""Servers move while many clients talk to them; every reply is right."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from e2e.support import Scene
from lab import workloads

pytestmark = pytest.mark.support

_DOWNLOAD = """
import hashlib, socket, sys, time
connection = socket.create_connection((sys.argv[1], 80), 20)
connection.settimeout(60)
connection.sendall(b"GET /large HTTP/1.0\\r\\n\\r\\n")
answer = connection.makefile("rb")
while answer.readline() != b"\\r\\n": pass
digest = hashlib.sha256(answer.read(1 << 16))
print("begun", flush=True)
while data := answer.read(1 << 16):
    digest.update(data)
    time.sleep(0.01)
print(digest.hexdigest())
"""


def start(scene: Scene, port: int, *command: str) -> str:
    """Address of a pod that runs ``command`` of the servers' image."""
    image = scene.cluster.workload_image("servers")
    scene.cluster.apply(
        workloads.pod(
            "server", scene.namespace, image, node=scene.nodes[0], port=port,
            command=list(command), volumes={"/data": {"emptyDir": {}}},
        )
    )  # fmt: skip
    scene.cluster.wait_ready("server", scene.namespace)
    return str(scene.pod("server")["status"]["podIP"])


def client(scene: Scene, *words: str) -> subprocess.Popen[str]:
    """A Python client outside the cluster that has said its first word."""
    running = subprocess.Popen(
        scene.cluster.argv("client", "exec", "--", sys.executable, *words),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout
    assert running.stdout.readline().strip() in ("begun", "ready")
    return running


def end(running: subprocess.Popen[str]) -> str:
    said, _ = running.communicate("\n", timeout=120)
    assert running.returncode == 0, said
    return said.strip()


def there_and_back(scene: Scene, workload: str) -> list[dict[str, Any]]:
    moves = [scene.must_succeed("server", target) for target in (scene.nodes[1], scene.nodes[0])]
    for status in moves:
        scene.record(workload, status)
    return moves


def test_nginx_downloads_are_byte_exact(scene: Scene) -> None:
    address = start(scene, 80, "nginx", "-g", "daemon off;")
    wanted = scene.cluster.kubectl(
        *("exec", "server", "-n", scene.namespace, "--", "sha256sum", "/var/www/html/large")
    ).split()[0]
    downloads = [client(scene, "-c", _DOWNLOAD, address) for _ in range(3)]
    there_and_back(scene, "nginx, 3 downloads of 60 MB in flight")
    assert [end(one) for one in downloads] == [wanted] * 3
