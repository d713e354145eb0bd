"""Clients of the Service keep their connections, and new ones are never refused."""

from __future__ import annotations

from e2e.support import Scene
from lab.cluster import LAB_IMAGE


def test_clients_through_the_cluster_ip_in_twenty_moves(scene: Scene) -> None:
    """One connection lives through all of them, and not one new connection is refused."""
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    service = scene.cluster_ip("redis")
    with (
        scene.cluster.counter(service, "count") as counting,
        scene.cluster.counter(service, "connect", "--interval-ms", "5") as connecting,
    ):
        for number in range(20):
            scene.must_succeed(pod, scene.nodes[(number + 1) % 2])
        counted, connected = counting.stop(), connecting.stop()
    assert counted["ok"], counted
    assert connected["ok"], connected["failures"][:10]
    assert connected["answered"] > 20 * 100


def test_client_pod_on_a_third_node(scene: Scene) -> None:
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    client = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "client", "namespace": scene.namespace},
        "spec": {
            "nodeName": scene.nodes[2],
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 10,
            "containers": [
                {
                    "name": "client",
                    "image": LAB_IMAGE,
                    "imagePullPolicy": "IfNotPresent",
                    "stdin": True,
                    "command": ["python3", "/lab/client.py", "count", address, "6379"],
                }
            ],
        },
    }
    scene.cluster.apply(client)
    scene.cluster.wait_ready("client", scene.namespace)
    scene.must_succeed(pod, scene.nodes[1])
    scene.must_succeed(pod, scene.nodes[0])
    scene.cluster.kubectl("exec", "client", "-n", scene.namespace, "--", "sh", "-c", "kill -TERM 1")
    scene.cluster.kubectl(
        *("wait", "pod", "client", "-n", scene.namespace, "--timeout=60s"),
        "--for=jsonpath={.status.phase}=Succeeded",
    )
    logs = scene.cluster.kubectl("logs", "client", "-n", scene.namespace)
    assert '"type": "report", "ok": true' in logs.splitlines()[-1]
