"""A pod that is a client: its connections to a Service and to an outside server go on."""

from __future__ import annotations

import json
import time
from typing import Any

from e2e import moving
from e2e.support import Scene
from lab import workloads
from lab.cluster import LAB_IMAGE, ROOT

_CONNECTIONS = 8
# A client ends with its standard input, which a container does not have.
_COUNT = """
for number in $(seq {connections}); do
  sleep infinity | python3 /lab/client.py count {address} {port} --key k$number --interval-ms 5 &
done
wait
"""


def counting(address: str, port: int, connections: int) -> dict[str, Any]:
    """A container that counts on some connections."""
    script = _COUNT.format(address=address, port=port, connections=connections)
    return {"imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", script]}


def stores(scene: Scene) -> list[str]:
    """Addresses of two Redis pods behind the Service ``store``."""
    deployment = workloads.deployment("store", scene.namespace, node=scene.nodes[-1])
    deployment["spec"]["replicas"] = 2
    scene.cluster.apply(workloads.service("store", scene.namespace), deployment)
    scene.cluster.kubectl(
        "rollout", "status", "deployment/store", "-n", scene.namespace, "--timeout=60s"
    )
    found = scene.cluster.list("pods", scene.namespace, "-l", "app=store")
    return [pod["status"]["podIP"] for pod in found]


def connected(scene: Scene, servers: list[str], pod_ip: str) -> set[tuple[str, str]]:
    """(server, client's port) of each connection that the servers have with the pod."""
    seen = set()
    for server in servers:
        for line in scene.cluster.redis(server, "CLIENT", "LIST").splitlines():
            fields = dict(part.partition("=")[::2] for part in line.split())
            host, _, port = fields.get("addr", "").rpartition(":")
            if host == pod_ip:
                seen.add((server, port))
    return seen


def lines(scene: Scene, container: str, since: float) -> list[dict[str, Any]]:
    """What the clients of a container have said since then (Unix seconds)."""
    words = ("logs", "client", "-n", scene.namespace, "-c", container)
    said = [json.loads(line) for line in scene.cluster.kubectl(*words).splitlines()]
    return [line for line in said if line.get("at", since) >= since]


def await_ticks(scene: Scene, container: str, count: int, seconds: float = 30.0) -> None:
    """Return when the clients have gone on for a while; fail with what one of them has seen."""
    since, deadline = time.time(), time.monotonic() + seconds
    while True:
        said = lines(scene, container, since)
        assert not [line for line in said if line["type"] == "report"], said
        if len(said) >= count:
            return
        assert time.monotonic() < deadline, said
        time.sleep(0.5)


def client_pod(scene: Scene, outside: str) -> workloads.Manifest:
    """Counts through the Service ``store``, and outside the cluster."""
    inside = counting(scene.cluster_ip("store"), 6379, _CONNECTIONS)
    name, node = "client", scene.nodes[0]
    pod = workloads.pod(name, scene.namespace, LAB_IMAGE, node=node, **inside)
    second = {"name": "outside", "image": LAB_IMAGE, **counting(outside, 7001, 1)}
    pod["spec"]["containers"].append(second)
    return pod


def test_connections_of_a_client_pod_go_on(scene: Scene) -> None:
    servers = stores(scene)
    outside = scene.cluster.outside_address()
    script = str(ROOT / "lab" / "numbers.py")
    with moving.client(scene, script, outside, "7001"):
        scene.cluster.apply(client_pod(scene, outside))
        scene.cluster.wait_ready("client", scene.namespace)
        address = scene.pod("client")["status"]["podIP"]
        await_ticks(scene, "main", 2 * _CONNECTIONS)
        before = connected(scene, servers, address)
        assert len(before) == _CONNECTIONS
        for target in (scene.nodes[1], scene.nodes[0]):
            scene.must_succeed("client", target)
            await_ticks(scene, "main", 3 * _CONNECTIONS)
            await_ticks(scene, "outside", 3)
            assert connected(scene, servers, address) == before
