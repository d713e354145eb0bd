"""The successor on its way to the gate, and its marks once the process is in it."""

from __future__ import annotations

import asyncio
import time

from godwit_api.errors import Aborted, Retryable
from godwit_api.migration import ADDRESS_ANNOTATION, HOME_NODE_ANNOTATION, PodMigration
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pods import Hook, Pod, Probe
from godwit_api.reasons import Reason
from godwit_operator.agents import Agent
from godwit_operator.handover import Handover
from godwit_operator.kube import PODS, ConflictError, KubeApi, NotFoundError
from godwit_operator.messages import reference, successor_ref

_POLL_SECONDS = 0.2
_UNSCHEDULABLE_SECONDS = 10.0
_WORD_SECONDS = 2.0
_HOPELESS = frozenset(
    {
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImageNeverPull",
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "RunContainerError",
        "CrashLoopBackOff",
    }
)


def hopeless(pod: Pod | None) -> Aborted | None:
    """Why the successor will never come to the gate; None while it may. Pure."""
    if pod is None or pod.terminating:
        return Aborted(Reason.SUCCESSOR_FAILED, "The successor was deleted")
    if pod.finished:
        text = pod.status.message or pod.status.reason or pod.status.phase
        return Aborted(Reason.SUCCESSOR_FAILED, f"The successor has ended: {text}")
    for status in (*pod.status.init_container_statuses, *pod.status.container_statuses):
        waiting = status.state.waiting or {}
        if waiting.get("reason") in _HOPELESS:
            text = f"{waiting['reason']}: {waiting.get('message', '')}"
            return Aborted(Reason.SUCCESSOR_FAILED, f"Container {status.name}: {text}")
    return None


def expectation(migration: PodMigration, pod: Pod) -> pb.ExpectPodRequest:
    """What the target agent must know of the successor. Pure."""
    return pb.ExpectPodRequest(
        migration=reference(migration),
        pod=successor_ref(migration),
        commands=start_commands(pod),
        done=done_containers(pod),
    )


def start_commands(pod: Pod) -> list[pb.Commands]:
    """What the kubelet will run in containers that start; in a restored one it has been. Pure."""
    return [
        pb.Commands(
            container=one.name,
            post_start=_command(one.lifecycle.post_start),
            startup=_command(one.startup_probe),
        )
        for one in pod.spec.lasting
        if one.lifecycle.post_start or one.startup_probe
    ]


def done_containers(pod: Pod) -> list[str]:
    """Init containers that have ended, and must not run again. Pure."""
    return [one.name for one in pod.spec.init_containers if not one.sidecar]


def _command(handler: Hook | Probe | None) -> list[str]:
    return list((handler.exec_ or {}).get("command", ())) if handler else []


def unschedulable(pod: Pod) -> str | None:
    """What the scheduler says against the pod; None if it says nothing. Pure."""
    for condition in pod.status.conditions:
        if condition.type == "PodScheduled" and condition.reason == "Unschedulable":
            return condition.message or condition.reason
    return None


async def await_gate(
    agent: Agent, handover: Handover, reference: pb.MigrationRef, seconds: float
) -> None:
    """Return when the restore waits at the gate; Aborted as soon as it never will."""
    request = pb.AwaitGateRequest(migration=reference)
    gate = asyncio.ensure_future(agent.await_gate(request, seconds))
    watch = asyncio.ensure_future(_watch(handover))
    try:
        await asyncio.wait({gate, watch}, return_when=asyncio.FIRST_COMPLETED)
        # The agent knows why better than the pod's status does, and a gate reached in the same
        # moment counts.
        await asyncio.wait({gate}, timeout=_WORD_SECONDS)
        heard = gate.done() and not isinstance(gate.exception(), Retryable)
        await (gate if heard or not watch.done() else watch)
    finally:
        for task in (gate, watch):
            task.cancel()
        await asyncio.gather(gate, watch, return_exceptions=True)


async def _watch(handover: Handover) -> None:
    """Never returns; raises when there is nothing to wait for."""
    since: float | None = None
    while True:
        try:
            pod = await handover.successor()
        except Retryable:
            await asyncio.sleep(_POLL_SECONDS)
            continue
        end = hopeless(pod)
        if end is not None or pod is None:
            raise end or Aborted(Reason.SUCCESSOR_FAILED, "The successor was deleted")
        told = unschedulable(pod)
        now = time.monotonic()
        since = (since or now) if told else None
        if told and since is not None and now - since > _UNSCHEDULABLE_SECONDS:
            raise Aborted(Reason.SUCCESSOR_NOT_SCHEDULED, told)
        await asyncio.sleep(_POLL_SECONDS)


async def mark_moved(api: KubeApi, migration: PodMigration) -> None:
    """Write on the successor which address it has brought along, and whose it was."""
    status = migration.status
    patch = {
        "metadata": {
            "uid": status.successor_uid,
            "annotations": {
                ADDRESS_ANNOTATION: ",".join(migration.ips),
                HOME_NODE_ANNOTATION: status.handover.address_home or status.source_node,
            },
        }
    }
    try:
        await api.patch(PODS, migration.metadata.namespace, status.successor_name, patch)
    except (NotFoundError, ConflictError):
        return  # deleted already; its address goes with it
