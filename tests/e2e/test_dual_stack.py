"""A cluster whose pods have an address of each family: both go along, and all that uses them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.support import Scene
from e2e.test_clients import await_ticks, connected, counting
from lab import workloads
from lab.cluster import LAB_IMAGE, Cluster

pytestmark = pytest.mark.support
_EACH = 4  # connections of the client pod by each family


@pytest.fixture(scope="module")
def dual() -> Iterator[Cluster]:
    handle = Cluster(os.environ.get("GODWIT_DUAL_STACK_TESTBED", "e2e-dual"))
    if not os.environ.get("GODWIT_E2E_AS_IS"):
        handle.up(nodes=3, dual_stack=True)
        handle.build_images()
        handle.install()
    yield handle
    if not os.environ.get("GODWIT_E2E_KEEP"):
        handle.down()


@pytest.fixture
def scene(dual: Cluster, request: pytest.FixtureRequest) -> Iterator[Scene]:
    made = Scene(dual, request.node.name)
    made.open()
    yield made
    made.close()


def _service(scene: Scene, name: str) -> dict[str, Any]:
    service = workloads.service(name, scene.namespace)
    service["spec"] |= {"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"]}
    return service


def _on_both(workload: dict[str, Any]) -> dict[str, Any]:
    """A Redis that listens on all addresses of both families."""
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    command = container["command"]
    at = command.index("--bind")
    container["command"] = [*command[: at + 1], "0.0.0.0", "::", *command[at + 2 :]]
    return workload


def _cluster_ips(scene: Scene, name: str) -> list[str]:
    found = scene.cluster.get("service", name, scene.namespace)["spec"]["clusterIPs"]
    assert [":" in one for one in found] == [False, True]
    return list(found)


def _pod_ips(scene: Scene, pod: str) -> list[str]:
    found = [one["ip"] for one in scene.pod(pod)["status"]["podIPs"]]
    assert [":" in one for one in found] == [False, True]
    return found


def test_a_server_keeps_the_clients_of_both_families(scene: Scene) -> None:
    """Clients of both addresses and both ClusterIPs count and connect through three moves."""
    scene.cluster.apply(
        _service(scene, "redis"),
        _on_both(workloads.stateful_set("redis", scene.namespace, node=scene.nodes[0])),
    )
    pod = scene.ready_pod("redis")
    addresses = _pod_ips(scene, pod)
    ways = [*addresses, *_cluster_ips(scene, "redis")]
    with contextlib.ExitStack() as stack:
        counting = [
            stack.enter_context(scene.cluster.counter(way, "count", "--key", f"k{number}"))
            for number, way in enumerate(ways)
        ]
        connecting = [
            stack.enter_context(scene.cluster.counter(way, "connect", "--interval-ms", "20"))
            for way in ways
        ]
        moves = []
        for target in (scene.nodes[1], scene.nodes[2], scene.nodes[0]):
            moves.append(scene.must_succeed(pod, target))
            assert _pod_ips(scene, pod) == addresses
            assert scene.pod(pod)["metadata"]["annotations"]["godwit.io/address"] == ",".join(
                addresses
            )
        reports = [client.stop() for client in (*counting, *connecting)]
    bad = {
        f"{way} {what}": report
        for (what, way), report in zip(
            itertools.product(("count", "connect"), ways), reports, strict=True
        )
        if not report["ok"]
    }
    assert not bad, json.dumps(bad)
    worst = max(report["worst_ms"] for report in reports[: len(ways)])
    scene.record("Redis on IPv4 and IPv6, pod addresses and ClusterIPs", moves, worst)


def test_a_client_keeps_its_servers_of_both_families(scene: Scene) -> None:
    """Connections to both ClusterIPs of a Service of two pods stay with the same pods."""
    store = _on_both(workloads.deployment("store", scene.namespace, node=scene.nodes[-1]))
    store["spec"]["replicas"] = 2
    scene.cluster.apply(_service(scene, "store"), store)
    scene.cluster.kubectl(
        "rollout", "status", "deployment/store", "-n", scene.namespace, "--timeout=60s"
    )
    found = scene.cluster.list("pods", scene.namespace, "-l", "app=store")
    servers = [pod["status"]["podIP"] for pod in found]
    four, six = _cluster_ips(scene, "store")
    client = workloads.pod(
        "client", scene.namespace, LAB_IMAGE, node=scene.nodes[0], **counting(four, 6379, _EACH)
    )
    more = {"name": "six", "image": LAB_IMAGE, **counting(six, 6379, _EACH)}
    more["command"][-1] = more["command"][-1].replace("--key k", "--key six")
    client["spec"]["containers"].append(more)
    scene.cluster.apply(client)
    scene.cluster.wait_ready("client", scene.namespace)

    def held() -> set[tuple[str, str]]:
        seen: set[tuple[str, str]] = set()
        for address in _pod_ips(scene, "client"):
            shown = f"[{address}]" if ":" in address else address
            seen |= connected(scene, servers, shown)
        return seen

    for container in ("main", "six"):
        await_ticks(scene, container, 2 * _EACH)
    before = held()
    assert len(before) == 2 * _EACH
    for target in (scene.nodes[1], scene.nodes[0]):
        scene.must_succeed("client", target)
        for container in ("main", "six"):
            await_ticks(scene, container, 3 * _EACH)
        assert held() == before
