"""Servers move while many clients talk to them; every reply is right."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from e2e.support import Scene
from lab import workloads
from lab.cluster import ROOT

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

_DATAGRAMS = """
import socket, sys, threading, os
ended = threading.Event()
threading.Thread(target=lambda: (os.read(0, 1), ended.set()), daemon=True).start()
talk = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
talk.connect((sys.argv[1], 7007))
talk.settimeout(20)
number = 0
while not ended.is_set():
    number += 1
    talk.send(b"%d" % number)
    answer = talk.recv(100)
    assert answer == b"%d %d" % (number, number), (number, answer)
    if number == 1: print("begun", flush=True)
print(number)
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


def test_nodejs_with_300_connections(scene: Scene) -> None:
    address = start(scene, 7000, "node", "/lab/counters.mjs")
    script = str(ROOT / "lab" / "connections.py")
    running = client(scene, script, address, "7000", "300")
    there_and_back(scene, "Node.js, 300 connections")
    report = json.loads(end(running))
    assert report["faults"] == []
    assert report["answered"] > 300 * 10


def test_udp_echo_loses_nothing(scene: Scene) -> None:
    """Stop and wait: a datagram that the freeze swallows would stop the client."""
    address = start(scene, 7000, "python3", "/lab/udp_echo.py")
    running = client(scene, "-c", _DATAGRAMS, address)
    there_and_back(scene, "UDP echo")
    assert int(end(running)) > 100
