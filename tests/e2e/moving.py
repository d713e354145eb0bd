"""What the tests of real software share: a server that moves, clients that stay."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from e2e.support import Scene
from lab import workloads
from lab.cluster import ROOT
from lab.software import Software

CLIENTS = ROOT / "lab" / "servers"
# The container runtime's filter refuses io_uring, which Node.js uses where it can; without it
# epoll serves.
FILTERED = {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}


def start(scene: Scene, image: str, port: int | None, *command: str, **container: Any) -> str:
    """Address of a pod ``server`` that runs ``command`` of the image ``lab/IMAGE``."""
    scene.cluster.apply(
        workloads.pod(
            "server", scene.namespace, scene.cluster.workload_image(image), node=scene.nodes[0],
            port=port, command=list(command), volumes={"/data": {"emptyDir": {}}},
            **container,
        )
    )  # fmt: skip
    scene.cluster.wait_ready("server", scene.namespace)
    return str(scene.pod("server")["status"]["podIP"])


def start_it(scene: Scene, software: Software, **container: Any) -> str:
    """Address of a pod ``server`` that runs it."""
    environment = [{"name": name, "value": value} for name, value in software.environment]
    return start(
        scene, software.image, None if "readinessProbe" in container else software.port or None,
        *software.command, env=environment, **container,
    )  # fmt: skip


def use(scene: Scene, software: Software, address: str) -> subprocess.Popen[str]:
    """Its client, outside the cluster."""
    script, *words = software.client
    place = (address, str(software.port))
    return client(scene, str(CLIENTS / script), *words, *place, *software.more)


def exec_in(scene: Scene, pod: str, *command: str) -> str:
    """What a command in the pod prints."""
    return scene.cluster.kubectl("exec", pod, "-n", scene.namespace, "--", *command)


def client(scene: Scene, *words: str) -> subprocess.Popen[str]:
    """A Python client outside the cluster that has said ``ready``."""
    return await_ready(scene.cluster.argv("client", "exec", "--", sys.executable, *words))


def client_in(scene: Scene, pod: str, *words: str) -> subprocess.Popen[str]:
    """A client in a pod that has said ``ready``."""
    return await_ready(
        scene.cluster.argv("kubectl", "exec", "-i", pod, "-n", scene.namespace, "--", *words)
    )


def await_ready(command: list[str]) -> subprocess.Popen[str]:
    """Start it; return after its first word."""
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stdout
    assert running.stdout.readline().strip() == "ready"
    return running


def report(running: subprocess.Popen[str]) -> dict[str, Any]:
    """End a client by the end of its input; what it says then."""
    said, _ = running.communicate(timeout=120)
    found = json.loads(said.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def there_and_back(scene: Scene, pod: str = "server") -> list[dict[str, Any]]:
    """Two moves; their final statuses."""
    return [scene.must_succeed(pod, target) for target in (scene.nodes[1], scene.nodes[0])]
