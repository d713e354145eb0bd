"""PodCheckpoint and PodRestore against a real API server; what agents do with archives is faked."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import time
from typing import Any

import pytest

from contract.operator.apiserver import ApiServer
from contract.operator.conftest import ROOT
from contract.operator.world import FakePool, World, make_nodes
from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason
from godwit_operator.checkpoint import ArchivePorts, CheckpointDriver
from godwit_operator.checkpoint_status import CHECKPOINTS, RESTORES
from godwit_operator.kube import NODES, PODS, SECRETS, ConflictError, HttpKubeApi, Resource, find
from godwit_operator.restore import GATE, RestoreDriver

pytestmark = pytest.mark.host
NAMESPACES = Resource("", "v1", "namespaces", namespaced=False)
SYSTEM = "system"
Object = dict[str, Any]
STORE = {
    "endpoint": "https://s3.example.org",
    "bucket": "pods",
    "prefix": "one",
    "accessKey": "AK",
    "secretKey": "SK",
}


class Archives:
    """What all agents have been asked about archives, and what they answer."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.fail: dict[str, GodwitError] = {}
        self.manifest: Object = {}

    def of(self, call: str) -> list[Any]:
        return [request for _, name, request in self.calls if name == call]

    def nodes(self, call: str) -> list[str]:
        return [node for node, name, _ in self.calls if name == call]


class FakeArchiveAgent:
    """One node's."""

    def __init__(self, archives: Archives, node: str) -> None:
        self._archives, self._node = archives, node

    def _note(self, call: str, request: Any) -> None:
        self._archives.calls.append((self._node, call, request))
        for name in (f"{self._node}.{call}", call):
            if name in self._archives.fail:
                raise self._archives.fail[name]

    async def checkpoint(self, request: pb.CheckpointRequest) -> pb.CheckpointResponse:
        self._note("checkpoint", request)
        return pb.CheckpointResponse(archive_bytes=9, freeze_us=90_500, location="s3://pods/x")

    async def release(self, request: pb.ReleaseCheckpointRequest) -> None:
        self._note("release", request)

    async def discard(self, request: pb.DiscardArchiveRequest) -> None:
        self._note("discard", request)

    async def inspect(self, request: pb.InspectArchiveRequest) -> pb.InspectArchiveResponse:
        self._note("inspect", request)
        return pb.InspectArchiveResponse(manifest_json=json.dumps(self._archives.manifest))

    async def prepare(self, request: pb.PrepareRestoreRequest) -> None:
        self._note("prepare", request)

    async def complete(
        self, request: pb.CompleteRestoreRequest, seconds: float
    ) -> pb.CompleteRestoreResponse:
        self._note("complete", request)
        return pb.CompleteRestoreResponse()


class Scene:
    """A namespace with one pod, and the operator's Secrets."""

    def __init__(self, api: HttpKubeApi, namespace: str) -> None:
        self.api, self.namespace = api, namespace
        self.world, self.archives = World(), Archives()

        async def archives(node: str) -> FakeArchiveAgent:
            return FakeArchiveAgent(self.archives, node)

        self.ports = ArchivePorts(api, FakePool(self.world), archives, SYSTEM)  # type: ignore[arg-type]

    async def open(self) -> None:
        await make_nodes(self.api)
        for name in (SYSTEM, self.namespace):
            await self._create(NAMESPACES, None, {"metadata": {"name": name}})
        await self.secret("key", "godwit.io/checkpoint-key", {"key": bytes(32)})
        values = {name: value.encode() for name, value in STORE.items()}
        await self.secret("store", "godwit.io/object-store", values)
        self.pod = await self.api.create(PODS, self.namespace, self.body("redis"))
        status = {"phase": "Running", "podIP": "10.9.0.5", "podIPs": [{"ip": "10.9.0.5"}]}
        await self.api.patch(PODS, self.namespace, "redis", {"status": status}, sub="status")

    def body(self, name: str) -> Object:
        def one(of: str, **more: Any) -> Object:
            return {"name": of, "image": "example.org/redis", **more}

        hook = {"postStart": {"exec": {"command": ["warm"]}}}
        probe = {"exec": {"command": ["up"]}}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {
                "nodeName": "n1",
                "automountServiceAccountToken": False,
                "initContainers": [
                    one("prepare"),
                    one("sidecar", restartPolicy="Always", startupProbe=probe),
                ],
                "containers": [one("redis", lifecycle=hook), one("writer")],
            },
        }

    async def secret(self, name: str, kind: str, values: dict[str, bytes]) -> None:
        data = {entry: base64.b64encode(value).decode() for entry, value in values.items()}
        body = {"metadata": {"name": name, "namespace": SYSTEM}, "type": kind, "data": data}
        await self._create(SECRETS, SYSTEM, {"apiVersion": "v1", "kind": "Secret", **body})

    async def _create(self, kind: Resource, namespace: str | None, body: Object) -> None:
        with contextlib.suppress(ConflictError):
            await self.api.create(kind, namespace, body)

    async def checkpoint(self, name: str, **spec: Any) -> Object:
        item = await self.make(CHECKPOINTS, "PodCheckpoint", name, podName="redis", **spec)
        await CheckpointDriver(self.ports, item).run()
        return dict((await self.api.get(CHECKPOINTS, self.namespace, name))["status"])

    async def restore(self, name: str, **spec: Any) -> Object:
        item = await self.make(RESTORES, "PodRestore", name, archive="one", **spec)
        await RestoreDriver(self.ports, item).run()
        return dict((await self.api.get(RESTORES, self.namespace, name))["status"])

    async def make(self, kind: Resource, word: str, name: str, **spec: Any) -> Object:
        body = {
            "apiVersion": "godwit.io/v1alpha1",
            "kind": word,
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {"keySecretName": "key", **spec},
        }
        return await self.api.create(kind, self.namespace, body)


@pytest.fixture
async def scene(apiserver: ApiServer, api: HttpKubeApi, request: pytest.FixtureRequest) -> Scene:
    for name in ("podcheckpoints", "podrestores"):
        apiserver.kubectl("apply", "-f", str(ROOT / "crds" / f"{name}.yaml"))
    apiserver.kubectl("wait", "--for=condition=established", "crd", "--all")
    made = Scene(api, "c-" + hashlib.sha256(request.node.name.encode()).hexdigest()[:8])
    await made.open()
    # the pod needs a runtime class to be movable, and this server has none
    made.world.running_on = "n1"
    return made


@pytest.fixture(autouse=True)
def _any_runtime_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("godwit_operator.checking.RUNTIME_CLASS", None)


async def test_a_store_reaches_the_agent_and_nothing_of_it_the_status(scene: Scene) -> None:
    status = await scene.checkpoint("one", storeSecretName="store")
    assert status["phase"] == "Succeeded", status
    assert (status["archive"], status["location"]) == ("one", "s3://pods/x")
    (request,) = scene.archives.of("checkpoint")
    store = request.archive.store
    assert (store.endpoint, store.bucket, store.prefix) == ("https://s3.example.org", "pods", "one")
    assert (store.access_key, store.secret_key, store.region) == ("AK", "SK", "us-east-1")
    assert "SK" not in json.dumps(status)
    assert [name for _, name, _ in scene.archives.calls] == ["discard", "checkpoint"]


async def test_without_a_store_the_nodes_directory_is_meant(scene: Scene) -> None:
    assert (await scene.checkpoint("one"))["phase"] == "Succeeded"
    (request,) = scene.archives.of("checkpoint")
    assert not request.archive.HasField("store")


async def test_a_checkpoint_that_fails_leaves_no_piece_of_an_archive(scene: Scene) -> None:
    scene.archives.fail["checkpoint"] = Rejected(Reason.ARCHIVE_STORE, "AccessDenied")
    status = await scene.checkpoint("one", storeSecretName="store")
    assert (status["phase"], status["reason"]) == ("Failed", "ArchiveStore")
    assert [name for _, name, _ in scene.archives.calls] == ["discard", "checkpoint", "discard"]
    piece = scene.archives.of("discard")[-1]
    assert piece.archive.store.bucket == "pods"
    assert ("n1", "abort_source_lift", 1) in scene.world.calls


async def test_a_store_that_refuses_is_told_before_the_pod_is_touched(scene: Scene) -> None:
    scene.archives.fail["discard"] = Rejected(Reason.ARCHIVE_STORE, "SignatureDoesNotMatch")
    status = await scene.checkpoint("one", storeSecretName="store")
    assert (status["phase"], status["reason"]) == ("Rejected", "ArchiveStore"), status
    assert scene.archives.of("checkpoint") == []
    assert ("n1", "abort_source_lift", 1) not in scene.world.calls


async def test_an_operator_that_was_restarted_does_not_disturb_the_agent(scene: Scene) -> None:
    item = await scene.make(CHECKPOINTS, "PodCheckpoint", "one", podName="redis")
    item["status"] = {"phase": "Writing", "podUID": scene.pod["metadata"]["uid"]}
    await CheckpointDriver(scene.ports, item).run()
    assert [name for _, name, _ in scene.archives.calls] == ["checkpoint"]


async def test_a_damaged_archive_of_a_store_is_read_once(scene: Scene) -> None:
    scene.archives.fail["inspect"] = Rejected(Reason.ARCHIVE_DAMAGED, "part 3")
    status = await scene.restore("back", podName="copy", storeSecretName="store")
    assert (status["phase"], status["reason"]) == ("Rejected", "ArchiveDamaged"), status
    assert len(scene.archives.of("inspect")) == 1


@pytest.mark.parametrize("name", ["absent", "key", "broken"])
async def test_a_store_that_is_none_is_told_before_any_agent_is_asked(
    scene: Scene, name: str
) -> None:
    await scene.secret("broken", "godwit.io/object-store", {"endpoint": b"ftp://x"})
    for status in (
        await scene.checkpoint("one", storeSecretName=name),
        await scene.restore("back", storeSecretName=name),
    ):
        assert (status["phase"], status["reason"]) == ("Rejected", "ArchiveStore"), status
        assert name in status["message"]
    assert scene.archives.calls == []
    assert scene.world.calls == []


async def test_the_first_of_two_that_write_one_archive_wins(scene: Scene) -> None:
    await scene.make(CHECKPOINTS, "PodCheckpoint", "a-first", podName="redis", archive="same")
    # the API's time has a resolution of a second; within it the UID decides
    end, number = time.monotonic() + 10, 0
    while (status := await scene.checkpoint(f"b-{number}", archive="same"))["phase"] != "Rejected":
        assert time.monotonic() < end, status
        number += 1
    assert status["reason"] == "ArchiveExists", status
    assert "a-first" in status["message"]


async def test_a_pod_comes_back_where_it_may_start(scene: Scene) -> None:
    scene.archives.manifest = scene.body("redis")
    scene.archives.fail["n2.inspect"] = Rejected(Reason.CPU_DIFFERS, "no avx")
    await scene.api.patch(NODES, None, "n1", {"spec": {"unschedulable": True}})
    try:
        status = await scene.restore("back", podName="copy", storeSecretName="store")
    finally:
        await scene.api.patch(NODES, None, "n1", {"spec": {"unschedulable": None}})
    assert (status["phase"], status["node"]) == ("Succeeded", "n3"), status
    (request,) = scene.archives.of("prepare")
    assert request.archive.store.bucket == "pods"
    assert list(request.done) == ["prepare"]
    commands = {
        one.container: (list(one.post_start), list(one.startup)) for one in request.commands
    }
    assert commands == {"sidecar": ([], ["up"]), "redis": (["warm"], [])}
    assert ("n3", "finish_target", 1) in scene.world.calls
    pod = await find(scene.api, PODS, scene.namespace, "copy")
    assert pod
    assert [gate["name"] for gate in pod["spec"].get("schedulingGates") or []] == []
    assert pod["metadata"]["uid"] == request.pod.uid


async def test_a_restore_that_fails_leaves_no_pod(scene: Scene) -> None:
    scene.archives.manifest = scene.body("redis")
    scene.archives.fail["prepare"] = Retryable(Reason.ARCHIVE_STORE_UNREACHABLE, "away")
    status = await scene.restore("back", podName="copy")
    assert (status["phase"], status["reason"]) == ("Failed", "ArchiveStoreUnreachable"), status
    assert await find(scene.api, PODS, scene.namespace, "copy") is None
    assert GATE not in json.dumps(status)


async def test_an_agent_that_is_about_to_start_is_waited_for(scene: Scene) -> None:
    """The others do not have the archive; the one that may does not listen yet."""
    scene.archives.manifest = scene.body("redis")
    for node in ("n1", "n3"):
        scene.archives.fail[f"{node}.inspect"] = Rejected(Reason.ARCHIVE_NOT_FOUND, "not here")
    scene.archives.fail["n2.inspect"] = Retryable(Reason.AGENT_UNREACHABLE, "refused")
    restoring = asyncio.create_task(scene.restore("back", podName="copy"))
    async with asyncio.timeout(30):
        while True:
            found = await find(scene.api, RESTORES, scene.namespace, "back")
            seen = (found or {}).get("status", {})
            if seen.get("reason") == "AgentUnreachable":
                break
            await asyncio.sleep(0.02)
    assert (seen["phase"], seen["message"]) == ("Checking", "n2: refused")
    del scene.archives.fail["n2.inspect"]
    status = await restoring
    assert (status["phase"], status["node"]) == ("Succeeded", "n2"), status


async def test_an_agent_that_stays_away_is_not_waited_for_forever(scene: Scene) -> None:
    scene.archives.fail["inspect"] = Retryable(Reason.AGENT_UNREACHABLE, "refused")
    item = await scene.make(RESTORES, "PodRestore", "back", archive="one", podName="copy")
    await RestoreDriver(scene.ports, item, patience_seconds=0.0).run()
    status = (await scene.api.get(RESTORES, scene.namespace, "back"))["status"]
    assert (status["phase"], status["reason"]) == ("Rejected", "AgentUnreachable"), status


async def test_why_no_node_will_do(scene: Scene) -> None:
    scene.archives.manifest = scene.body("redis") | {"spec": {"nodeSelector": {"disk": "ssd"}}}
    scene.archives.manifest["spec"]["containers"] = [{"name": "redis"}]
    status = await scene.restore("back", podName="copy")
    assert (status["phase"], status["reason"]) == ("Rejected", "TargetUnschedulable"), status
    for node in ("n1", "n2", "n3"):
        assert f"{node}: " in status["message"]
