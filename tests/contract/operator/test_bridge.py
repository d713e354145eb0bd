"""The Service bridge, as every kube-proxy sees it: by the real EndpointSlice controller."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from contract.operator.test_moves import Scene, other, scene
from godwit_operator.kube import ENDPOINT_SLICES, SERVICES

__all__ = ["scene"]  # the fixture
pytestmark = pytest.mark.host
ADDRESS = "10.9.0.5"


class ProxyView:
    """What kube-proxy may make of the slices at each moment.

    Where several list an address, it keeps any of those that are not
    terminating (see bridge.py): all of them must say ready.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.bad: list[Any] = []
        self.samples = 0
        self.not_serving = 0

    async def run(self) -> None:
        while True:
            slices = await self._scene.api.list(
                ENDPOINT_SLICES,
                self._scene.namespace,
                labels="kubernetes.io/service-name=redis",
            )
            listed = [
                endpoint["conditions"]
                for item in slices
                for endpoint in item.get("endpoints") or []
                if ADDRESS in endpoint["addresses"] and not endpoint["conditions"]["terminating"]
            ]
            self.samples += 1
            self.not_serving += any(not conditions["serving"] for conditions in listed)
            if not listed or not all(conditions["ready"] for conditions in listed):
                self.bad.append(listed)
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment"])
async def test_the_address_is_ready_all_the_time(scene: Scene, kind: str) -> None:
    pod = await scene.workload(kind)
    for _ in range(100):  # until the controller lists the pod
        slices = await scene.api.list(
            ENDPOINT_SLICES, scene.namespace, labels="kubernetes.io/service-name=redis"
        )
        if any(item.get("endpoints") for item in slices):
            break
        await asyncio.sleep(0.05)
    scene.world.sandbox_seconds = 1.5
    view = ProxyView(scene)
    watch = asyncio.create_task(view.run())
    result = await scene.migrate(pod["metadata"]["name"], target={"nodeName": other(pod)})
    await asyncio.sleep(1.0)
    watch.cancel()
    assert result["status"]["phase"] == "Succeeded"
    assert view.not_serving > 10  # the dangerous time was there
    assert view.samples > 100
    assert view.bad == []
    await scene.nothing_left(result["metadata"]["uid"])


async def test_a_service_that_publishes_anyway_is_left_alone(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    patch = {"spec": {"publishNotReadyAddresses": True}}
    await scene.api.patch(SERVICES, scene.namespace, "redis", patch)
    result = await scene.migrate("redis-0", target={"nodeName": other(pod)})
    assert result["status"]["phase"] == "Succeeded"
    service = await scene.api.get(SERVICES, scene.namespace, "redis")
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert not service["metadata"].get("labels")
