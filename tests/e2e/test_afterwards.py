"""After its move a pod is a pod like any other: probes, limits, files, logs, ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.moving import exec_in, start, there_and_back
from e2e.support import Scene
from lab import workloads

pytestmark = pytest.mark.support
Object = dict[str, Any]
# One failure is enough to be restarted, and an answer may take as long as a freeze does.
_STRICT = {"periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 1}
_PATIENT = {"periodSeconds": 1, "failureThreshold": 60}
_ETCD = (
    *("etcd", "--data-dir=/data/etcd", "--unsafe-no-fsync"),
    *("--listen-client-urls=http://0.0.0.0:2379", "--advertise-client-urls=http://127.0.0.1:2379"),
)


def until(scene: Scene, good: Callable[[Object], bool], seconds: float = 90.0) -> Object:
    """The pod, as soon as it is as asked for."""
    end = time.monotonic() + seconds
    while not good(seen := scene.pod("server")):
        assert time.monotonic() < end, json.dumps(seen["status"], indent=1)
        time.sleep(0.2)
    return seen


def ready(pod: Object) -> bool:
    """What the Pod says of itself."""
    conditions = pod["status"]["conditions"]
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def container(pod: Object, name: str = "main") -> Object:
    """Its status."""
    return next(one for one in pod["status"]["containerStatuses"] if one["name"] == name)


def test_probes_of_every_kind(scene: Scene) -> None:
    """httpGet, gRPC, tcpSocket and exec: none fails for the move; each does its work after it."""
    image = scene.cluster.workload_image("servers")
    probes: dict[str, Object] = {
        "http": {"httpGet": {"port": 8080, "path": "/"}},
        "grpc": {"grpc": {"port": 2379}},
        "tcp": {"tcpSocket": {"port": 11211}},
        "exec": {"exec": {"command": ["test", "-e", "/data/well"]}},
    }
    commands = {
        "http": ["python3", "/lab/health.py"],
        "grpc": [*_ETCD],
        "tcp": ["memcached", "-u", "nobody", "-l", "0.0.0.0"],
        "exec": ["sleep", "infinity"],
    }
    made = workloads.pod(
        "server", scene.namespace, image, node=scene.nodes[0], volumes={"/data": {"emptyDir": {}}}
    )
    template = made["spec"]["containers"][0]
    made["spec"]["containers"] = [
        {
            **template,
            "name": name,
            "command": commands[name],
            "startupProbe": {**probe, **_PATIENT},
            "livenessProbe": {**probe, **_STRICT},
            "readinessProbe": {**probe, **_STRICT},
        }
        for name, probe in probes.items()
    ]
    scene.cluster.apply(made)
    scene.cluster.wait_ready("server", scene.namespace)
    there_and_back(scene)
    seen = until(scene, ready)
    assert {one["name"]: one["restartCount"] for one in seen["status"]["containerStatuses"]} == (
        dict.fromkeys(probes, 0)
    )
    told = [event["message"] for event in scene.events("Pod", "server")]
    assert [text for text in told if "failed liveness" in text] == []

    # what is not well is restarted, what is well is not
    exec_in(scene, "server", "rm", "/data/well")
    until(scene, lambda pod: container(pod, "http")["restartCount"] > 0)
    scene.cluster.kubectl(
        *("exec", "server", "-n", scene.namespace, "-c", "http", "--"), "touch", "/data/well"
    )
    seen = until(scene, ready)
    assert container(seen, "grpc")["restartCount"] == 0
    assert container(seen, "tcp")["restartCount"] == 0


def limits_of(scene: Scene) -> list[str]:
    """Memory limit, quota and period that the node's kernel keeps for the pod's container."""
    pod = scene.pod("server")
    number = container(pod)["containerID"].partition("://")[2]
    script = (
        f"cd /sys/fs/cgroup; at() {{ find $1 -type d -name '*{number}*' | head -n 1; }}\n"
        "if [ -e memory ]; then cat $(at memory)/memory.limit_in_bytes"
        " $(at cpu)/cpu.cfs_quota_us $(at cpu)/cpu.cfs_period_us;\n"
        "else cat $(at .)/memory.max $(at .)/cpu.max; fi"
    )
    return scene.cluster.node_exec(pod["spec"]["nodeName"], "sh", "-c", script).split()


def test_files_logs_limits_and_the_end(scene: Scene, tmp_path: Path) -> None:
    program = "echo before; until [ -e /data/leave ]; do sleep 0.1; done; echo after; "
    program += "echo good-bye >/dev/termination-log; exit 7"
    limits = {"limits": {"memory": "96Mi", "cpu": "250m"}}
    start(scene, "servers", None, "sh", "-c", program, resources=limits)
    there_and_back(scene)
    until(scene, ready)

    assert scene.cluster.kubectl("logs", "server", "-n", scene.namespace) == "before\n"

    # kubectl cp, both ways
    text = tmp_path / "text"
    text.write_text("there and back\n")
    place = f"{scene.namespace}/server:/data/text"
    scene.cluster.kubectl("cp", str(text), place)
    assert exec_in(scene, "server", "cat", "/data/text") == "there and back\n"
    scene.cluster.kubectl("cp", place, str(tmp_path / "again"))
    assert (tmp_path / "again").read_text() == text.read_text()

    assert limits_of(scene) == [str(96 << 20), "25000", "100000"]

    exec_in(scene, "server", "touch", "/data/leave")
    seen = until(scene, lambda pod: container(pod)["restartCount"] == 1)
    ended = container(seen)["lastState"]["terminated"]
    assert (ended["exitCode"], ended["message"]) == (7, "good-bye\n")
