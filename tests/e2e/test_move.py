"""A pod moves and its users do not notice."""

from __future__ import annotations

import pytest

from e2e.support import Scene


@pytest.mark.parametrize("kind", ["statefulset", "deployment", "pod"])
def test_there_and_back(scene: Scene, kind: str) -> None:
    first, second = scene.nodes[:2]
    pod = scene.start(kind, "redis", first)
    address = scene.pod(pod)["status"]["podIP"]
    with scene.cluster.counter(address) as client:
        for target in (second, first):
            status = scene.must_succeed(pod, target)
            assert status["freezeMilliseconds"] > 0
            assert status["transferredBytes"] > 0
            moved = scene.ready_pod("redis")
            if kind != "deployment":
                assert moved == pod
            pod = moved
            seen = scene.pod(pod)
            assert seen["spec"]["nodeName"] == target
            assert seen["status"]["podIP"] == address
            assert seen["status"]["containerStatuses"][0]["restartCount"] == 0
        report = client.stop()
    assert report["ok"], report


def test_five_in_a_row_through_three_nodes(scene: Scene) -> None:
    first, second, third = scene.nodes
    pod = scene.start("statefulset", "redis", first)
    address = scene.pod(pod)["status"]["podIP"]
    with scene.cluster.counter(address) as client:
        for target in (second, third, first, second, first):
            scene.must_succeed(pod, target)
            assert scene.pod(pod)["spec"]["nodeName"] == target
        report = client.stop()
    assert report["ok"], report


def test_one_gibibyte(scene: Scene) -> None:
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    address = scene.pod(pod)["status"]["podIP"]
    scene.cluster.fill(address, 1024)
    digest = scene.cluster.redis(address, "DEBUG", "DIGEST")
    status = scene.must_succeed(pod, scene.nodes[1])
    assert status["transferredBytes"] > 900 * 2**20
    assert scene.cluster.redis(address, "DEBUG", "DIGEST") == digest


def test_exec_and_a_later_restart_are_ordinary_ones(scene: Scene) -> None:
    """After the move the container is the kubelet's like any other."""
    pod = scene.start("statefulset", "redis", scene.nodes[0])
    scene.must_succeed(pod, scene.nodes[1])
    scene.ready_pod("redis")
    inside = ("exec", pod, "-n", scene.namespace, "--", "redis-cli")
    assert scene.cluster.kubectl(*inside, "set", "a", "b").strip() == "OK"
    scene.cluster.kubectl(*inside, "shutdown", "nosave", check=False)
    scene.cluster.kubectl(
        *("wait", "pod", pod, "-n", scene.namespace, "--timeout=60s"),
        "--for=jsonpath={.status.containerStatuses[0].restartCount}=1",
    )
    scene.cluster.wait_ready(pod, scene.namespace)
