"""Nodes without kubelets: fake agents over one shared model, and a fake kubelet.

The model is what must never go wrong: which copies of the process run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason
from godwit_operator.kube import NODES, PODS, ConflictError, KubeApi, NotFoundError

NODE_NAMES = ("n1", "n2", "n3")


@dataclass
class World:
    """Truth about the process of one pod."""

    running_on: str = ""
    guarded: bool = False
    frozen_copies: set[int] = field(default_factory=set)  # epochs restored, without a commit
    committed: dict[int, bool] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    expected: dict[str, str] = field(default_factory=dict)  # pod uid: node
    restored: set[str] = field(default_factory=set)  # pod uids whose process runs
    calls: list[tuple[str, str, int]] = field(default_factory=list)
    fail: dict[str, list[GodwitError]] = field(default_factory=dict)  # by "node.call"
    addresses: dict[str, list[pb.MovedAddress]] = field(default_factory=dict)
    volumes: list[tuple[str, str, int, str]] = field(default_factory=list)  # as told to agents
    empty_starts: list[str] = field(default_factory=list)
    copy_gate: asyncio.Event | None = None
    on_fail: Callable[[], None] | None = None
    before_guard: Callable[[], Awaitable[Any]] | None = None
    sandbox_seconds: float = 0.0  # from a successor's address to its process
    missing: list[int] = field(default_factory=list)  # what a post-copy tells, look by look
    pages_lost: pb.Obstacle | None = None
    post_copy: bool = False  # it was asked for

    def called(self, node: str, call: str, epoch: int) -> None:
        self.calls.append((node, call, epoch))
        queue = self.fail.get(f"{node}.{call}") or self.fail.get(call)
        if queue:
            if self.on_fail:
                self.on_fail()
            raise queue.pop(0)


class FakeAgent:
    """One node's agent."""

    def __init__(self, world: World, node: str) -> None:
        self.world, self.node = world, node

    def _note(self, call: str, ref: pb.MigrationRef) -> None:
        self.world.called(self.node, call, ref.epoch)

    def _told(
        self,
        call: str,
        request: (
            pb.CheckSourceRequest | pb.CheckTargetRequest | pb.PrepareTargetRequest | pb.CopyRequest
        ),
    ) -> None:
        epoch = request.migration.epoch
        self.world.volumes += [(self.node, call, epoch, one.path) for one in request.volumes]

    async def get_node(self) -> pb.NodeReport:
        self.world.called(self.node, "get_node", 0)
        return pb.NodeReport(node=self.node, architecture="amd64", cpu_features=["sse", "avx"])

    async def check_source(self, request: pb.CheckSourceRequest) -> pb.CheckSourceResponse:
        self._note("check_source", request.migration)
        self._told("check_source", request)
        container = pb.ContainerFacts(name="main", memory_bytes=1000, files_bytes=10)
        return pb.CheckSourceResponse(containers=[container])

    async def check_target(self, request: pb.CheckTargetRequest) -> pb.CheckTargetResponse:
        self._note("check_target", request.migration)
        self._told("check_target", request)
        return pb.CheckTargetResponse()

    async def prepare_target(self, request: pb.PrepareTargetRequest) -> None:
        self._note("prepare_target", request.migration)
        self._told("prepare_target", request)

    async def copy(self, request: pb.CopyRequest, seconds: float) -> AsyncIterator[pb.CopyProgress]:
        self._note("copy", request.migration)
        self._told("copy", request)
        yield pb.CopyProgress(round=1, transferred_bytes=900, remaining_bytes=100)
        if self.world.copy_gate is not None:
            await self.world.copy_gate.wait()
        yield pb.CopyProgress(
            round=2, transferred_bytes=1000, predicted_freeze_ms=80, converged=True
        )

    async def guard(self, request: pb.GuardRequest) -> None:
        self._note("guard", request.migration)
        assert self.world.running_on == self.node
        if self.world.before_guard:
            await self.world.before_guard()
            self.world.before_guard = None
        self.world.guarded = True

    async def expect_pod(self, request: pb.ExpectPodRequest) -> None:
        self._note("expect_pod", request.migration)
        self.world.expected[request.pod.uid] = self.node

    async def await_gate(self, request: pb.AwaitGateRequest, seconds: float) -> None:
        self._note("await_gate", request.migration)
        for _ in range(int(seconds * 20)):
            if any(node == self.node for node in self.world.expected.values()):
                await asyncio.sleep(self.world.sandbox_seconds)
                return
            await asyncio.sleep(0.05)
        raise Retryable(Reason.TIMED_OUT, "no successor at the gate")

    async def switch(self, request: pb.SwitchRequest, seconds: float) -> pb.SwitchResponse:
        epoch = request.migration.epoch
        try:
            self._note("switch", request.migration)
        except Aborted as failure:
            return pb.SwitchResponse(
                failure=pb.Obstacle(reason=failure.reason, message=failure.message)
            )
        assert epoch not in self.world.aborted, "an aborted attempt must not switch"
        assert self.world.guarded
        self.world.committed[epoch] = True
        self.world.running_on = request.target.name
        node = request.target.name
        self.world.restored |= {u for u, n in self.world.expected.items() if n == node}
        self.world.post_copy = request.post_copy
        response = self._response()
        response.timings_us["dump"] = 60000
        lost = self.world.fail.get("switch_reply")
        if lost:
            raise lost.pop(0)
        return response

    def _response(self) -> pb.SwitchResponse:
        missing = self.world.missing[0] if self.world.post_copy and self.world.missing else 0
        return pb.SwitchResponse(
            committed=True, freeze_us=90500, transferred_bytes=1234, missing_bytes=missing
        )

    async def finish_source(self, request: pb.FinishSourceRequest) -> None:
        self._note("finish_source", request.migration)
        assert request.lost == bool(self.world.pages_lost)
        assert request.lost or not (self.world.post_copy and self.world.missing)
        self.world.guarded = False

    async def finish_target(self, request: pb.FinishTargetRequest) -> None:
        self._note("finish_target", request.migration)

    async def abort_source(self, request: pb.AbortSourceRequest) -> None:
        self._note("abort_source_lift" if request.lift_guard else "abort_source", request.migration)
        if self.world.committed.get(request.migration.epoch):
            raise Rejected(Reason.WRONG_STEP, "committed")
        self.world.aborted.add(request.migration.epoch)
        if request.lift_guard:
            self.world.guarded = False

    async def abort_target(self, request: pb.AbortTargetRequest) -> None:
        self._note("abort_target", request.migration)
        assert not self.world.committed.get(request.migration.epoch)
        self.world.expected = {u: n for u, n in self.world.expected.items() if n != self.node}

    async def run_fenced(self, request: pb.RunRequest) -> None:
        self._note("run_fenced", request.migration)
        if self.world.missing:
            self.world.pages_lost = pb.Obstacle(reason=Reason.NODE_LOST, message="memory is lost")
            self.world.running_on = ""
            raise Rejected(Reason.NODE_LOST, "memory is lost")
        if request.migration.epoch not in self.world.frozen_copies:
            raise Rejected(Reason.NODE_LOST, "no complete copy")
        self.world.committed[request.migration.epoch] = True
        self.world.running_on = self.node
        self.world.restored |= {u for u, n in self.world.expected.items() if n == self.node}

    async def get_migration(self, uid: str) -> list[pb.MigrationRecord]:
        self.world.called(self.node, "get_migration", 0)
        records = [
            pb.MigrationRecord(epoch=epoch, role=pb.ROLE_SOURCE, outcome=self._response())
            for epoch in self.world.committed
        ]
        return [*records, *map(self._target_record, self.world.committed)]

    def _target_record(self, epoch: int) -> pb.MigrationRecord:
        missing = self.world.missing
        if len(missing) > 1 or missing == [0]:  # the last one stays, unless it is the end
            missing.pop(0)
        return pb.MigrationRecord(
            epoch=epoch,
            role=pb.ROLE_TARGET,
            step="Lost" if self.world.pages_lost else "Resumed" if missing else "Arrived",
            missing_bytes=missing[0] if missing else 0,
            lost=self.world.pages_lost,
        )

    async def sync_addresses(self, request: pb.SyncAddressesRequest) -> None:
        self.world.called(self.node, "sync_addresses", 0)
        self.world.addresses[self.node] = list(request.addresses)


class FakePool:
    """All nodes have an agent, unless taken away."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.names = set(NODE_NAMES)

    async def nodes(self) -> dict[str, str]:
        return {name: f"10.0.0.{index}" for index, name in enumerate(sorted(self.names), 1)}

    async def agent(self, node: str) -> FakeAgent:
        if node not in self.names:
            raise Retryable(Reason.AGENT_MISSING, f"no agent on {node}", delay_seconds=0.1)
        return FakeAgent(self.world, node)

    async def peer(self, node: str) -> pb.PeerNode:
        return pb.PeerNode(name=node, address="10.0.0.9", control_port=9460, transfer_port=9461)


def node(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {"godwit.io/node": "ready", "kubernetes.io/hostname": name},
        },
    }


async def make_nodes(api: KubeApi) -> None:
    for index, name in enumerate(NODE_NAMES, 1):
        with contextlib.suppress(ConflictError):
            await api.create(NODES, None, node(name))
        status = {
            "conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": f"10.0.0.{index}"}],
            "allocatable": {"cpu": "4", "memory": "4Gi", "pods": "50"},
            "capacity": {"cpu": "4", "memory": "4Gi", "pods": "50"},
        }
        await api.patch(NODES, None, name, {"status": status}, sub="status")
        await api.patch(NODES, None, name, {"spec": {"taints": None}})


class FakeKubelet:
    """Runs what is scheduled: successors when their process is there, others at once."""

    def __init__(self, api: KubeApi, world: World, namespace: str) -> None:
        self.api, self.world, self.namespace = api, world, namespace
        self._ips = iter(range(10, 250))

    async def run(self) -> None:
        while True:
            try:
                for pod in await self.api.list(PODS, self.namespace):
                    await self._pod(pod)
            except (NotFoundError, ConflictError):
                pass
            await asyncio.sleep(0.05)

    async def _pod(self, pod: dict[str, Any]) -> None:
        uid, meta = pod["metadata"]["uid"], pod["metadata"]
        if not pod["spec"].get("nodeName"):
            return
        if "deletionTimestamp" in meta:
            await self.api.delete(PODS, self.namespace, meta["name"], uid=uid, grace_seconds=0)
            return
        if pod["status"].get("phase") == "Running" and _ready(pod):
            return
        successor = "godwit.io/migration" in meta.get("annotations", {})
        expected = uid in self.world.expected
        if successor and not expected:
            self.world.empty_starts.append(meta["name"])
        ready = not successor or uid in self.world.restored
        if not ready and (not expected or pod["status"].get("podIP")):
            return  # a sandbox is reported once, long before its container is ready
        if not successor:
            if self.world.guarded and not successor and "app" in meta.get("labels", {}):
                self.world.empty_starts.append(meta["name"])
            self.world.running_on = self.world.running_on or pod["spec"]["nodeName"]
        ip = "10.9.0.5" if successor else f"10.9.0.{next(self._ips)}"
        if not successor and not self.world.guarded:
            ip = "10.9.0.5"
        status = {
            "phase": "Running" if ready else "Pending",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            "containerStatuses": [],
        }
        await self.api.patch(PODS, self.namespace, meta["name"], {"status": status}, sub="status")


def _ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
