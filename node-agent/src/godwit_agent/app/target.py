"""Target side of a migration: what the operator and the source ask of the arriving node.

The successor's expectation (``expect/<pod uid>``) stays until ``FinishTarget``
or ``AbortTarget``; the operator calls the latter only after it has deleted
the successor's Pod object. In between it may be marked aborted: then the hook
refuses to start the pod, which must not run empty beside its source.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from godwit_agent import heap, log
from godwit_agent.app import fitness
from godwit_agent.app.arriving import Arriving, StoreSink
from godwit_agent.app.asking import Asking, require_not_committed
from godwit_agent.app.completing import Completing, incomplete
from godwit_agent.app.epochs import known, refuse_stale
from godwit_agent.app.journal import Journal, JournalStore, Key, Role, Step
from godwit_agent.app.model import Migration, PeerNode, Pod
from godwit_agent.app.peers import PeerFactory, Ran, Restored
from godwit_agent.app.sessions import TargetSession
from godwit_agent.app.stopwatch import Stopwatch
from godwit_agent.hostops.model import (
    NodeFacts,
    Obstacle,
    Outgoing,
    Place,
    Plan,
    Profiles,
    Volume,
)
from godwit_agent.hostops.ports import Host
from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable, Unsafe
from godwit_api.reasons import Reason

_SILENCE_S = 5.0
_GATE_STEP_S = 1.0
_RUNS = (Step.FENCED, Step.RESUMED)
"""Behind either the copy runs, or is about to and nothing else may become of it."""
_OVER = (*_RUNS, Step.LOST, Step.REFUSED, Step.ABORTED, Step.FINISHED)


class Target:
    """One object for all migrations that come to this node."""

    def __init__(self, *, host: Host, journals: JournalStore, peers: PeerFactory) -> None:
        self._host = host
        self._journals = journals
        self._peers = peers
        self._sessions: dict[tuple[str, int], TargetSession] = {}
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self._completing = Completing(peers, self.stopping)

    def check(
        self,
        migration: Migration,
        source: PeerNode,
        facts: NodeFacts,
        volumes: tuple[Volume, ...],
        profiles: Profiles,
    ) -> list[Obstacle]:
        """All obstacles at once; touches nothing."""
        refuse_stale(self._journals, migration.uid, migration.epoch)
        missing = self._host.probe.missing(profiles)
        return [
            *fitness.obstacles(source.name, facts, self._host.probe.facts()),
            *(Obstacle(Reason.PROFILE_MISSING, f"this node has no {one}") for one in missing),
            *self._host.volumes.arriving(volumes),
        ]

    def prepare(
        self,
        migration: Migration,
        pod: Pod,
        source: PeerNode,
        containers: tuple[str, ...],
        *,
        memory_bytes: int,
        volumes: tuple[Volume, ...] = (),
    ) -> None:
        """Makes the store that the stream fills. A repeated call keeps what has come."""
        with self._lock:
            refuse_stale(self._journals, migration.uid, migration.epoch)
            existing = self._sessions.get((migration.uid, migration.epoch))
            if existing:
                if existing.containers != containers or existing.source != source:
                    raise Rejected(Reason.MALFORMED, "this attempt was prepared differently")
                existing.pod.make_places()
                return
            self._require_no_other(migration)
            key = Key(migration.uid, migration.epoch, Role.TARGET)
            former = self._journals.get(key)
            if former and former.records:
                raise _why_over(former)
            if volumes and pod.uid in self._host.pods.list():
                # giving up would remove what the pod itself still uses
                message = "the pod's volumes are on this node already"
                raise Rejected(Reason.VOLUME_CANNOT_FOLLOW, message)
            places = self._host.volumes.survey(volumes)
            arriving = Arriving(self._host, migration.uid, migration.epoch, pod.ips)
            arriving.create_store(containers, memory_bytes, places)
            journal = self._journals.open(key)
            journal.append(
                Step.OPENED,
                {
                    "migration": migration.to_json(),
                    "pod": pod.to_json(),
                    "source": source.to_json(),
                    "containers": list(containers),
                    "places": msgspec.to_builtins(places),
                },
            )
            session = TargetSession(migration, source, containers, journal, arriving)
            self._sessions[migration.uid, migration.epoch] = session
            arriving.make_places()
        log.info("target prepared", **session.migration.keys, source=source.name)

    def admit(self, uid: str, epoch: int, containers: tuple[str, ...], node: str) -> StoreSink:
        """The stream's question: may ``node`` fill the store of this migration?"""
        session = self._session(uid, epoch)
        session.require_source(node)
        if containers != session.containers:
            raise Rejected(Reason.MALFORMED, "the source names other containers")
        _require_open(session)
        return session.pod.sink(session.packet)

    def expect(self, migration: Migration, successor: Pod, plan: Plan) -> None:
        """From now on this pod restores or does not start."""
        session = self._session(migration.uid, migration.epoch, current=True)
        with session.busy("ExpectPod"):
            record = session.journal.find(Step.EXPECTED)
            if record and record.data["pod"]["uid"] != successor.uid:
                raise Rejected(Reason.WRONG_STEP, "another successor is expected already")
            _require_open(session)
            if record is None:
                session.journal.append(Step.EXPECTED, {"pod": successor.to_json()})
            session.pod.expect(successor.uid, plan)
            log.info("successor expected", **session.migration.keys, pod=successor.name)

    def await_gate(self, migration: Migration, deadline: float, active: Callable[[], bool]) -> str:
        """The successor's native address once its restores wait at their gates."""
        session = self._session(migration.uid, migration.epoch, current=True)
        if not session.journal.has(Step.EXPECTED):
            raise Rejected(Reason.WRONG_STEP, "no successor is expected yet")
        while active() and time.monotonic() < deadline - 0.2:
            _require_open(session)
            native = session.pod.await_gate(min(_GATE_STEP_S, deadline - time.monotonic()))
            if native is not None:
                session.pod.charge()
                return native
        raise Retryable(Reason.TIMED_OUT, "the successor has not come to its gate yet")

    def arm(self, migration: Migration, node: str) -> None:
        """Before the freeze: everything that need not be inside it."""
        session = self._session(migration.uid, migration.epoch, current=True)
        session.require_source(node)
        with session.busy("Arm"):
            _require_open(session)
            if session.pod.await_gate(0.0) is None:
                raise Retryable(Reason.WRONG_STEP, "the successor does not wait at its gate")
            if not session.journal.has(Step.ARMED):
                session.journal.append(Step.ARMED)
            session.pod.arm()
            log.info("armed", **session.migration.keys)

    def restore(
        self,
        migration: Migration,
        node: str,
        deadline: float,
        outgoing: tuple[Outgoing, ...] = (),
        *,
        post_copy: bool = False,
    ) -> Restored:
        """Inside the freeze: a complete, stopped, verified copy, or an error. ``outgoing``: the
        pod's own connections, which this node translates from now on. ``post_copy``: complete
        but for pages that the source has said it withholds; they are fetched from now on."""
        watch = Stopwatch()
        session = self._session(migration.uid, migration.epoch, current=True)
        session.require_source(node)
        with session.busy("Restore", deadline):
            _require_open(session)
            if session.journal.last is not Step.ARMED:
                raise Rejected(Reason.WRONG_STEP, "the target is not armed")
            if not session.stopped:
                left = max(deadline - time.monotonic(), 0.01)
                self._start_asking(session, left + _SILENCE_S)
                session.pod.complete(watch, may_miss=post_copy)
                self._completing.start(session)
                session.stopped = session.pod.restore(left, watch, outgoing)
            missing = session.pod.missing()
            if missing:
                missing.hold()  # before it can run
            return Restored(session.stopped, watch.parts_us, missing.bytes if missing else 0)

    def take_route(self, migration: Migration, node: str) -> None:
        """The source has committed and will change its route now: what comes waits at the door."""
        session = self._session(migration.uid, migration.epoch)
        session.require_source(node)
        with session.busy("TakeRoute", time.monotonic() + 1):
            if session.journal.last is Step.ARMED:
                session.pod.take_route()
                session.routed = True

    def run(self, migration: Migration, node: str) -> Ran:
        """The source has committed: route, door, resume, replay. Never refused as stale."""
        session = self._session(migration.uid, migration.epoch)
        session.require_source(node)
        return self._run(session)

    def run_fenced(self, migration: Migration) -> Ran:
        """The operator's word that the source's node is fenced stands for the source's own.

        ``Rejected(NodeLost)``: there is no complete copy here, so there is none at all.
        """
        session = self._session(migration.uid, migration.epoch, current=True)
        with session.busy("RunFenced"):
            if incomplete(session):
                self._completing.without_source(session)
            if lost := session.journal.find(Step.LOST):
                raise Rejected(Reason.NODE_LOST, str(lost.data["message"]))
            if not session.journal.find(*_RUNS):
                self._require_copy(session)
                session.journal.append(Step.FENCED)
                log.warning("the source is fenced: its copy runs", **session.migration.keys)
        return self._run(session)

    def abort_restore(self, migration: Migration, node: str) -> None:
        """The source runs on: the copy goes, the expectation stays, aborted."""
        session = self._session(migration.uid, migration.epoch)
        session.require_source(node)
        self._refuse(session)

    def abort(self, migration: Migration) -> None:
        """The successor's Pod object is gone: nothing of this attempt stays.

        Served for a lower epoch, too: it touches nothing but that epoch's own.
        """
        self._end(migration, Step.ABORTED)

    def finish(self, migration: Migration) -> None:
        """The copy has run for a while: images and expectation go."""
        self._end(migration, Step.FINISHED)

    def resume_session(self, key: Key) -> TargetSession | None:
        """After a restart: what the journal knows."""
        journal = self._journals.open(key)
        record = journal.find(Step.OPENED)
        if record is None:
            return None
        migration = Migration.from_json(record.data["migration"])
        pod = Pod.from_json(record.data["pod"])
        arriving = Arriving(self._host, key.uid, key.epoch, pod.ips)
        expected = journal.find(Step.EXPECTED)
        places = msgspec.convert(record.data.get("places", ()), tuple[Place, ...])
        arriving.reopen(expected.data["pod"]["uid"] if expected else "", places)
        session = TargetSession(
            migration,
            PeerNode.from_json(record.data["source"]),
            tuple(record.data["containers"]),
            journal,
            arriving,
        )
        with self._lock:
            return self._sessions.setdefault((key.uid, key.epoch), session)

    def recover(self, session: TargetSession) -> None:
        """A copy may be here, or not: the source decides, or what has been decided goes on."""
        if session.journal.has(Step.LOST):
            session.pod.kill()
            self._completing.tell(session)
        elif incomplete(session) and not session.pod.here:
            message = "the node it ran on was restarted, and what had come went with it"
            self._completing.lose(session, Rejected(Reason.NODE_LOST, message))
        elif session.journal.find(*_RUNS):
            self._completing.start(session)
            try:
                self._run(session, again=True)
            finally:
                if session.fetching:  # also when the copy has ended meanwhile
                    session.fetching.run()
                if session.journal.has(Step.ARRIVED):
                    self._completing.tell(session)
        elif session.journal.last is Step.ARMED:
            self._completing.start(session)
            self._start_asking(session, 0.0)
        elif not session.journal.terminal:
            # what was in the store is of no use without the process that knew what is missing
            self._refuse(session, Reason.AGENT_RESTARTED)

    def _require_copy(self, session: TargetSession) -> None:
        over = session.journal.find(Step.REFUSED, Step.ABORTED, Step.FINISHED)
        try:
            if over is not None:
                raise Aborted(Reason.RESTORE_FAILED, f"the attempt is over ({over.step})")
            session.pod.verify()
            missing = session.pod.missing()
            if missing and missing.bytes:
                raise Aborted(Reason.RESTORE_FAILED, f"it lacks {missing.bytes} bytes of memory")
        except Aborted as error:
            message = f"this node holds no complete copy: {error.message}"
            raise Rejected(Reason.NODE_LOST, message) from error

    def _run(self, session: TargetSession, *, again: bool = False) -> Ran:
        watch = Stopwatch()
        with session.busy("Run", time.monotonic() + 5):
            record = session.journal.find(Step.RESUMED)
            if record and not again:
                return Ran(record.data["resumed_unix_ns"], record.data["timings_us"])
            if session.journal.find(Step.REFUSED, Step.ABORTED):
                raise Unsafe(Reason.RESTORE_FAILED, "the copy is gone")
            pod = session.pod
            if not record and not pod.here:
                message = "the copy is gone: this node was restarted before it was to run"
                raise Unsafe(Reason.RESTORE_FAILED, message)
            with watch.part("route"):
                if not session.routed:
                    pod.take_route()
            with watch.part("door"):
                pod.open_door()
            with watch.part("resume"):
                resumed_ns = pod.resume()
            with watch.part("after_resume"):
                if not record:
                    self._replay(session, watch)
                    data = {
                        "resumed_unix_ns": resumed_ns,
                        "timings_us": dict(watch.parts_us),
                        "incomplete": pod.missing() is not None,
                    }
                    session.journal.append(Step.RESUMED, data)
                log.info("running", **session.migration.keys, **watch.parts_us)
            if session.fetching:
                session.fetching.run()
            return Ran(resumed_ns, watch.parts_us)

    def _replay(self, session: TargetSession, watch: Stopwatch) -> None:
        """Held packets are wanted, not needed: a failure here is not the process's."""
        with session.packets_lock:
            packets, session.packets = session.packets, []
            session.resumed = True
        try:
            with watch.part("replay"):
                session.pod.inject([*packets, *session.pod.held()])
        except (OSError, Retryable) as error:
            log.warning("held packets were not replayed", **session.migration.keys, error=error)

    def _refuse(self, session: TargetSession, why: Reason = Reason.WRONG_STEP) -> None:
        with session.busy("AbortRestore", time.monotonic() + 20):
            if session.journal.find(*_RUNS):
                raise Rejected(Reason.WRONG_STEP, "the copy runs; the source has committed")
            if session.journal.terminal:
                return  # a late word: there is nothing any more
            self._completing.stop(session)
            session.pod.refuse()
            session.stopped = 0
            if not session.journal.has(Step.REFUSED):
                session.journal.append(Step.REFUSED, {"reason": why})
                log.info("copy refused", **session.migration.keys, reason=why)

    def _end(self, migration: Migration, step: Step) -> None:
        journal = self._journals.get(Key(migration.uid, migration.epoch, Role.TARGET))
        if journal is None or journal.terminal:
            return
        session = self._session(migration.uid, migration.epoch)
        with session.busy(step, time.monotonic() + 20):
            runs = session.journal.find(*_RUNS) is not None
            if step is Step.ABORTED and runs:
                raise Rejected(Reason.WRONG_STEP, "the copy runs; the source has committed")
            if step is Step.ABORTED and session.pod.holds_copy():
                require_not_committed(session, self._peers)
            if step is Step.FINISHED and not runs:
                raise Rejected(Reason.WRONG_STEP, "the copy does not run")
            if incomplete(session):
                message = "pages are still on the source"
                raise Retryable(Reason.IN_PROGRESS, message, delay_seconds=2.0)
            self._completing.stop(session)
            if not runs:
                session.pod.refuse()
            session.pod.disarm()
            session.pod.forget(runs=runs, lost=session.journal.has(Step.LOST))
            session.journal.append(step)
            if migration.uid not in self._journals.live():  # else this node is its source, too
                self._host.stores.destroy(migration.uid)
        with self._lock:
            self._sessions.pop((migration.uid, migration.epoch), None)
        heap.give_back()
        log.info("target over", **session.migration.keys, step=step)

    def missing(self, key: Key) -> tuple[int, GodwitError | None]:
        """(bytes of a running copy that are still on its source, why they never come)."""
        journal = self._journals.get(key)
        lost = journal.find(Step.LOST) if journal else None
        if lost:
            return 0, Rejected(Reason(lost.data["reason"]), str(lost.data["message"]))
        with self._lock:
            session = self._sessions.get((key.uid, key.epoch))
        missing = session.pod.missing() if session and incomplete(session) else None
        return (missing.bytes if missing else 0), None

    def _start_asking(self, session: TargetSession, silence_s: float) -> None:
        asking = Asking(
            session,
            self._peers,
            self.stopping,
            run=lambda: self._run(session),
            refuse=lambda: self._refuse(session),
        )
        asking.start(silence_s)

    def _session(self, uid: str, epoch: int, *, current: bool = False) -> TargetSession:
        if current:
            refuse_stale(self._journals, uid, epoch)
        key = known(self._journals, uid, epoch, Role.TARGET)
        with self._lock:
            session = self._sessions.get((uid, epoch))
        if session is None:
            session = self.resume_session(key)
        if session is None:
            raise Rejected(Reason.UNKNOWN_MIGRATION, f"{key} has an empty journal")
        return session

    def _require_no_other(self, migration: Migration) -> None:
        """The store belongs to the migration: an earlier attempt here must be over."""
        for key in self._journals.attempts(migration.uid):
            if key.role is Role.TARGET and not self._journals.open(key).terminal:
                message = f"epoch {key.epoch} of this migration is not over here: AbortTarget first"
                raise Rejected(Reason.WRONG_STEP, message)


def _require_open(session: TargetSession) -> None:
    if session.journal.find(*_OVER):
        raise _why_over(session.journal)


def _why_over(journal: Journal) -> GodwitError:
    """For a call that comes too late: what has ended the attempt, not only that it has ended."""
    refused = journal.find(Step.REFUSED)
    if refused and refused.data.get("reason") == Reason.AGENT_RESTARTED:
        message = "the target's agent was restarted, and what it had received so far is lost"
        return Aborted(Reason.AGENT_RESTARTED, message)
    return Rejected(Reason.WRONG_STEP, f"this attempt is over ({journal.last})")
