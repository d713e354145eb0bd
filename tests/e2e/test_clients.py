"""The pod that moves is the client: its own connections live on."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from e2e.moving import CLIENTS, await_ready, report, there_and_back
from e2e.support import Scene
from lab import workloads

pytestmark = pytest.mark.support
CONNECTIONS = 300


def start_client(scene: Scene, address: str) -> None:
    """A pod that holds CONNECTIONS connections; its report is the end of its log."""
    made = workloads.pod(
        "client", scene.namespace, scene.cluster.workload_image("servers"), node=scene.nodes[0],
        command=[
            "python3", "-u", "/lab/many.py", "lines", address, "7000", "--until-signal",
            "--connections", str(CONNECTIONS),
        ],
        readinessProbe={
            "exec": {"command": ["sh", "-c", f"[ $(ls /proc/1/fd | wc -l) -gt {CONNECTIONS} ]"]},
            "periodSeconds": 1,
        },
    )  # fmt: skip
    made["spec"]["restartPolicy"] = "Never"
    scene.cluster.apply(made)
    scene.cluster.wait_ready("client", scene.namespace)


def end_client(scene: Scene) -> dict[str, Any]:
    """What the pod has seen."""
    scene.cluster.kubectl("exec", "client", "-n", scene.namespace, "--", "sh", "-c", "kill -TERM 1")
    scene.cluster.kubectl(
        *("wait", "pod", "client", "-n", scene.namespace, "--timeout=60s"),
        "--for=jsonpath={.status.phase}=Succeeded",
    )
    logs = scene.cluster.kubectl("logs", "client", "-n", scene.namespace)
    found = json.loads(logs.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def agree(client: dict[str, Any], server: dict[str, Any]) -> None:
    """Every request was answered once, on the connections of the beginning."""
    assert client["error"] is None, client
    assert len(client["each"]) == client["locals"] == server["connections"] == CONNECTIONS
    assert client["answers"] == server["lines"]
    assert min(client["each"]) > 2


def test_of_a_server_outside_the_cluster(scene: Scene) -> None:
    script = str(CLIENTS / "lines.py")
    server = await_ready(
        scene.cluster.argv("client", "exec", "--", sys.executable, script, "--report")
    )
    routes = scene.cluster.node_exec(scene.nodes[0], "ip", "-4", "route", "show", "default")
    start_client(scene, routes.split()[2])
    moves = there_and_back(scene, "client")
    client = end_client(scene)
    seen = report(server)
    agree(client, seen)
    scene.record(f"client of a server outside, {CONNECTIONS} connections", moves, seen["gap_ms"])


def test_of_a_cluster_ip(scene: Scene) -> None:
    """The server is another pod, on the node that the client leaves and comes back to."""
    image = scene.cluster.workload_image("servers")
    made = workloads.pod(
        "lines", scene.namespace, image, node=scene.nodes[0], command=["sleep", "infinity"]
    )
    service = workloads.service("lines", scene.namespace)
    service["spec"]["ports"] = [{"port": 7000}]
    scene.cluster.apply(made, service)
    scene.cluster.wait_ready("lines", scene.namespace)
    server = await_ready(
        scene.cluster.argv(
            *("kubectl", "exec", "-i", "lines", "-n", scene.namespace, "--"),
            *("python3", "/lab/lines.py", "--report"),
        ),
    )
    start_client(scene, scene.cluster_ip("lines"))
    moves = there_and_back(scene, "client")
    client = end_client(scene)
    seen = report(server)
    agree(client, seen)
    scene.record(f"client of a ClusterIP, {CONNECTIONS} connections", moves, seen["gap_ms"])
