"""The driver: observe, plan, persist the intent, carry out one step, again.

It decides nothing. Whatever it knows between two steps is in the status, so it
may stop or die anywhere and another one goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from godwit_api import failpoints
from godwit_api.errors import GodwitError, Retryable, Unsafe
from godwit_api.migration import FINALIZER, Failure, PodMigration, Status
from godwit_api.reasons import Reason
from godwit_operator.clock import SteadyClock
from godwit_operator.effects import Effects, Ports
from godwit_operator.events import Events
from godwit_operator.inspection import Obstructed
from godwit_operator.kube import MIGRATIONS, PODS, ConflictError, NotFoundError, find
from godwit_operator.plan import (
    Again,
    Decision,
    Failed,
    InvariantError,
    Observation,
    Result,
    Source,
    plan,
)
from godwit_operator.status import (
    Learned,
    apply,
    encode,
    enter,
    merge_patch,
    observation,
    seconds,
    waiting,
)
from godwit_operator.steps import ENDS, INTERRUPTIBLE, Step

log = logging.getLogger(__name__)
_REPORT_SECONDS = 0.5
_TOLD_SECONDS = 0.5  # shorter waits are not worth a write


class Stop(Protocol):
    """Tells that this driver shall end, or that the object is being deleted."""

    def stopped(self) -> bool: ...
    def cancelled(self) -> bool: ...
    async def wait(self) -> None: ...


class SupersededError(Exception):
    """Somebody else has changed the status: observe anew."""


@dataclass
class _Tried:
    """How the present step ended, in this process."""

    result: Result | None = None
    learned: Learned = field(default_factory=Learned)
    delay: float = 0.0


class Driver:
    """Drives one migration to its end."""

    def __init__(
        self,
        ports: Ports,
        events: Events,
        namespace: str,
        name: str,
        stop: Stop,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._ports = ports
        self._events = events
        self._namespace = namespace
        self._name = name
        self._stop = stop
        self._clock = clock or SteadyClock()
        self._migration: PodMigration | None = None
        self._raw: dict[str, object] = {}
        self._reported = 0.0
        self._logged: tuple[Step, str] | None = None

    async def run(self) -> None:
        """Until the end, or until told to stop."""
        tried = _Tried()
        while not self._stop.stopped():
            try:
                migration = self._migration or await self._load()
                if migration is None:
                    return
                if self._ended(migration):
                    self._ports.queue.leave(migration.metadata.uid)
                    return
                tried = await self._turn(migration, tried)
            except (SupersededError, NotFoundError):
                self._migration, tried = None, _Tried()
            except Retryable as failure:  # the API is away: nothing is known, nothing is done
                log.warning("waiting for the API server", extra={"cause": str(failure)})
                self._migration = None
                await self._sleep(failure.delay_seconds)

    def _ended(self, migration: PodMigration) -> bool:
        step = migration.status.step
        revived = step == Step.STALLED and self._cancelled(migration)
        return step in ENDS and not revived

    def _cancelled(self, migration: PodMigration) -> bool:
        return self._stop.cancelled() or migration.metadata.deletion_timestamp is not None

    async def _turn(self, migration: PodMigration, tried: _Tried) -> _Tried:
        """One round: decide, announce, do."""
        status = apply(migration.status, tried.learned)
        seen = await self._observe(migration, status, tried.result)
        try:
            decision = plan(seen)
        except InvariantError as violation:
            log.error("invariant violated", extra={"violation": str(violation)})
            decision = Decision(
                Step.STALLED, Failure(reason=Reason.INTERNAL, message=str(violation))
            )
        same = decision.step == status.step and decision.failure is None
        if same and isinstance(tried.result, Again) and tried.delay >= _TOLD_SECONDS:
            await self._persist(waiting(migration, status, tried.result.failure, self._clock()))
        if isinstance(tried.result, Again | Failed) and decision.failure is None:
            await self._sleep(tried.delay)
        if not same or status.step == "":
            await self._announce(migration, status, decision)
        elif tried.learned != Learned():
            await self._persist(status)
        if decision.step in ENDS:
            # at once: kopf stops the daemon of an object that has ended
            self._ports.queue.leave(migration.metadata.uid)
            return _Tried()
        return await self._carry_out(decision.step, seen.cancel)

    async def _observe(
        self, migration: PodMigration, status: Status, result: Result | None
    ) -> Observation:
        return observation(
            migration,
            status,
            result,
            source=await self._source(migration, status),
            cancel=self._cancelled(migration),
            now=self._clock(),
        )

    async def _source(self, migration: PodMigration, status: Status) -> Source:
        """The Pod object with the recorded UID; not asked for where it plays no part."""
        if status.handover.committed or not status.pod_uid:
            return Source.PRESENT if not status.pod_uid else Source.GONE
        name = migration.spec.pod_name
        pod = await find(self._ports.api, PODS, self._namespace, name)
        if pod is None or pod["metadata"]["uid"] != status.pod_uid:
            return Source.GONE
        return Source.LEAVING if "deletionTimestamp" in pod["metadata"] else Source.PRESENT

    async def _announce(self, migration: PodMigration, status: Status, decision: Decision) -> None:
        now = self._clock()
        before = status
        if status.step == Step.STALLED:  # deleted by a person: bring the process home once more
            await self._sleep(5.0)
            note = msgspec.structs.replace(status.handover, returns=0)
            status = msgspec.structs.replace(status, handover=note)
        if decision.step is Step.PREPARE_TARGET:  # from here on there is something to clean up
            await self._await_finalizer()
        entered = enter(migration, status, decision, now)
        await _failpoint(f"{decision.step}.decided")
        await self._persist(entered)
        await _failpoint(f"{decision.step}.announced")
        took = now - seconds(before.handover.step_started) if before.handover.step_started else 0.0
        log.info(
            "step",
            extra={
                "migration": migration.key,
                "uid": migration.metadata.uid,
                "epoch": entered.epoch,
                "step": str(decision.step),
                "phase": entered.phase,
                "reason": entered.reason,
                "after": before.step,
                "duration_s": round(took, 3),
            },
        )
        await self._tell(before, entered, decision)

    async def _await_finalizer(self) -> None:
        """kopf sets it when it starts the daemon, but not before."""
        while self._migration is not None and not self._stop.stopped():
            if FINALIZER in self._migration.metadata.finalizers or self._cancelled(self._migration):
                return
            await self._sleep(0.05)
            mine = self._migration.status
            await self._load()
            if self._migration is None or self._migration.status != mine:
                raise SupersededError

    async def _tell(self, before: Status, after: Status, decision: Decision) -> None:
        """Events: each phase once, a failure when it turns the way."""
        migration = self._migration
        assert migration is not None
        if decision.failure is not None and decision.step not in ENDS:
            failure = decision.failure
            await self._events.post(migration, failure.reason, failure.message, warning=True)
        if before.phase == after.phase:
            return
        if decision.step is Step.SUCCEEDED:
            await self._events.post(migration, Reason.SUCCEEDED, after.message)
        elif decision.step in ENDS:
            names = ", ".join(dict.fromkeys(item.reason for item in after.obstacles))
            note = f"{after.phase}: {names or after.reason}: {after.message}"
            await self._events.post(migration, after.reason, note, warning=True)
        else:
            route = f"{after.source_node} to {after.target_node}" if after.target_node else ""
            note = f"Pod {migration.spec.pod_name} {route}".strip()
            await self._events.post(migration, after.phase, note)

    async def _carry_out(self, step: Step, planned_cancelled: bool) -> _Tried:
        migration = self._migration
        assert migration is not None
        cancel = self._cancelled(migration)
        effects = Effects(self._ports, migration, cancel, self._report)
        tried = _Tried()
        try:
            answer = await self._interruptible(effects, step, planned_cancelled)
            await _failpoint(f"{step}.done")
            if answer is not None:
                tried.result, tried.learned = answer
        except Obstructed as refused:
            obstacles = Learned(status={"obstacles": refused.obstacles})
            tried.result = Failed(_failure(refused))
            tried.learned = refused.learned.merged(obstacles)
        except Retryable as failure:
            tried.result, tried.delay = Again(_failure(failure)), failure.delay_seconds
        except GodwitError as failure:
            tried.result = Failed(_failure(failure), unsafe=isinstance(failure, Unsafe))
            tried.delay = 1.0
        except (NotFoundError, ConflictError) as failure:
            reason = Failure(reason=Reason.INTERNAL, message=f"{step}: {failure}")
            tried.result, tried.delay = Again(reason), 0.5
        if isinstance(tried.result, Again | Failed):
            self._log_cause(migration, step, tried.result.failure)
        return tried

    def _log_cause(self, migration: PodMigration, step: Step, failure: Failure) -> None:
        """Once for each reason: a wait is asked about many times a second."""
        told = (step, failure.reason)
        if told != self._logged:
            self._logged = told
            keys = {"migration": migration.key, "step": str(step), "reason": failure.reason}
            log.info("step not done", extra=keys | {"cause": failure.message})

    async def _interruptible(
        self, effects: Effects, step: Step, cancelled_before: bool
    ) -> tuple[Result, Learned] | None:
        """The effect's answer; None if it was cut short because of a deletion or the exit.

        ``cancelled_before``: the step was decided with the deletion in view, so it belongs to
        what a deletion asks for. One that has come since then cuts it short at once.
        """
        if step not in INTERRUPTIBLE or cancelled_before:
            return await effects.run(step)
        work = asyncio.ensure_future(effects.run(step))
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            return await work if work.done() else None
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    async def _report(self, learned: Learned) -> None:
        """Progress of a long effect, not too often."""
        if time.monotonic() - self._reported < _REPORT_SECONDS or self._migration is None:
            return
        self._reported = time.monotonic()
        with contextlib.suppress(GodwitError, SupersededError):
            await self._persist(apply(self._migration.status, learned))

    async def _sleep(self, delay: float) -> None:
        if delay > 0 and not self._stop.stopped():
            with contextlib.suppress(TimeoutError):
                if self._migration is not None and self._cancelled(self._migration):
                    await asyncio.sleep(delay)
                else:
                    await asyncio.wait_for(self._stop.wait(), delay)

    # -- the status -----------------------------------------------------------------------
    async def _load(self) -> PodMigration | None:
        body = await find(self._ports.api, MIGRATIONS, self._namespace, self._name)
        if body is None:
            return None
        self._take(body)
        return self._migration

    def _take(self, body: dict[str, object]) -> None:
        self._raw = body
        self._migration = msgspec.convert(body, PodMigration)

    async def _persist(self, status: Status) -> None:
        """Write the status if nobody else has written it; else SupersededError."""
        for _ in range(5):
            assert self._migration is not None
            old = self._raw.get("status")
            patch = merge_patch(old if isinstance(old, dict) else {}, encode(status))
            if not patch:
                return
            version = {"resourceVersion": self._migration.metadata.resource_version}
            body = {"metadata": version, "status": patch}
            try:
                self._take(
                    await self._ports.api.patch(
                        MIGRATIONS, self._namespace, self._name, body, sub="status"
                    )
                )
            except ConflictError:
                mine = self._migration.status
                await self._load()  # labels, finalizers and deletion are others' to change
                if self._migration is None or self._migration.status != mine:
                    raise SupersededError from None
                continue
            return
        raise SupersededError


async def _failpoint(name: str) -> None:
    """Off the event loop, which goes on serving while a test holds one migration up."""
    if failpoints.enabled():
        try:
            await asyncio.to_thread(failpoints.reach, f"operator.{name}")
        except OSError as error:
            raise Retryable(Reason.INTERNAL, str(error)) from error


def _failure(error: GodwitError) -> Failure:
    return Failure(reason=error.reason, message=error.message)
