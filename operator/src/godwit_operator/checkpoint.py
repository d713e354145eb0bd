"""Drives one PodCheckpoint: key, check, one call to the agent, and the end of a pod that stops.

Every effect may be repeated: an archive that is there already and is this
object's own counts as written, so a restarted operator goes on.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.pb import agent_pb2 as pb
from godwit_api.reasons import Reason
from godwit_operator.agents import Agent, AgentPool
from godwit_operator.archive_calls import ArchiveAgent
from godwit_operator.checkpoint_status import CHECKPOINTS, Reporter, over, phase_of
from godwit_operator.kube import PODS, SECRETS, ConflictError, KubeApi, NotFoundError, find

log = logging.getLogger(__name__)
KEY_TYPE = "godwit.io/checkpoint-key"
T = TypeVar("T")
Object = dict[str, Any]
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class ArchivePorts:
    """What checkpoints and restores work on."""

    api: KubeApi
    agents: AgentPool
    archives: Callable[[str], Awaitable[ArchiveAgent]]
    namespace: str  # the operator's own: keys are there


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


async def key_of(ports: ArchivePorts, name: str) -> bytes:
    """Keys are the administrator's: only Secrets of our own namespace and of the right type."""
    secret = await find(ports.api, SECRETS, ports.namespace, name)
    if secret is None or secret.get("type") != KEY_TYPE:
        message = f"There is no Secret {name} of type {KEY_TYPE} in namespace {ports.namespace}"
        raise Rejected(Reason.ARCHIVE_KEY, message)
    try:
        key = base64.b64decode(secret["data"]["key"], validate=True)
    except (KeyError, TypeError, binascii.Error):
        key = b""
    if len(key) != 32:
        raise Rejected(Reason.ARCHIVE_KEY, f"The entry key of Secret {name} has not 32 bytes")
    return key


def reference(item: Object) -> pb.MigrationRef:
    meta = item["metadata"]
    return pb.MigrationRef(uid=meta["uid"], epoch=1, namespace=meta["namespace"], name=meta["name"])


def obstacle_of(pod: Object | None, name: str) -> Rejected | None:
    """What speaks against writing a checkpoint of this pod, as far as the API knows. Pure."""
    if pod is None:
        return Rejected(Reason.POD_NOT_FOUND, f"There is no pod {name}")
    if "deletionTimestamp" in pod["metadata"]:
        return Rejected(Reason.POD_TERMINATING, f"Pod {name} is being deleted")
    if pod.get("status", {}).get("phase") != "Running" or not pod["status"].get("podIP"):
        return Rejected(Reason.POD_NOT_RUNNING, f"Pod {name} does not run")
    spec = pod["spec"]
    (container, *others) = spec["containers"]
    started = (container.get("lifecycle") or {}).get("postStart") or container.get("startupProbe")
    if others or spec.get("initContainers") or started:
        message = (
            "Checkpoints are written of pods with one container, without init containers, "
            "startup probe and postStart hook"
        )
        return Rejected(Reason.NOT_CHECKPOINTABLE, message)
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
        key = await key_of(self._ports, self._spec["keySecretName"])
        if self._report.status.get("phase") == "Stopping":
            await self._stop()
            return
        pod = await find(self._ports.api, PODS, self._namespace, self._spec["podName"])
        refused = obstacle_of(pod, self._spec["podName"])
        known = self._report.status.get("podUID")
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
        await self._report.enter("Writing")
        await self._write(pod, key)
        if self._spec.get("leaveRunning", True):
            await self._report.enter("Succeeded", "Succeeded", "The archive is complete")
        else:
            await self._report.enter("Stopping")
            await self._stop()

    async def _check(self) -> None:
        agent = await self._agent()
        request = pb.CheckSourceRequest(migration=reference(self._item), pod=self._pod_ref())
        found = await patiently(lambda: agent.check_source(request))
        if found.obstacles:
            text = "; ".join(one.message for one in found.obstacles)
            raise Rejected(Reason(found.obstacles[0].reason), text)

    async def _write(self, pod: Object, key: bytes) -> None:
        name = self._spec.get("archive") or self._item["metadata"]["name"]
        request = pb.CheckpointRequest(
            migration=reference(self._item),
            pod=self._pod_ref(),
            archive=pb.Archive(name=name, key=key),
            leave_running=self._spec.get("leaveRunning", True),
            manifest_json=json.dumps(pod),
        )
        archives = await self._ports.archives(self._report.status["node"])
        done = await patiently(lambda: archives.checkpoint(request))
        milliseconds = round(done.freeze_us / 1000, 1)
        self._report.status |= {
            "archive": name,
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
        """What a broken call may have left: the pod's guard goes."""
        request = pb.AbortSourceRequest(
            migration=reference(self._item), pod=self._pod_ref(), lift_guard=True
        )
        try:
            agent = await self._agent()
            await patiently(lambda: agent.abort_source(request), 30.0)
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
