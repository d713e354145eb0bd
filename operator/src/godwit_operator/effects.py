"""The effect of each step. Idempotent; raises GodwitError, or says how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import assert_never

import msgspec

from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable
from godwit_api.migration import Failure, PodMigration
from godwit_api.pb import agent_pb2 as pb
from godwit_api.pods import Node, Pod
from godwit_api.reasons import Reason
from godwit_operator import progress
from godwit_operator.addresses import Addresses
from godwit_operator.agents import Agent, AgentPool
from godwit_operator.bridge import Bridge
from godwit_operator.fencing import is_fenced, without_source
from godwit_operator.handover import Handover
from godwit_operator.inspection import Facts, Inspection
from godwit_operator.kube import NODES, PODS, KubeApi, find
from godwit_operator.localvolumes import open_to_target, settle
from godwit_operator.messages import copied_volumes, pod_ref, reference
from godwit_operator.pages import await_pages
from godwit_operator.plan import Committed, Done, Failed, Result, is_lost
from godwit_operator.quantity import number
from godwit_operator.queue import Queue
from godwit_operator.status import Learned, seconds
from godwit_operator.steps import Step
from godwit_operator.storage import storage_of
from godwit_operator.successor import await_gate, expectation, mark_moved

log = logging.getLogger(__name__)
Report = Callable[[Learned], Awaitable[None]]
Answer = tuple[Result, Learned]
DONE: Answer = (Done(), Learned())
_BRIDGE_SECONDS = 30  # what the EndpointSlice controller gets to follow


@dataclass(frozen=True)
class Ports:
    """What effects act on."""

    api: KubeApi
    agents: AgentPool
    addresses: Addresses
    queue: Queue
    namespace: str  # the operator's own


@dataclass(frozen=True)
class Effects:
    """Effects of one migration, as it is now."""

    ports: Ports
    migration: PodMigration
    cancel: bool
    report: Report

    async def run(self, step: Step) -> Answer:
        """Carry ``step`` out."""
        match step:
            case Step.QUEUE:
                return await self._queue()
            case Step.CHECK:
                return Done(), await self._inspection.run()
            case Step.PREPARE_TARGET | Step.COPY | Step.GUARD | Step.EXPECT_POD | Step.AWAIT_GATE:
                return await self._toward(step)
            case Step.BRIDGE | Step.STORE_MANIFEST | Step.ARM_RULE | Step.DELETE_POD:
                return await self._replace(step)
            case Step.CREATE_SUCCESSOR | Step.FIND_SUCCESSOR | Step.RELEASE_SUCCESSOR:
                return await self._succeed(step)
            case Step.SWITCH:
                return await self._switch()
            case Step.RESOLVE_SWITCH:
                return await self._outcome() or DONE
            case Step.SYNC_ADDRESSES | Step.AWAIT_PAGES | Step.FINISH_SOURCE | Step.FINISH_TARGET:
                return await self._finish(step)
            case Step.AWAIT_READY | Step.REMOVE_BRIDGE | Step.DISARM_RULE | Step.CLEAN_UP:
                return await self._tidy(step)
            case Step.RELEASE_SOURCE | Step.DROP_TARGET | Step.ABORT_ATTEMPT:
                return await self._abort(step)
            case Step.REARM_RULE | Step.DELETE_SUCCESSOR | Step.NEXT_TARGET | Step.LET_GO:
                return await self._again(step)
            case Step.SUCCEEDED | Step.REJECTED | Step.ABORTED | Step.STALLED:
                return DONE
            case _:
                assert_never(step)

    # -- shorthands -----------------------------------------------------------------------
    @property
    def _handover(self) -> Handover:
        return Handover(self.ports.api, self.ports.namespace, self.migration)

    @property
    def _bridge(self) -> Bridge:
        return Bridge(self.ports.api, self.migration)

    @property
    def _inspection(self) -> Inspection:
        return Inspection(self.ports.api, self.ports.agents, self.migration)

    @property
    def _post_copy(self) -> bool:
        """Not on the way home: a process that never leaves its node has nothing to gain."""
        status = self.migration.status
        asked = self.migration.spec.convergence == "PostCopy"
        return asked and status.target_node != status.source_node

    async def _source(self) -> Agent:
        return await self.ports.agents.agent(self.migration.status.source_node)

    async def _target(self) -> Agent:
        return await self.ports.agents.agent(self.migration.status.target_node)

    @property
    def _ref(self) -> pb.MigrationRef:
        return reference(self.migration)

    # -- before the handover --------------------------------------------------------------
    async def _queue(self) -> Answer:
        pod = await find(
            self.ports.api, PODS, self.migration.metadata.namespace, self.migration.spec.pod_name
        )
        source = pod["spec"].get("nodeName", "") if pod else ""
        nodes = {source, self.migration.spec.target.node_name or ""} - {""}
        self.ports.queue.enter(self.migration.metadata.uid, nodes)
        return DONE

    async def _toward(self, step: Step) -> Answer:
        migration, status = self.migration, self.migration.status
        note, timeouts = status.handover, migration.spec.timeouts
        match step:
            case Step.PREPARE_TARGET:
                await (await self._target()).prepare_target(
                    pb.PrepareTargetRequest(
                        migration=self._ref,
                        pod=pod_ref(migration),
                        source=await self.ports.agents.peer(status.source_node),
                        containers=note.containers,
                        memory_bytes=note.memory_bytes,
                        volumes=copied_volumes(migration),
                    )
                )
            case Step.COPY:
                return await self._copy()
            case Step.GUARD:
                request = pb.GuardRequest(migration=self._ref, pod=pod_ref(migration))
                await (await self._source()).guard(request)
                return Done(), Learned(note={"guarded": True})
            case Step.EXPECT_POD:
                pod = await self._handover.successor()
                if pod is None:
                    raise Aborted(Reason.SUCCESSOR_FAILED, "The successor was deleted")
                await (await self._target()).expect_pod(expectation(migration, pod))
                return Done(), Learned(note={"expected": True})
            case _:
                await await_gate(
                    await self._target(), self._handover, self._ref, timeouts.handover_seconds
                )
        return DONE

    async def _copy(self) -> Answer:
        migration, spec = self.migration, self.migration.spec
        request = pb.CopyRequest(
            migration=self._ref,
            pod=pod_ref(migration),
            target=await self.ports.agents.peer(migration.status.target_node),
            freeze_budget_ms=spec.freeze_budget_milliseconds or 0,
            bandwidth_limit_bytes_per_s=int(number(spec.bandwidth_limit or 0)),
            compress=spec.compression == "Zstd",
            throttle=spec.convergence == "Throttle",
            volumes=copied_volumes(migration),
            post_copy=self._post_copy,
        )
        last: pb.CopyProgress | None = None
        learned = Learned()
        agent = await self._source()
        note, begin = migration.status.handover, time.monotonic()
        async for last in agent.copy(request, spec.timeouts.copy_seconds):
            learned = Learned(status=progress.of_copy(last, note.memory_bytes + note.files_bytes))
            await self.report(learned)
        if last is None or not last.converged:
            raise Retryable(Reason.COPY_FAILED, "The copy ended before it had converged")
        if spec.dry_run:
            total = time.monotonic() - begin + last.predicted_freeze_ms / 1000
            found = Learned(status={"predicted_total_seconds": round(total, 3)})
            learned = learned.merged(found)
        return Done(), learned.merged(Learned(note={"copied": True}))

    # -- the handover ---------------------------------------------------------------------
    async def _replace(self, step: Step) -> Answer:
        status = self.migration.status
        match step:
            case Step.BRIDGE:
                namespace, name = self.migration.metadata.namespace, self.migration.spec.pod_name
                body = await find(self.ports.api, PODS, namespace, name)
                if body is None or body["metadata"]["uid"] != status.pod_uid:
                    raise Aborted(Reason.SOURCE_DELETED, "The pod was deleted meanwhile")
                await self._handover.announce()
                await self._bridge.build(msgspec.convert(body, Pod))
            case Step.STORE_MANIFEST:
                await self._handover.store_manifest()
            case Step.ARM_RULE:
                await self._handover.arm()
                return Done(), Learned(note={"rule_proven": True})
            case _:
                await self._handover.delete_pod(self.migration.spec.pod_name, status.pod_uid)
        return DONE

    async def _succeed(self, step: Step) -> Answer:
        match step:
            case Step.CREATE_SUCCESSOR:
                await self._handover.create_bare()
            case Step.FIND_SUCCESSOR:
                pod = await self._handover.find_successor()
                await open_to_target(self.ports.api, self.migration)
                found = {"successor_name": pod.metadata.name, "successor_uid": pod.metadata.uid}
                return Done(), Learned(status=found)
            case _:
                await self._handover.release(self.migration.status.target_node)
                return Done(), Learned(note={"released": True})
        return DONE

    # -- the switch -----------------------------------------------------------------------
    async def _switch(self) -> Answer:
        spec = self.migration.spec
        timeout_ms = spec.timeouts.freeze_milliseconds
        request = pb.SwitchRequest(
            migration=self._ref,
            pod=pod_ref(self.migration),
            target=await self.ports.agents.peer(self.migration.status.target_node),
            freeze_budget_ms=spec.freeze_budget_milliseconds or 0,
            freeze_timeout_ms=timeout_ms,
            post_copy=self._post_copy,
        )
        response = await (await self._source()).switch(request, timeout_ms / 1000 + 60)
        return _ended(response, self.migration)

    async def _outcome(self) -> Answer | None:
        """How the present attempt's switch has ended; None: it has not."""
        try:
            records = await (await self._source()).get_migration(self.migration.metadata.uid)
        except Retryable as failure:
            return await self._fenced(failure), Learned()
        for record in records:
            mine = record.epoch == self.migration.status.epoch and record.role == pb.ROLE_SOURCE
            if mine and record.HasField("outcome"):
                return _ended(record.outcome, self.migration)
        return None

    async def _fenced(self, failure: Retryable) -> Result:
        return await without_source(self.ports.api, self.ports.agents, self.migration, failure)

    # -- after the commit -----------------------------------------------------------------
    async def _finish(self, step: Step) -> Answer:
        status = self.migration.status
        match step:
            case Step.SYNC_ADDRESSES:
                await mark_moved(self.ports.api, self.migration)
                failures = await self.ports.addresses.sync()
                for node in {status.source_node, status.target_node, status.handover.address_home}:
                    if node in failures and not await is_fenced(self.ports.api, node):
                        raise failures[node]
            case Step.AWAIT_PAGES:
                return await self._pages()
            case Step.FINISH_SOURCE:
                if not await is_fenced(self.ports.api, status.source_node):
                    source = pb.FinishSourceRequest(
                        migration=self._ref,
                        pod=pod_ref(self.migration),
                        lost=status.handover.lost,
                    )
                    await (await self._source()).finish_source(source)
            case _:
                if not await is_fenced(self.ports.api, status.target_node):
                    target = pb.FinishTargetRequest(migration=self._ref)
                    await (await self._target()).finish_target(target)
        return DONE

    async def _pages(self) -> Answer:
        api, status = self.ports.api, self.migration.status
        if await is_fenced(api, status.target_node):
            message = f"Node {status.target_node} is gone and with it the pod's process"
            return Failed(Failure(reason=Reason.NODE_LOST, message=message)), Learned()
        source = status.source_node
        return await await_pages(
            await self._target(), self.migration, self.report, lambda: is_fenced(api, source)
        )

    async def _tidy(self, step: Step) -> Answer:
        note = self.migration.status.handover
        match step:
            case Step.AWAIT_READY:
                pod = await self._handover.successor()
                if pod is not None and not pod.ready and not pod.finished:
                    raise Retryable(
                        Reason.IN_PROGRESS,
                        f"Waiting for pod {pod.metadata.name} to become Ready",
                        delay_seconds=0.2,
                    )
            case Step.REMOVE_BRIDGE:
                pod = await self._handover.successor() if note.committed else None
                waited = time.time() - seconds(note.step_started)
                await self._bridge.remove(successor=pod, patient=waited < _BRIDGE_SECONDS)
            case Step.DISARM_RULE:
                await self._disarm()
            case _:
                await self._disarm()
                await self._handover.release_bystanders()
                await self._handover.forget_manifest()
                await self._drop_former()
                self.ports.queue.leave(self.migration.metadata.uid)
        return DONE

    async def _disarm(self) -> None:
        """The rule holds other pods back until volumes are where the pod is."""
        await settle(self.ports.api, self.migration)
        await self._handover.disarm()

    async def _drop_former(self) -> None:
        """Once more what ``DropTarget`` gave up after its time: an agent that was away then may be
        there now. Each attempt but the one that has committed; the pods of them are deleted."""
        status = self.migration.status
        former = [*status.handover.failed_targets]  # of epochs 1, 2, …
        if not status.handover.committed and status.target_node:
            former.append(status.target_node)
        for epoch, node in enumerate(former, 1):
            ref = reference(self.migration, epoch=epoch)
            try:
                agent = await self.ports.agents.agent(node)
                await agent.abort_target(pb.AbortTargetRequest(migration=ref))
            except GodwitError as failure:
                keys = {"migration": self.migration.key, "node": node, "epoch": epoch}
                log.warning("target was not cleaned up", extra=keys | {"cause": str(failure)})

    # -- back, or on ----------------------------------------------------------------------
    async def _abort(self, step: Step) -> Answer:
        note = self.migration.status.handover
        if step is Step.DROP_TARGET:
            if self.migration.status.target_node:
                await (await self._target()).abort_target(
                    pb.AbortTargetRequest(migration=self._ref)
                )
            return DONE
        if step is Step.ABORT_ATTEMPT:
            ended = await self._outcome()
            if ended is not None and (isinstance(ended[0], Committed) or _is_lost(ended[0])):
                return ended
        elif await is_fenced(self.ports.api, self.migration.status.source_node):
            return Done(), Learned(note={"attempt_open": False, "guarded": False})
        request = pb.AbortSourceRequest(
            migration=self._ref,
            pod=pod_ref(self.migration),
            lift_guard=step is Step.RELEASE_SOURCE,
        )
        try:
            await (await self._source()).abort_source(request)
        except Rejected as failure:
            if step is Step.ABORT_ATTEMPT and failure.reason is Reason.WRONG_STEP:
                # it may have committed between question and request: ask again
                raise Retryable(failure.reason, failure.message, delay_seconds=0.2) from failure
            raise
        guarded = note.guarded and step is Step.ABORT_ATTEMPT
        return Done(), Learned(note={"attempt_open": False, "guarded": guarded})

    async def _again(self, step: Step) -> Answer:
        status, handover = self.migration.status, self._handover
        match step:
            case Step.REARM_RULE:
                await handover.arm()
                return Done(), Learned(note={"rule_proven": True})
            case Step.DELETE_SUCCESSOR:
                if status.successor_uid and status.handover.expected:
                    await handover.delete_pod(status.successor_name, status.successor_uid)
                return Done(), _no_successor()
            case Step.NEXT_TARGET:
                return Done(), await self._next_target()
            case _:
                await self._disarm()
                if status.successor_uid:
                    await handover.delete_pod(status.successor_name, status.successor_uid)
                if handover.bare:
                    await handover.create_bare(gate=False)
                return Done(), _no_successor()

    async def _next_target(self) -> Learned:
        """Another node if the selector allows one and nobody cancels, else home."""
        status, note = self.migration.status, self.migration.status.handover
        failed = [*note.failed_targets, status.target_node]
        home = status.source_node
        chosen: str | None = None
        named = self.migration.spec.target.node_name is not None
        if not named and not self.cancel and home not in failed:
            chosen = await self._another(failed)
        target = chosen or home
        returns = note.returns + (1 if target == home else 0)
        return Learned(
            status={"target_node": target, "epoch": status.epoch + 1},
            note={"failed_targets": failed, "returns": returns, "copied": False},
        )

    async def _another(self, failed: list[str]) -> str | None:
        status, note = self.migration.status, self.migration.status.handover
        marked = await self._handover.marked()
        if not marked:
            return None
        pod = msgspec.convert(marked[0], Pod)
        try:
            report = await (await self._source()).get_node()
            nodes = msgspec.convert(await self.ports.api.list(NODES), list[Node])
            facts = Facts(
                report,
                note.memory_bytes,
                note.files_bytes,
                note.volumes,
                await storage_of(self._inspection.api, pod),
            )
            chosen, _ = await self._inspection.choose(
                pod, status.source_node, nodes, await self.ports.agents.nodes(), facts, failed
            )
        except GodwitError:
            return None  # home is always possible
        return chosen


def _is_lost(result: Result) -> bool:
    return isinstance(result, Failed) and is_lost(result.failure)


def _no_successor() -> Learned:
    return Learned(
        status={"successor_name": "", "successor_uid": ""},
        note={"expected": False, "released": False},
    )


def _ended(response: pb.SwitchResponse, migration: PodMigration) -> Answer:
    freeze_ms = round(response.freeze_us / 1000, 1)
    learned = Learned(
        status={
            "freeze_milliseconds": freeze_ms,
            "freeze": f"{freeze_ms:.0f}ms",
            "transferred_bytes": response.transferred_bytes or migration.status.transferred_bytes,
            "remaining_bytes": response.missing_bytes,
            "post_copy_bytes": response.missing_bytes or None,
            "copy_seconds_left": None,
            "timings": dict(response.timings_us),
        }
    )
    if response.committed:
        return Committed(), learned
    failure = Failure(reason=response.failure.reason, message=response.failure.message)
    return Failed(failure), Learned()
