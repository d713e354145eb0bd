"""Drives one PodCheckpoint: key, check, one call to the agent, and the end of a pod that stops.

Every effect may be repeated: an archive that is there already and is this
object's own counts as written, so a restarted operator goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pods import Pod
from godwit_api.reasons import Reason
from godwit_operator.agents import Agent, AgentPool
from godwit_operator.archive_calls import ArchiveAgent
from godwit_operator.archives import archive_of
from godwit_operator.checking import pod_obstacles
from godwit_operator.checkpoint_status import CHECKPOINTS, Reporter, over, phase_of
from godwit_operator.kube import PODS, ConflictError, KubeApi, NotFoundError, find
from godwit_operator.storage import storage_of
from godwit_operator.volumes import Storage, volume_obstacles

log = logging.getLogger(__name__)
T = TypeVar("T")
Object = dict[str, Any]
_PATIENCE_SECONDS = 60.0
_OF_OWNERS = frozenset(
    {
        Reason.STATIC_POD,
        Reason.DAEMON_SET_POD,
        Reason.UNSUPPORTED_OWNER,
        Reason.POD_FINALIZERS,
    }
)
"""Obstacles to a pod's being replaced, which a checkpoint does not do."""


@dataclass(frozen=True)
class ArchivePorts:
    """What checkpoints and restores work on."""

    api: KubeApi
    agents: AgentPool
    archives: Callable[[str], Awaitable[ArchiveAgent]]
    namespace: str  # the operator's own: keys and stores are there


async def patiently(work: Callable[[], Awaitable[T]], seconds: float = _PATIENCE_SECONDS) -> T:
    """Again while it is Retryable, for a while."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return await work()
        except Retryable as failure:
            if asyncio.get_running_loop().time() > end:
                raise
            await asyncio.sleep(failure.delay_seconds)


def reference(item: Object) -> pb.MigrationRef:
    meta = item["metadata"]
    return pb.MigrationRef(uid=meta["uid"], epoch=1, namespace=meta["namespace"], name=meta["name"])


def refusal(pod: Object | None, name: str, storage: Storage) -> Rejected | None:
    """What speaks against writing a checkpoint of this pod, as far as the API knows: what would
    keep it from moving, but for its owner, which has nothing to replace. Pure."""
    if pod is None:
        return Rejected(Reason.POD_NOT_FOUND, f"There is no pod {name}")
    seen = msgspec.convert(pod, Pod)
    told = [*pod_obstacles(seen), *volume_obstacles(seen, storage, ())]
    found = [one for one in told if one.reason not in _OF_OWNERS]
    if not found:
        return None
    return Rejected(Reason(found[0].reason), "; ".join(one.message for one in found))


def rival(item: Object, others: list[Object]) -> Object | None:
    """Another PodCheckpoint that is writing this archive, and was there first. Pure."""

    def place(one: Object) -> tuple[str, str]:
        spec = one["spec"]
        return spec.get("archive") or one["metadata"]["name"], spec.get("storeSecretName", "")

    def age(one: Object) -> tuple[str, str]:
        return one["metadata"]["creationTimestamp"], one["metadata"]["uid"]

    for other in others:
        same = place(other) == place(item) and not over(other.get("status") or {})
        if same and age(other) < age(item):
            return other
    return None


class CheckpointDriver:
    """One PodCheckpoint to its end."""

    def __init__(self, ports: ArchivePorts, item: Object) -> None:
        self._ports = ports
        self._item = item
        self._spec: Object = item["spec"]
        self._namespace: str = item["metadata"]["namespace"]
        self._report = Reporter(ports.api, CHECKPOINTS, item)

    async def run(self) -> None:
        """Until the end; a status that cannot be written is tried again by the caller."""
        if over(self._report.status):
            return
        try:
            await self._run()
        except GodwitError as failure:
            touched = self._report.status.get("phase") in ("Writing", "Stopping")
            if touched:
                await self._give_up()
            phase = phase_of(failure, touched=touched)
            await self._report.enter(phase, str(failure.reason), failure.message)

    async def _run(self) -> None:
        name = self._spec.get("archive") or self._item["metadata"]["name"]
        archive = await archive_of(self._ports.api, self._ports.namespace, self._spec, name)
        if self._report.status.get("phase") == "Stopping":
            await self._stop()
            return
        pod = await find(self._ports.api, PODS, self._namespace, self._spec["podName"])
        refused = refusal(pod, self._spec["podName"], await self._storage(pod))
        known = self._report.status.get("podUID")
        again = self._report.status.get("phase") == "Writing"
        if pod is None or refused is not None:
            raise refused or Rejected(Reason.POD_NOT_FOUND, "The pod is gone")
        if known and known != pod["metadata"]["uid"]:
            raise Rejected(Reason.POD_REPLACED, "The pod is another one than at the beginning")
        await self._report.enter(
            "Checking",
            podUID=pod["metadata"]["uid"],
            podIP=pod["status"]["podIP"],
            node=pod["spec"]["nodeName"],
        )
        await self._check()
        if not again:  # else an agent may be at it
            await self._make_place(archive)
        await self._report.enter("Writing")
        await self._write(pod, archive)
        if self._spec.get("leaveRunning", True):
            await self._report.enter("Succeeded", "Succeeded", "The archive is complete")
        else:
            await self._report.enter("Stopping")
            await self._stop()

    async def _storage(self, pod: Object | None) -> Storage:
        if pod is None:
            return Storage()
        return await storage_of(self._ports.api, msgspec.convert(pod, Pod))

    async def _check(self) -> None:
        others = await self._ports.api.list(CHECKPOINTS, self._namespace)
        if first := rival(self._item, others):
            message = f"PodCheckpoint {first['metadata']['name']} writes an archive of this name"
            raise Rejected(Reason.ARCHIVE_EXISTS, message)
        agent = await self._agent()
        request = pb.CheckSourceRequest(migration=reference(self._item), pod=self._pod_ref())
        found = await patiently(lambda: agent.check_source(request))
        if found.obstacles:
            text = "; ".join(one.message for one in found.obstacles)
            raise Rejected(Reason(found.obstacles[0].reason), text)

    async def _make_place(self, archive: pb.Archive) -> None:
        """What an attempt of this name has left goes; and a store that cannot be used is found
        out before the pod is touched."""
        request = pb.DiscardArchiveRequest(migration=reference(self._item), archive=archive)
        archives = await self._ports.archives(self._report.status["node"])
        await patiently(lambda: archives.discard(request))

    async def _write(self, pod: Object, archive: pb.Archive) -> None:
        request = pb.CheckpointRequest(
            migration=reference(self._item),
            pod=self._pod_ref(),
            archive=archive,
            leave_running=self._spec.get("leaveRunning", True),
            manifest_json=json.dumps(pod),
        )
        archives = await self._ports.archives(self._report.status["node"])
        done = await patiently(lambda: archives.checkpoint(request))
        milliseconds = round(done.freeze_us / 1000, 1)
        self._report.status |= {
            "archive": archive.name,
            "location": done.location,
            "archiveBytes": done.archive_bytes,
            "freezeMilliseconds": milliseconds,
            "freeze": f"{milliseconds:.0f}ms",
            "timings": dict(done.timings_us),
        }

    async def _stop(self) -> None:
        """The archive is complete and the pod stands still: it ends, object first."""
        status = self._report.status
        try:
            await self._ports.api.delete(
                PODS, self._namespace, self._spec["podName"], uid=status["podUID"], grace_seconds=0
            )
        except (NotFoundError, ConflictError):
            log.info("pod is gone already", extra={"pod": self._spec["podName"]})
        archives = await self._ports.archives(status["node"])
        request = pb.ReleaseCheckpointRequest(migration=reference(self._item), pod=self._pod_ref())
        await patiently(lambda: archives.release(request))
        await self._report.enter("Succeeded", "Succeeded", "The archive is complete; the pod ended")

    async def _give_up(self) -> None:
        """What a broken call may have left: the pod's guard goes, and a piece of an archive."""
        request = pb.AbortSourceRequest(
            migration=reference(self._item), pod=self._pod_ref(), lift_guard=True
        )
        try:
            agent = await self._agent()
            await patiently(lambda: agent.abort_source(request), 30.0)
            name = self._spec.get("archive") or self._item["metadata"]["name"]
            archive = await archive_of(self._ports.api, self._ports.namespace, self._spec, name)
            await self._make_place(archive)
        except GodwitError as failure:
            log.warning("checkpoint not cleaned up", extra={"cause": str(failure)})

    async def _agent(self) -> Agent:
        return await self._ports.agents.agent(self._report.status["node"])

    def _pod_ref(self) -> pb.PodRef:
        status = self._report.status
        return pb.PodRef(
            namespace=self._namespace,
            name=self._spec["podName"],
            uid=status["podUID"],
            ip=status["podIP"],
        )
