"""A checkpoint: the source's side of a move whose target is a file, and whose end is a thaw.

The rounds go into a spool on this node while the pod runs. Then freeze, dump,
last changes, and the way back of a move that did not commit: CRIU lets go, the
processes run on with their connections. The journal says the same as in such a
move, so that recovery after a restart of the agent is the same, too. Packing
and encrypting come after the thaw; only a pod that is to stop waits for them
frozen, because nothing may happen in it that the archive does not have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from godwit_agent import log
from godwit_agent.app.copying import Copier
from godwit_agent.app.guarding import Guards
from godwit_agent.app.journal import Step
from godwit_agent.app.model import CopyPolicy, Migration, Outcome, PeerNode, Pod
from godwit_agent.app.outlet import Outlet
from godwit_agent.app.rollback import roll_back
from godwit_agent.app.sessions import SourceSession
from godwit_agent.app.source_sessions import SourceSessions
from godwit_agent.app.stopwatch import Stopwatch
from godwit_agent.app.switch import HANDSHAKE_HOLD_S, Watchdog, aborted
from godwit_agent.archive import contents
from godwit_agent.archive.contents import Entry
from godwit_agent.archive.sealed import FORMAT
from godwit_agent.hostops.checkpoints.archives import Archives, Draft, exists_already
from godwit_agent.hostops.checkpoints.spool import Spool
from godwit_agent.hostops.ports import Host
from godwit_api.errors import Rejected, Retryable, Unsafe
from godwit_api.reasons import Reason

_FREEZE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for."""

    archives: Archives
    archive: str
    key: bytes
    leave_running: bool
    manifest: dict[str, Any]  # the Pod object


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What has been written."""

    archive_bytes: int
    content_bytes: int
    freeze_us: int
    timings_us: dict[str, int]


class Checkpointer:
    """All checkpoints of pods of this node."""

    def __init__(
        self,
        *,
        host: Host,
        sessions: SourceSessions,
        guards: Guards,
        spool: Callable[[str, Sequence[str]], Spool],
        here: PeerNode,
    ) -> None:
        self._host = host
        self._sessions = sessions
        self._guards = guards
        self._spool = spool
        self._here = here

    def run(
        self,
        migration: Migration,
        pod: Pod,
        plan: Plan,
        *,
        deadline: float,
        active: Callable[[], bool],
    ) -> Checkpoint:
        """Leaves the archive, and the pod running, or held frozen when it is to stop.

        Whatever fails, the pod runs on as it was; a repeated call starts over.
        """
        if plan.archives.exists(pod.namespace, plan.archive):
            return self._written(migration, pod, plan)
        session = self._sessions.of_call(migration, pod, self._here)
        with session.busy("Checkpoint", deadline - 1.0):
            if plan.archives.exists(pod.namespace, plan.archive):
                return self._written(migration, pod, plan)  # by a call that this one has waited for
            if session.journal.terminal or session.journal.has(Step.SWITCHING):
                raise Rejected(Reason.WRONG_STEP, "this checkpoint has failed before")
            try:
                needed = self._require_room(session)
                draft = plan.archives.begin(pod.namespace, plan.archive, needed)
                try:
                    return self._run(session, plan, draft, deadline, active)
                finally:
                    draft.discard()
            except Unsafe:
                raise  # hands off: the guard stays, a person decides
            except BaseException:
                self._end(session)
                raise

    def release(self, migration: Migration, pod: Pod) -> None:
        """After a checkpoint that was to stop the pod, whose Pod object is gone: ends it."""
        session = self._sessions.of_call(migration, pod, None)
        with session.busy("Release"):
            if session.journal.terminal:
                return
            if not session.journal.has(Step.RUNNING):
                raise Rejected(Reason.WRONG_STEP, "this pod was not to stop, or has no archive yet")
            self._host.cgroups.kill([c.id for c in session.processes.state.containers])
            self._host.cgroups.kill([session.processes.state.sandbox.id])
            session.processes.discard()
            self._guards.lift(session.processes, back=False)
            self._close(session, Step.FINISHED)

    def _run(
        self,
        session: SourceSession,
        plan: Plan,
        draft: Draft,
        deadline: float,
        active: Callable[[], bool],
    ) -> Checkpoint:
        spool = self._copy(session, deadline, active)
        self._guard(session)
        session.processes.prepare()
        watch = Stopwatch()
        session.journal.append(Step.SWITCHING)
        thawed = False
        try:
            begin = self._freeze(session, spool, watch)
            if plan.leave_running:
                roll_back(session.migration, session.processes)
                thawed = True
            else:
                session.processes.release_dump()
            freeze_us = (time.monotonic_ns() - begin) // 1000
            if thawed:
                self._journal_thaw(session, freeze_us)
                self._guards.lift(session.processes, back=True)
            with watch.part("pack"):
                sizes = self._pack(session, spool, plan, draft, freeze_us)
            if not thawed:
                session.journal.append(Step.RUNNING, {"outcome": Outcome(True).to_json()})
        except Exception as error:
            if not thawed:
                roll_back(session.migration, session.processes)
                self._journal_thaw(session, 0)
            raise aborted(error, timed_out=False) from error
        if thawed:
            self._end(session)
        log.info("checkpoint written", uid=session.migration.uid, freeze_us=freeze_us)
        return Checkpoint(*sizes, freeze_us, dict(watch.parts_us))

    def _copy(self, session: SourceSession, deadline: float, active: Callable[[], bool]) -> Spool:
        self._host.stores.create_source(session.migration.uid)
        made: list[Spool] = []

        def connect(_: SourceSession) -> Outlet:
            made.append(self._spool(session.migration.uid, session.processes.containers))
            return made[-1]

        copier = Copier(connect)
        session.journal.append(Step.COPYING)
        for _ in copier.run(session, CopyPolicy(), deadline=deadline, active=active):
            pass
        session.journal.append(Step.COPIED)
        copier.once_more(session)
        return made[-1]

    def _guard(self, session: SourceSession) -> None:
        """The freezer and CRIU's shadow are those of the guard."""
        session.journal.append(Step.GUARDING)
        self._guards.guard(session)
        session.journal.append(Step.GUARDED)

    def _freeze(self, session: SourceSession, spool: Spool, watch: Stopwatch) -> int:
        """Begin of the freeze (``monotonic_ns``); everything is in the spool when it returns."""
        source = session.processes
        with (
            ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as workers,
            Watchdog(_FREEZE_TIMEOUT_S, spool.abort) as watchdog,
        ):
            workers.submit(int).result()  # its thread exists before the freeze
            source.hold_handshakes()
            time.sleep(HANDSHAKE_HOLD_S)
            begin = time.monotonic_ns()
            with watch.part("freeze"):
                source.freeze()
                source.close_door()
            changes = workers.submit(source.send_changes, spool, None, lambda: watchdog.fired)
            try:
                with watch.part("dump"):
                    source.dump(watchdog.left())
            finally:
                failure = changes.exception()
            if failure:
                raise failure
            with watch.part("images"):
                source.send_images(spool, moving=False)
            watchdog.decide(lambda: None)
        return begin

    def _written(self, migration: Migration, pod: Pod, plan: Plan) -> Checkpoint:
        """Ours, from an earlier call, or somebody else's."""
        namespace = pod.namespace
        with plan.archives.read(namespace, plan.archive) as file:
            about = contents.verify(file, plan.key)
            size = file.tell()
        if about.get("uid") != migration.uid:
            raise exists_already(namespace, plan.archive)
        journal = self._sessions.of_call(migration, pod, None).journal
        if not plan.leave_running and not journal.has(Step.RUNNING):
            message = "the archive is complete, but the pod has run on since: take another one"
            raise Rejected(Reason.WRONG_STEP, message)
        return Checkpoint(size, 0, int(about["freezeMicroseconds"]), {})

    def _pack(
        self, session: SourceSession, spool: Spool, plan: Plan, draft: Draft, freeze_us: int
    ) -> tuple[int, int]:
        facts = self._host.probe.facts()
        about: dict[str, Any] = {
            "format": FORMAT,
            "uid": session.migration.uid,
            "namespace": session.pod.namespace,
            "pod": session.pod.name,
            "podIP": session.pod.ip,
            "containers": list(session.processes.containers),
            "created": int(time.time()),
            "node": self._here.name,
            "kernel": facts.kernel,
            "architecture": facts.architecture,
            "versions": dict(facts.versions),
            "cpuFeatures": list(facts.cpu_features),
            "freezeMicroseconds": freeze_us,
            "memoryBytes": spool.bytes_sent,
            "manifest": plan.manifest,
        }
        size = contents.write(draft, plan.key, _entries(session, spool, plan), about)
        written = draft.tell()
        draft.commit()
        return written, size

    def _require_room(self, session: SourceSession) -> int:
        """Bytes that the pod needs in the spool."""
        found = self._host.inspector.inspect(session.processes.state)
        if found.obstacles:
            first = found.obstacles[0]
            raise Rejected(first.reason, "; ".join(one.message for one in found.obstacles))
        needed = sum(one.memory_bytes + one.files_bytes for one in found.containers)
        available = self._host.probe.facts().memory_available_bytes
        if available and needed * 5 // 4 > available:
            message = f"{needed} bytes are needed for a while, {available} are available here"
            raise Retryable(Reason.NOT_ENOUGH_MEMORY, message, delay_seconds=10.0)
        return needed

    def _journal_thaw(self, session: SourceSession, freeze_us: int) -> None:
        outcome = Outcome(False, Reason.CANCELLED, "a checkpoint does not commit", freeze_us)
        session.journal.append(Step.THAWED, {"outcome": outcome.to_json()})

    def _end(self, session: SourceSession) -> None:
        """The pod runs; nothing of the checkpoint stays in it or beside it."""
        session.processes.discard()
        session.close_outlet()
        session.processes.clean()
        self._guards.lift(session.processes, back=True)
        self._close(session, Step.ABORTED)

    def _close(self, session: SourceSession, step: Step) -> None:
        session.close_outlet()
        session.processes.clean()
        session.journal.append(step)
        self._sessions.end_all(session.migration.uid)
        self._sessions.drop(session)


def _entries(session: SourceSession, spool: Spool, plan: Plan) -> Iterator[Entry]:
    yield contents.whole(contents.POD, json.dumps(plan.manifest).encode())
    for one in session.processes.state.containers:
        config = json.dumps({"id": one.id, "name": one.name, "runtime": "runc"}).encode()
        yield from contents.of_container(one.name, [contents.whole("config.dump", config)])
        yield from contents.of_container(one.name, spool.entries(one))
