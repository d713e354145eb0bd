"""Drives one PodRestore: finds the archive, makes the pod, lets it restore.

The pod is made behind a scheduling gate of our own and pinned to the node
whose agent has verified all of the archive; the gate is lifted when the agent
expects the pod, so it restores or does not start.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec

from godwit_api.errors import Aborted, GodwitError, Rejected
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pods import Node, Pod
from godwit_api.reasons import Reason
from godwit_operator.archives import archive_of
from godwit_operator.checkpoint import ArchivePorts, patiently, reference
from godwit_operator.checkpoint_status import RESTORES, Reporter, over, phase_of
from godwit_operator.kube import NODES, PODS, ConflictError, NotFoundError, find
from godwit_operator.manifest import bare_manifest
from godwit_operator.successor import done_containers, start_commands
from godwit_operator.targets import Free, free, node_obstacles, required_terms

log = logging.getLogger(__name__)
GATE = "godwit.io/restore"
LABEL = "godwit.io/restore"
Object = dict[str, Any]
_COMPLETE_SECONDS = 180.0
_LOOK_SECONDS = 2.0
_AWAY = frozenset({Reason.AGENT_UNREACHABLE, Reason.AGENT_MISSING})
_OF_ARCHIVES = frozenset(
    {
        Reason.ARCHIVE_NOT_FOUND,
        Reason.ARCHIVE_FOREIGN,
        Reason.ARCHIVE_DAMAGED,
        Reason.ARCHIVE_KEY,
        Reason.ARCHIVE_STORE,
    }
)
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


@dataclass(frozen=True)
class Found:
    """Where the archive is, and whose it is."""

    node: str
    manifest: Object


def restored_pod(manifest: Object, name: str, node: str, uid: str) -> Object:
    """The pod of an archive, without owner, gated, for one node only. Pure.

    Without its owner: a controller would count it, or end it, by rules that
    know nothing of where it comes from.
    """
    body = bare_manifest(manifest)
    metadata = body["metadata"]
    metadata.pop("ownerReferences", None)
    metadata["name"] = name
    metadata["labels"][LABEL] = uid
    spec = body["spec"]
    spec["schedulingGates"] = [{"name": GATE}]
    affinity = copy.deepcopy(spec.get("affinity")) or {}
    pin = {"key": "metadata.name", "operator": "In", "values": [node]}
    terms = required_terms(affinity)
    for term in terms:
        term["matchFields"] = [*(term.get("matchFields") or []), pin]
    wanted = {"nodeSelectorTerms": terms or [{"matchFields": [pin]}]}
    affinity.setdefault("nodeAffinity", {})[_REQUIRED] = wanted
    spec["affinity"] = affinity
    return body


def require_fit(node: Node, body: Object, agents: Collection[str], room: Free) -> None:
    """The scheduler will let the pod start there, or ``Rejected`` with why not. Pure."""
    found = node_obstacles(node, msgspec.convert(body, Pod), None, agents, room)
    if found:
        text = "; ".join(one.message for one in found)
        raise Rejected(Reason(found[0].reason), text)


class RestoreDriver:
    """One PodRestore to its end."""

    def __init__(self, ports: ArchivePorts, item: Object, patience_seconds: float = 60.0) -> None:
        self._ports = ports
        self._item = item
        self._spec: Object = item["spec"]
        self._namespace: str = item["metadata"]["namespace"]
        self._uid: str = item["metadata"]["uid"]
        self._report = Reporter(ports.api, RESTORES, item)
        self._patience_seconds = patience_seconds

    async def run(self) -> None:
        """Until the end. One that an operator had left behind half done is undone."""
        phase = self._report.status.get("phase")
        if over(self._report.status):
            return
        try:
            if phase == "Finishing":
                await self._finish()
            elif phase in ("Creating", "Restoring"):
                message = "The operator was restarted during the restore; create another PodRestore"
                raise Aborted(Reason.INTERNAL, message)
            else:
                await self._run()
        except GodwitError as failure:
            touched = self._report.status.get("phase") in ("Creating", "Restoring")
            if touched:
                await self._undo()
            if self._report.status.get("phase") == "Finishing":
                raise  # the pod runs; what is left to tidy is tried again
            ended = phase_of(failure, touched=touched)
            await self._report.enter(ended, str(failure.reason), failure.message)

    async def _run(self) -> None:
        await self._report.enter("Checking")
        archive = await archive_of(
            self._ports.api, self._ports.namespace, self._spec, self._spec["archive"]
        )
        found = await self._find(archive)
        name = self._spec.get("podName") or found.manifest["metadata"]["name"]
        if await find(self._ports.api, PODS, self._namespace, name) is not None:
            message = f"There is a pod {name} already; spec.podName can name another"
            raise Rejected(Reason.ARCHIVE_EXISTS, message)
        await self._report.enter("Creating", node=found.node, podName=name)
        body = restored_pod(found.manifest, name, found.node, self._uid)
        try:
            pod = await self._ports.api.create(PODS, self._namespace, body)
        except ConflictError as failure:
            raise Rejected(Reason.ARCHIVE_EXISTS, f"Pod {name}: {failure}") from failure
        await self._report.enter("Restoring", podUID=pod["metadata"]["uid"])
        archives = await self._ports.archives(found.node)
        reference_of_pod = pb.PodRef(
            namespace=self._namespace, name=name, uid=pod["metadata"]["uid"]
        )
        await archives.prepare(
            pb.PrepareRestoreRequest(
                migration=reference(self._item),
                pod=reference_of_pod,
                archive=archive,
                commands=start_commands(msgspec.convert(body, Pod)),
                done=done_containers(msgspec.convert(body, Pod)),
            )
        )
        await self._release(pod)
        request = pb.CompleteRestoreRequest(migration=reference(self._item))
        done = await archives.complete(request, _COMPLETE_SECONDS)
        await self._report.enter("Finishing", timings=dict(done.timings_us))
        await self._finish()

    async def _find(self, archive: pb.Archive) -> Found:
        """A node that has the archive and can take the pod; all reasons otherwise.

        An agent that does not answer may only be about to start, as after a reboot: it is waited
        for, and the status says so.
        """
        end = asyncio.get_running_loop().time() + self._patience_seconds
        while True:
            reasons: list[tuple[str, GodwitError]] = []
            found = await self._look(archive, reasons)
            if found is not None:
                return found
            away = [f"{node}: {one.message}" for node, one in reasons if one.reason in _AWAY]
            if not away or asyncio.get_running_loop().time() > end:
                raise worst(reasons)
            await self._report.enter("Checking", Reason.AGENT_UNREACHABLE, "; ".join(away))
            await asyncio.sleep(_LOOK_SECONDS)

    async def _look(
        self, archive: pb.Archive, reasons: list[tuple[str, GodwitError]]
    ) -> Found | None:
        """The emptiest such node now; else ``reasons`` says of each node why not."""
        pods = msgspec.convert(await self._ports.api.list(PODS), list[Pod])
        nodes = msgspec.convert(await self._ports.api.list(NODES), list[Node])
        agents = await self._ports.agents.nodes()
        room = {node.name: free(node, pods) for node in nodes}
        wanted = self._spec.get("nodeName")
        for node in sorted(nodes, key=lambda one: (-room[one.name].memory, one.name)):
            if node.name not in agents or (wanted and node.name != wanted):
                continue
            try:
                archives = await self._ports.archives(node.name)
                request = pb.InspectArchiveRequest(migration=reference(self._item), archive=archive)
                about = await archives.inspect(request)
                manifest = json.loads(about.manifest_json)
                require_fit(node, bare_manifest(manifest), agents, room[node.name])
                return Found(node.name, manifest)
            except GodwitError as failure:
                if archive.HasField("store") and failure.reason in _OF_ARCHIVES:
                    raise  # every node would see the same
                reasons.append((node.name, failure))
        if wanted and not reasons:
            none = Rejected(Reason.AGENT_MISSING, f"No Godwit agent is running on node {wanted}")
            if wanted not in room:
                raise none
            reasons.append((wanted, none))
        return None

    async def _release(self, pod: Object) -> None:
        meta = pod["metadata"]
        gates = [g for g in pod["spec"].get("schedulingGates") or [] if g["name"] != GATE]
        patch = {"metadata": {"uid": meta["uid"]}, "spec": {"schedulingGates": gates or None}}
        try:
            await self._ports.api.patch(PODS, self._namespace, meta["name"], patch)
        except (NotFoundError, ConflictError) as failure:
            raise Aborted(Reason.SUCCESSOR_FAILED, f"The pod is gone: {failure}") from failure

    async def _finish(self) -> None:
        agent = await self._ports.agents.agent(self._report.status["node"])
        request = pb.FinishTargetRequest(migration=reference(self._item))
        await patiently(lambda: agent.finish_target(request))
        await self._report.enter("Succeeded", "Succeeded", "The pod runs from the archive")

    async def _undo(self) -> None:
        """First the Pod object, then what expects it: a pod that is left would start empty."""
        status = self._report.status
        try:
            if status.get("podUID"):
                await self._ports.api.delete(
                    PODS, self._namespace, status["podName"], uid=status["podUID"], grace_seconds=0
                )
            else:
                await self._delete_marked(status.get("podName", ""))
        except (NotFoundError, ConflictError):
            log.info("restored pod is gone already", extra={"pod": status.get("podName")})
        request = pb.AbortTargetRequest(migration=reference(self._item))
        try:
            agent = await self._ports.agents.agent(status["node"])
            try:
                await patiently(lambda: agent.abort_target(request), 30.0)
            except Rejected:  # it ran when we lost sight of it
                over_there = pb.FinishTargetRequest(migration=reference(self._item))
                await patiently(lambda: agent.finish_target(over_there), 30.0)
        except GodwitError as failure:
            log.warning("restore not cleaned up", extra={"cause": str(failure)})

    async def _delete_marked(self, name: str) -> None:
        pod = await find(self._ports.api, PODS, self._namespace, name)
        if pod and pod["metadata"].get("labels", {}).get(LABEL) == self._uid:
            uid = pod["metadata"]["uid"]
            await self._ports.api.delete(PODS, self._namespace, name, uid=uid, grace_seconds=0)


def worst(reasons: list[tuple[str, GodwitError]]) -> GodwitError:
    """What to tell when no node will do: that it is nowhere, only if it is nowhere. Pure."""
    if not reasons:
        return Rejected(Reason.NO_TARGET, "No node has a Godwit agent")
    telling = [r for r in reasons if r[1].reason is not Reason.ARCHIVE_NOT_FOUND] or reasons
    text = "; ".join(f"{node}: {failure.message}" for node, failure in telling)
    return Rejected(telling[0][1].reason, text)
