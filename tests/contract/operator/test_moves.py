"""The operator against a real API server, its controllers and scheduler; agents are fakes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from contract.operator.world import FakeKubelet, FakePool, World, make_nodes
from godwit_api.errors import Aborted, Rejected, Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason
from godwit_operator.addresses import Addresses
from godwit_operator.driver import Driver
from godwit_operator.effects import Ports
from godwit_operator.events import Events
from godwit_operator.housekeeping import Housekeeping
from godwit_operator.kube import (
    BINDINGS,
    CLAIMS,
    ENDPOINT_SLICES,
    MIGRATIONS,
    NODES,
    PODS,
    POLICIES,
    SERVICES,
    VOLUMES,
    HttpKubeApi,
    NotFoundError,
    Resource,
    find,
)
from godwit_operator.queue import Queue
from godwit_operator.steps import Step
from godwit_operator.volumes import affinity_to, named_nodes

pytestmark = pytest.mark.host
NAMESPACES = Resource("", "v1", "namespaces", namespaced=False)
Object = dict[str, Any]


class Never:
    """A stop that comes only when the test says so."""

    def __init__(self) -> None:
        self.flag = asyncio.Event()
        self.cancel = False

    def stopped(self) -> bool:
        return self.flag.is_set()

    def cancelled(self) -> bool:
        return self.cancel

    async def wait(self) -> None:
        await self.flag.wait()


class Scene:
    """One namespace with one workload."""

    def __init__(self, api: HttpKubeApi, namespace: str) -> None:
        self.api, self.namespace = api, namespace
        self.world = World()
        self.pool = FakePool(self.world)
        self.ports = Ports(api, self.pool, Addresses(api, self.pool), Queue(5, 2), "kube-system")
        self.stop = Never()

    async def workload(self, kind: str, **spec: Any) -> Object:
        """Start it and wait for its pod."""
        template: Object = {
            "metadata": {"labels": {"app": "redis"}},
            "spec": {
                "runtimeClassName": "godwit",
                "terminationGracePeriodSeconds": 1,
                "containers": [
                    {
                        "name": "main",
                        "image": "x",
                        "ports": [{"name": "tcp", "containerPort": 6379}],
                    }
                ],
                **spec,
            },
        }
        service = {
            "metadata": {"name": "redis"},
            "spec": {"selector": {"app": "redis"}, "ports": [{"port": 80, "targetPort": "tcp"}]},
        }
        await self.api.create(SERVICES, self.namespace, service)
        if kind == "Pod":
            body = {
                "metadata": {"name": "redis-0", **template["metadata"]},
                "spec": template["spec"],
            }
            await self.api.create(PODS, self.namespace, body)
        else:
            spec: Object = {"selector": {"matchLabels": {"app": "redis"}}, "template": template}
            if kind == "StatefulSet":
                spec["serviceName"] = "redis"
            resource = Resource("apps", "v1", f"{kind.lower()}s")
            await self.api.create(
                resource, self.namespace, {"metadata": {"name": "redis"}, "spec": spec}
            )
        return await self.ready_pod()

    async def ready_pod(self) -> Object:
        for _ in range(200):
            for pod in await self.api.list(PODS, self.namespace, labels="app=redis"):
                conditions = pod["status"].get("conditions", [])
                if any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
                    return pod
            await asyncio.sleep(0.05)
        raise AssertionError(await self.api.list(PODS, self.namespace))

    async def swept_pod(self) -> Object:
        """The ready pod: what the rule still caught in its last second is released by sweeps."""
        for _ in range(100):
            await Housekeeping(self.api, self.ports.queue).sweep()
            found = await find(self.api, PODS, self.namespace, "redis-0")
            if found and not found["spec"].get("schedulingGates"):
                break
            await asyncio.sleep(0.05)
        return await self.ready_pod()

    async def until_replaced(self, pod: Object) -> str:
        """Where the pod is started that takes its place."""
        for _ in range(200):
            found = await find(self.api, PODS, self.namespace, pod["metadata"]["name"])
            if found and found["metadata"]["uid"] != pod["metadata"]["uid"]:
                node = found["spec"].get("nodeName")
                if node:
                    return str(node)
            await Housekeeping(self.api, self.ports.queue).sweep()  # as in ``swept_pod``
            await asyncio.sleep(0.05)
        raise AssertionError(await self.api.list(PODS, self.namespace))

    async def migrate(self, pod: str, *, run: bool = True, **spec: Any) -> Object:
        body = {
            "apiVersion": "godwit.io/v1alpha1",
            "kind": "PodMigration",
            "metadata": {"name": "m", "finalizers": ["godwit.io/cleanup"]},
            "spec": {"podName": pod, **spec},
        }
        made = await self.api.create(MIGRATIONS, self.namespace, body)
        return await self.drive() if run else made

    async def drive(self) -> Object:
        events = Events(self.api, "test")
        driver = Driver(self.ports, events, self.namespace, "m", self.stop)
        await asyncio.wait_for(driver.run(), 60)
        return await self.api.get(MIGRATIONS, self.namespace, "m")

    async def leave(self) -> None:
        """Remove migrations by force: an operator of a later test would drive them on,
        with that test's agents."""
        for item in await self.api.list(MIGRATIONS, self.namespace):
            name = item["metadata"]["name"]
            with contextlib.suppress(NotFoundError):
                await self.api.delete(MIGRATIONS, self.namespace, name)
                await self.api.patch(
                    MIGRATIONS, self.namespace, name, {"metadata": {"finalizers": None}}
                )

    async def nothing_left(self, uid: str) -> None:
        assert await find(self.api, POLICIES, None, f"godwit-handover-{uid}") is None
        assert await find(self.api, BINDINGS, None, f"godwit-handover-{uid}") is None
        slices = await self.api.list(
            ENDPOINT_SLICES,
            self.namespace,
            labels="endpointslice.kubernetes.io/managed-by=godwit.io",
        )
        assert slices == []
        service = await self.api.get(SERVICES, self.namespace, "redis")
        assert not service["spec"].get("publishNotReadyAddresses")
        assert not service["metadata"].get("labels")


@pytest.fixture
async def scene(api: HttpKubeApi, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    runtime = Resource("node.k8s.io", "v1", "runtimeclasses", namespaced=False)
    if await find(api, runtime, None, "godwit") is None:
        await api.create(runtime, None, {"metadata": {"name": "godwit"}, "handler": "godwit"})
    await make_nodes(api)
    made = await api.create(NAMESPACES, None, {"metadata": {"generateName": "t-"}})
    scene = Scene(api, made["metadata"]["name"])
    kubelet = asyncio.create_task(FakeKubelet(api, scene.world, scene.namespace).run())
    try:
        yield scene
    finally:
        kubelet.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await kubelet
        await scene.leave()
        assert not scene.world.empty_starts


def other(pod: Object) -> str:
    return next(n for n in ("n1", "n2", "n3") if n != pod["spec"]["nodeName"])


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment", "Pod"])
async def test_move(scene: Scene, kind: str) -> None:
    pod = await scene.workload(kind)
    target = other(pod)
    result = await scene.migrate(pod["metadata"]["name"], target={"nodeName": target})
    status = result["status"]
    assert status["phase"] == "Succeeded", status
    assert (status["sourceNode"], status["targetNode"]) == (pod["spec"]["nodeName"], target)
    assert status["freeze"] == "90ms"
    after = await scene.ready_pod()
    assert after["metadata"]["uid"] == status["successorUID"] != pod["metadata"]["uid"]
    assert after["spec"]["nodeName"] == target
    if kind != "Deployment":
        assert after["metadata"]["name"] == pod["metadata"]["name"]
    assert scene.world.running_on == target
    assert not scene.world.guarded
    assert [a.node for a in scene.world.addresses["n3"]].count(target) == 1
    await scene.nothing_left(result["metadata"]["uid"])


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment", "Pod"])
async def test_failing_switch_brings_the_pod_home(scene: Scene, kind: str) -> None:
    pod = await scene.workload(kind)
    home = pod["spec"]["nodeName"]
    scene.world.fail["switch"] = [Aborted(Reason.RESTORE_FAILED, "bad image")]
    result = await scene.migrate(pod["metadata"]["name"], target={"nodeName": other(pod)})
    status = result["status"]
    assert (status["phase"], status["reason"]) == ("Aborted", "RestoreFailed"), status
    assert status["epoch"] == 2
    after = await scene.ready_pod()
    assert after["spec"]["nodeName"] == home
    assert scene.world.running_on == home
    await scene.nothing_left(result["metadata"]["uid"])


async def test_named_directories_are_copied_but_not_onto_themselves(scene: Scene) -> None:
    """The way back to the source node finds them there."""
    directory = {"name": "data", "hostPath": {"path": "/srv/data"}}
    pod = await scene.workload("StatefulSet", volumes=[directory])
    home, target = pod["spec"]["nodeName"], other(pod)
    scene.world.fail["switch"] = [Aborted(Reason.RESTORE_FAILED, "bad image")]
    wanted = {"target": {"nodeName": target}, "copyVolumes": ["data"]}
    result = await scene.migrate("redis-0", **wanted)
    assert result["status"]["phase"] == "Aborted", result["status"]
    assert scene.world.running_on == home
    assert scene.world.volumes == [
        (home, "check_source", 1, "/srv/data"),
        (target, "check_target", 1, "/srv/data"),
        (target, "prepare_target", 1, "/srv/data"),
        (home, "copy", 1, "/srv/data"),
    ]


async def on_a_local_volume(scene: Scene, kind: str, home: str) -> Object:
    """The ready pod of a workload, with a claim that is bound to a volume of one node."""
    size, modes, name = {"storage": "1Gi"}, ["ReadWriteOnce"], f"pv-{scene.namespace}"
    volume: Object = {
        "metadata": {"name": name},
        "spec": {
            "capacity": size,
            "accessModes": modes,
            "storageClassName": "",
            "local": {"path": "/disks/a"},
            "nodeAffinity": affinity_to(home),
        },
    }
    claim: Object = {
        "metadata": {"name": "data"},
        "spec": {
            "resources": {"requests": size},
            "accessModes": modes,
            "storageClassName": "",
            "volumeName": name,
        },
    }
    await scene.api.create(VOLUMES, None, volume)
    await scene.api.create(CLAIMS, scene.namespace, claim)
    mounted = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
    pod = await scene.workload(kind, volumes=[mounted])
    assert pod["spec"]["nodeName"] == home
    return pod


async def nodes_of_the_volume(scene: Scene) -> list[str] | None:
    return named_nodes(await scene.api.get(VOLUMES, None, f"pv-{scene.namespace}"))


async def test_a_local_volume_follows_when_it_is_named(scene: Scene) -> None:
    await on_a_local_volume(scene, "StatefulSet", "n2")
    refused = await scene.migrate("redis-0", target={"nodeName": "n3"})
    (obstacle,) = refused["status"]["obstacles"]
    assert "name data in spec.copyVolumes" in obstacle["message"]
    await scene.leave()
    wanted = {"target": {"nodeName": "n3"}, "copyVolumes": ["data"]}
    result = await scene.migrate("redis-0", **wanted)
    assert result["status"]["phase"] == "Succeeded", result["status"]
    assert ("n3", "prepare_target", 1, "/disks/a") in scene.world.volumes
    assert await nodes_of_the_volume(scene) == ["n3"]
    pod = await scene.swept_pod()
    await scene.api.delete(PODS, scene.namespace, "redis-0", uid=pod["metadata"]["uid"])
    assert await scene.until_replaced(pod) == "n3"


async def test_a_dry_run_leaves_a_local_volume_where_it_is(scene: Scene) -> None:
    await on_a_local_volume(scene, "StatefulSet", "n2")
    wanted = {"target": {"nodeName": "n3"}, "copyVolumes": ["data"]}
    tried = await scene.migrate("redis-0", dryRun=True, **wanted)
    assert tried["status"]["phase"] == "Succeeded", tried["status"]
    assert await nodes_of_the_volume(scene) == ["n2"]


@pytest.mark.parametrize("kind", ["StatefulSet", "Pod"])
async def test_a_local_volume_stays_with_a_pod_that_comes_back(scene: Scene, kind: str) -> None:
    await on_a_local_volume(scene, kind, "n2")
    scene.world.fail["switch"] = [Aborted(Reason.RESTORE_FAILED, "bad image")]
    wanted = {"target": {"nodeName": "n3"}, "copyVolumes": ["data"]}
    result = await scene.migrate("redis-0", **wanted)
    assert result["status"]["phase"] == "Aborted", result["status"]
    assert scene.world.running_on == "n2"
    assert await nodes_of_the_volume(scene) == ["n2"]


async def test_a_local_volume_is_at_home_when_the_process_is_lost(scene: Scene) -> None:
    await on_a_local_volume(scene, "StatefulSet", "n2")
    scene.world.fail["switch"] = [Aborted(Reason.SOURCE_EXITED, "it has ended")]
    wanted = {"target": {"nodeName": "n3"}, "copyVolumes": ["data"]}
    result = await scene.migrate("redis-0", **wanted)
    assert result["status"]["phase"] == "Aborted", result["status"]
    assert await nodes_of_the_volume(scene) == ["n2"]
    assert (await scene.swept_pod())["spec"]["nodeName"] == "n2"


async def test_a_replica_set_keeps_its_local_volume(scene: Scene) -> None:
    pod = await on_a_local_volume(scene, "Deployment", "n2")
    wanted = {"target": {"nodeName": "n3"}, "copyVolumes": ["data"]}
    result = await scene.migrate(pod["metadata"]["name"], **wanted)
    assert result["status"]["phase"] == "Rejected", result["status"]
    (obstacle,) = result["status"]["obstacles"]
    assert "a ReplicaSet may start another pod" in obstacle["message"]


async def test_a_dry_run_reports_and_leaves_the_pod_alone(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    result = await scene.migrate(pod["metadata"]["name"], dryRun=True)
    status = result["status"]
    assert (status["phase"], status["reason"]) == ("Succeeded", "DryRun"), status
    assert status["predictedFreezeMilliseconds"] == 80
    assert status["transferredBytes"] == 1000
    assert status["predictedTotalSeconds"] >= 0.08
    assert "freeze" not in status
    after = await scene.ready_pod()
    assert after["metadata"]["uid"] == pod["metadata"]["uid"]
    assert after["spec"]["nodeName"] == pod["spec"]["nodeName"] == scene.world.running_on
    assert not {"guard", "expect_pod", "switch"} & {call for _, call, _ in scene.world.calls}
    await scene.nothing_left(result["metadata"]["uid"])


async def test_failing_switch_with_a_selector_takes_the_next_node(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    scene.world.fail["switch"] = [Aborted(Reason.RESTORE_FAILED, "bad image")]
    result = await scene.migrate("redis-0")
    status = result["status"]
    assert status["phase"] == "Succeeded", status
    assert status["epoch"] == 2
    assert scene.world.running_on == status["targetNode"] != pod["spec"]["nodeName"]


async def test_a_target_that_could_not_be_dropped_is_cleaned_up_in_the_end(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    target = other(pod)
    scene.world.fail["switch"] = [Aborted(Reason.RESTORE_FAILED, "bad image")]
    scene.world.fail["abort_target"] = [Rejected(Reason.INTERNAL, "not now")]
    result = await scene.migrate("redis-0", target={"nodeName": target})
    assert result["status"]["phase"] == "Aborted"
    dropped = [call for call in scene.world.calls if call[1] == "abort_target"]
    assert dropped == [(target, "abort_target", 1)] * 2
    await scene.nothing_left(result["metadata"]["uid"])


async def test_lost_answer_of_the_switch(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    scene.world.fail["switch_reply"] = [Retryable(Reason.AGENT_UNREACHABLE, "gone")]
    result = await scene.migrate("redis-0", target={"nodeName": other(pod)})
    assert result["status"]["phase"] == "Succeeded"
    assert len([c for c in scene.world.calls if c[1] == "switch"]) == 1


OUT_OF_SERVICE = {"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"}


async def until_told(scene: Scene, text: str) -> None:
    """Return when the migration's conditions say ``text``."""
    for _ in range(300):
        seen = await scene.api.get(MIGRATIONS, scene.namespace, "m")
        if text in str(seen.get("status", {}).get("conditions")):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(seen["status"])


async def test_the_source_node_dies_with_a_copy_on_the_target(scene: Scene) -> None:
    """The copy waits until somebody says that the node is dead; then it runs."""
    pod = await scene.workload("StatefulSet")
    home, target = pod["spec"]["nodeName"], other(pod)
    scene.world.fail[f"{home}.switch"] = [Retryable(Reason.AGENT_UNREACHABLE, "gone")]
    scene.world.on_fail = lambda: scene.pool.names.discard(home)
    scene.world.frozen_copies.add(1)
    made = await scene.migrate("redis-0", run=False, target={"nodeName": target})
    task = asyncio.create_task(scene.drive())
    await until_told(scene, "taint it with node.kubernetes.io/out-of-service")
    assert not any(call == "run_fenced" for _, call, _ in scene.world.calls)
    await scene.api.patch(NODES, None, home, {"spec": {"taints": [OUT_OF_SERVICE]}})
    result = await task
    assert result["status"]["phase"] == "Succeeded", result["status"]
    assert scene.world.running_on == target
    after = await scene.ready_pod()
    assert after["metadata"]["uid"] == result["status"]["successorUID"]
    scene.world.guarded = False
    await scene.nothing_left(made["metadata"]["uid"])


async def test_the_source_node_dies_without_a_copy(scene: Scene) -> None:
    """Nothing is left to save: the owner's next pod starts as after any loss of a node."""
    pod = await scene.workload("StatefulSet")
    home = pod["spec"]["nodeName"]

    def die() -> None:
        scene.pool.names.discard(home)
        scene.world.guarded = False
        scene.world.running_on = ""

    scene.world.fail[f"{home}.switch"] = [Retryable(Reason.AGENT_UNREACHABLE, "gone")]
    scene.world.on_fail = die
    await scene.api.patch(NODES, None, home, {"spec": {"taints": None}})
    made = await scene.migrate("redis-0", run=False, target={"nodeName": other(pod)})
    task = asyncio.create_task(scene.drive())
    await until_told(scene, "taint it with node.kubernetes.io/out-of-service")
    await scene.api.patch(NODES, None, home, {"spec": {"taints": [OUT_OF_SERVICE]}})
    result = await task
    assert (result["status"]["phase"], result["status"]["reason"]) == ("Aborted", "NodeLost")
    after = await scene.swept_pod()
    assert after["metadata"]["uid"] != pod["metadata"]["uid"]
    assert after["spec"]["nodeName"] != home
    await scene.nothing_left(made["metadata"]["uid"])


async def test_the_rest_of_the_memory_is_waited_for(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    scene.world.missing = [3 << 20, 2 << 20, 1 << 20, 0]
    target = other(pod)
    made = await scene.migrate(
        "redis-0", run=False, target={"nodeName": target}, convergence="PostCopy"
    )
    task = asyncio.create_task(scene.drive())
    await until_told(scene, "memory of it is still on")
    seen = (await scene.api.get(MIGRATIONS, scene.namespace, "m"))["status"]
    assert (seen["phase"], seen["reason"]) == ("Committed", "PostCopy"), seen
    status = (await task)["status"]
    assert status["phase"] == "Succeeded", status
    assert status["postCopyBytes"] == 3 << 20
    assert status["remainingBytes"] == 0
    assert "3 MiB of memory fetched after that" in status["message"]
    assert scene.world.running_on == target
    await scene.nothing_left(made["metadata"]["uid"])


@pytest.mark.parametrize("convergence", [{}, {"convergence": "Refuse"}])
async def test_post_copy_is_never_the_default(scene: Scene, convergence: dict[str, str]) -> None:
    pod = await scene.workload("StatefulSet")
    scene.world.missing = [1 << 20, 0]
    result = await scene.migrate("redis-0", target={"nodeName": other(pod)}, **convergence)
    assert result["status"]["phase"] == "Succeeded"
    assert not scene.world.post_copy
    assert "postCopyBytes" not in result["status"]


async def test_a_source_that_dies_with_pages_takes_the_process_with_it(scene: Scene) -> None:
    """Not because it is silent: only when nothing can come from there any more."""
    pod = await scene.workload("StatefulSet")
    home = pod["spec"]["nodeName"]
    scene.world.missing = [5 << 20]
    made = await scene.migrate(
        "redis-0", run=False, target={"nodeName": other(pod)}, convergence="PostCopy"
    )
    task = asyncio.create_task(scene.drive())
    await until_told(scene, "5242880 bytes of the pod's memory are still on node")
    assert not any(call == "run_fenced" for _, call, _ in scene.world.calls)
    await scene.api.patch(NODES, None, home, {"spec": {"taints": [OUT_OF_SERVICE]}})
    scene.pool.names.discard(home)
    scene.world.guarded = False
    status = (await task)["status"]
    assert (status["phase"], status["reason"]) == ("Aborted", "NodeLost"), status
    assert "memory is lost" in status["message"]
    assert "runs on its node" not in status["message"]
    assert {c["type"]: c["status"] for c in status["conditions"]}["Stalled"] == "True"
    await scene.nothing_left(made["metadata"]["uid"])


async def test_pages_that_are_lost_end_the_migration(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    scene.world.missing = [5 << 20]
    scene.world.pages_lost = pb.Obstacle(reason=Reason.PAGES_LOST, message="it was rebooted")
    result = await scene.migrate("redis-0", target={"nodeName": other(pod)}, convergence="PostCopy")
    status = result["status"]
    assert (status["phase"], status["reason"]) == ("Aborted", "PagesLost"), status
    assert any(call == "finish_source" for _, call, _ in scene.world.calls)


async def test_cancel_while_copying(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    scene.world.copy_gate = asyncio.Event()
    made = await scene.migrate("redis-0", run=False, target={"nodeName": other(pod)})
    task = asyncio.create_task(scene.drive())
    for _ in range(100):
        await asyncio.sleep(0.05)
        seen = await scene.api.get(MIGRATIONS, scene.namespace, "m")
        if seen.get("status", {}).get("phase") == "Copying":
            break
    scene.stop.flag.set()
    await task
    scene.stop = Never()
    scene.stop.cancel = True
    result = await scene.drive()
    assert (result["status"]["phase"], result["status"]["reason"]) == ("Aborted", "Cancelled")
    after = await scene.ready_pod()
    assert after["metadata"]["uid"] == pod["metadata"]["uid"]
    assert not scene.world.guarded
    await scene.nothing_left(made["metadata"]["uid"])


async def test_a_deletion_between_the_decision_and_the_copy_cuts_it_short(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the copy's announcement brings back tells of the deletion already."""
    pod = await scene.workload("StatefulSet")
    scene.world.copy_gate = asyncio.Event()
    await scene.migrate("redis-0", run=False, target={"nodeName": other(pod)})
    patch = scene.api.patch

    async def deleting(*args: Any, **options: Any) -> Object:
        body = args[3]
        if body.get("status", {}).get("step") == Step.COPY:
            await scene.api.delete(MIGRATIONS, scene.namespace, "m")
            now = await scene.api.get(MIGRATIONS, scene.namespace, "m")
            version = {"resourceVersion": now["metadata"]["resourceVersion"]}
            args = (*args[:3], body | {"metadata": version})
            scene.stop.flag.set()
        return await patch(*args, **options)

    monkeypatch.setattr(scene.api, "patch", deleting)
    task = asyncio.create_task(scene.drive())
    await scene.stop.flag.wait()
    # one whole timeout of the copy is minutes
    status = (await asyncio.wait_for(task, 30))["status"]
    assert (status["phase"], status["step"]) == ("Copying", Step.COPY)
    monkeypatch.undo()
    scene.stop = Never()
    scene.stop.cancel = True
    status = (await scene.drive())["status"]
    assert (status["phase"], status["reason"]) == ("Aborted", "Cancelled"), status
    assert (await scene.ready_pod())["metadata"]["uid"] == pod["metadata"]["uid"]


async def test_refused_with_all_reasons(scene: Scene) -> None:
    body = {
        "metadata": {"name": "bad", "labels": {"app": "redis"}},
        "spec": {
            "hostNetwork": True,
            "shareProcessNamespace": True,
            "containers": [{"name": "a", "image": "x", "stdin": True, "stdinOnce": True}],
        },
    }
    await scene.api.create(PODS, scene.namespace, body)
    before = await scene.ready_pod()
    result = await scene.migrate("bad", target={"nodeName": "nowhere"})
    status = result["status"]
    assert status["phase"] == "Rejected"
    assert {item["reason"] for item in status["obstacles"]} >= {
        "WrongRuntimeClass",
        "HostNetwork",
        "SharedProcessNamespace",
        "Terminal",
        "TargetNotFound",
    }
    checked = next(c for c in status["conditions"] if c["type"] == "Checked")
    assert checked["status"] == "False"
    events = await scene.api.list(Resource("", "v1", "events"), scene.namespace)
    told = [e["message"] for e in events if e["involvedObject"]["kind"] == "PodMigration"]
    assert any("HostNetwork" in text and "TargetNotFound" in text for text in told), told
    assert (await scene.ready_pod())["metadata"]["uid"] == before["metadata"]["uid"]


async def test_the_process_ends_while_its_pod_is_away(scene: Scene) -> None:
    """Then there is nothing to save: the owner's next pod starts as usual."""
    pod = await scene.workload("StatefulSet")

    def end() -> None:
        scene.world.running_on = ""
        scene.world.guarded = False

    scene.world.on_fail = end
    scene.world.fail["await_gate"] = [Aborted(Reason.SOURCE_EXITED, "exit code 1")]
    result = await scene.migrate("redis-0", target={"nodeName": other(pod)})
    assert (result["status"]["phase"], result["status"]["reason"]) == ("Aborted", "SourceExited")
    after = await scene.swept_pod()
    assert after["metadata"]["uid"] != pod["metadata"]["uid"]
    assert "godwit.io/migration" not in after["metadata"].get("annotations", {})
    await scene.nothing_left(result["metadata"]["uid"])


async def test_the_owner_is_deleted_in_the_handover(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    stateful_sets = Resource("apps", "v1", "statefulsets")
    made = await scene.migrate("redis-0", run=False, target={"nodeName": other(pod)})
    await scene.api.patch(stateful_sets, scene.namespace, "redis", {"spec": {"replicas": 1}})
    scene.world.before_guard = lambda: scene.api.delete(stateful_sets, scene.namespace, "redis")
    result = await scene.drive()
    assert (result["status"]["phase"], result["status"]["reason"]) == ("Aborted", "SourceDeleted")
    assert not scene.world.guarded  # the kubelet may end it now, as its owner's deletion asks
    await scene.nothing_left(made["metadata"]["uid"])


async def test_the_namespace_is_deleted_in_the_handover(scene: Scene) -> None:
    """No successor can be created in it any more, so there is nothing to bring the process into:
    it is let go at once, not after the time of a step that cannot succeed."""
    pod = await scene.workload("StatefulSet")
    deleting: list[asyncio.Task[None]] = []

    def delete() -> None:
        work = scene.api.delete(NAMESPACES, None, scene.namespace)
        deleting.append(asyncio.ensure_future(work))

    scene.world.on_fail = delete
    scene.world.fail["switch"] = [Aborted(Reason.RESTORE_FAILED, "bad image")]
    result = await scene.migrate("redis-0", target={"nodeName": other(pod)})
    await deleting[0]
    assert result["status"]["phase"] == "Aborted", result["status"]
    assert not scene.world.guarded


async def test_the_pod_is_deleted_while_copying(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    scene.world.copy_gate = asyncio.Event()
    await scene.migrate("redis-0", run=False, target={"nodeName": other(pod)})
    task = asyncio.create_task(scene.drive())
    for _ in range(250):
        if any(call[1] == "copy" for call in scene.world.calls):
            break
        await asyncio.sleep(0.02)
    await scene.api.delete(PODS, scene.namespace, "redis-0", grace_seconds=0)
    scene.world.running_on = ""
    scene.world.copy_gate.set()
    result = await task
    assert (result["status"]["phase"], result["status"]["reason"]) == ("Aborted", "SourceDeleted")
    assert not scene.world.guarded


async def test_two_migrations_of_one_pod(scene: Scene) -> None:
    pod = await scene.workload("StatefulSet")
    body = {
        "apiVersion": "godwit.io/v1alpha1",
        "kind": "PodMigration",
        "metadata": {"name": "first"},
        "spec": {"podName": "redis-0", "target": {"nodeName": other(pod)}},
    }
    await scene.api.create(MIGRATIONS, scene.namespace, body)
    await asyncio.sleep(1.1)  # creation timestamps have seconds
    result = await scene.migrate("redis-0", target={"nodeName": other(pod)})
    assert result["status"]["phase"] == "Rejected"
    assert [o["reason"] for o in result["status"]["obstacles"]] == ["AlreadyMigrating"]


async def test_bystanders_of_a_replica_set_are_released(scene: Scene) -> None:
    """Scaled up in the middle: one pod is the successor, the others start as they are."""
    pod = await scene.workload("Deployment")
    deployments = Resource("apps", "v1", "deployments")
    scene.world.before_guard = lambda: scene.api.patch(
        deployments, scene.namespace, "redis", {"spec": {"replicas": 3}}
    )
    result = await scene.migrate(pod["metadata"]["name"], target={"nodeName": other(pod)})
    assert result["status"]["phase"] == "Succeeded", result["status"]
    for _ in range(100):
        await Housekeeping(scene.api, scene.ports.queue).sweep()
        pods = await scene.api.list(PODS, scene.namespace, labels="app=redis")
        if len(pods) == 3 and not any(p["spec"].get("schedulingGates") for p in pods):
            break
        await asyncio.sleep(0.05)
    assert len(pods) == 3
    assert not any(p["spec"].get("schedulingGates") for p in pods)
    scene.world.empty_starts.clear()  # the other two replicas are meant to start empty
