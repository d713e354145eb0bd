"""Source side of a migration: what the operator asks of the node that the pod leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from godwit_agent import log
from godwit_agent.app import forward
from godwit_agent.app.copying import Copier, predicted_freeze_ms
from godwit_agent.app.epochs import refuse_stale
from godwit_agent.app.guarding import Guards
from godwit_agent.app.journal import JournalStore, Key, Role, Step
from godwit_agent.app.leaving import Leaving
from godwit_agent.app.model import CopyProgress, Migration, Outcome, PeerNode, Pod
from godwit_agent.app.peers import Decision, PeerFactory
from godwit_agent.app.sessions import SourceSession
from godwit_agent.app.switching import Switcher
from godwit_agent.hostops.model import Inspection, Obstacle, PodState
from godwit_agent.hostops.ports import Host
from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable, Unsafe
from godwit_api.reasons import Reason


class Source:
    """One object for all migrations that leave this node."""

    def __init__(
        self,
        *,
        host: Host,
        journals: JournalStore,
        guards: Guards,
        copier: Copier,
        peers: PeerFactory,
        own_address: str,
        default_freeze_timeout_ms: int,
    ) -> None:
        self._host = host
        self._journals = journals
        self._guards = guards
        self._copier = copier
        self._peers = peers
        self._own_address = own_address
        self._default_timeout_ms = default_freeze_timeout_ms
        self._sessions: dict[tuple[str, int], SourceSession] = {}
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def stop(self) -> None:
        """Ends streams and trackers; what is frozen, guarded or committed stays so."""
        self.stopping.set()
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.close_outlet()
            session.processes.close()

    def check(self, migration: Migration, pod: Pod) -> Inspection:
        """All obstacles at once; touches nothing."""
        refuse_stale(self._journals, migration.uid, migration.epoch)
        try:
            state = self._host.pods.find(pod.uid)
        except Rejected as error:
            return Inspection((Obstacle(error.reason, error.message),), ())
        found = self._host.inspector.inspect(state)
        here = state.link.addresses if state.link else ()
        if pod.ip not in {address.partition("/")[0] for address in here}:
            message = f"pod {pod.name} does not have the address {pod.ip} here"
            strange = Obstacle(Reason.NETWORK_NOT_ROUTED, message)
            return Inspection((*found.obstacles, strange), found.containers)
        return found

    def copy(
        self,
        migration: Migration,
        pod: Pod,
        target: PeerNode,
        *,
        freeze_budget_ms: int,
        bandwidth_limit: int,
        deadline: float,
        active: Callable[[], bool],
    ) -> Iterator[CopyProgress]:
        """Copies until what is left is small; the pod runs and is not touched."""
        session = self._session(migration, pod, target)
        with session.busy("Copy", deadline):
            _require_undecided(session)
            session.journal.append(Step.COPYING)
            yield from self._copier.run(
                session,
                budget_ms=freeze_budget_ms,
                limit=bandwidth_limit,
                deadline=deadline,
                active=active,
            )
            session.journal.append(Step.COPIED)
            log.info("copied", **_keys(session), bandwidth=session.bandwidth)

    def guard(self, migration: Migration, pod: Pod) -> None:
        """From now on nobody but us ends these processes."""
        session = self._session(migration, pod, None)
        with session.busy("Guard"):
            _require_undecided(session)
            if not session.journal.has(Step.GUARDING):
                session.journal.append(Step.GUARDING)
            self._guards.guard(session)
            if not session.journal.has(Step.GUARDED):
                session.journal.append(Step.GUARDED)
                log.info("guarded", **_keys(session), pod=pod.name)

    def switch(
        self,
        migration: Migration,
        pod: Pod,
        target: PeerNode,
        *,
        budget_ms: int,
        timeout_ms: int,
        deadline: float,
    ) -> Outcome:
        """Moves the processes. A repeated call waits for the first one and answers the same."""
        session = self._session(migration, pod, target)
        with session.busy("Switch", deadline):
            known = self.outcome(session.journal.key)
            if known is not None:
                return known
            if session.journal.has(Step.COMMITTED):
                return self._still_forward(session, deadline)
            if session.undecidable:
                message = "a commit record could not be written nor taken back; see the log"
                raise Unsafe(Reason.INTERNAL, message)
            _require_undecided(session)
            switcher = Switcher(session, target, self._peers(target))
            if session.journal.has(Step.SWITCHING):
                return switcher.roll_back(Aborted(Reason.INTERNAL, "an earlier rollback failed"))
            if not session.journal.has(Step.GUARDED):
                raise Rejected(Reason.WRONG_STEP, "the source is not guarded")
            self._copier.once_more(session)
            predicted = predicted_freeze_ms(session.dirty_bytes, session.bandwidth)
            if budget_ms and predicted > budget_ms:
                message = f"predicted freeze {predicted} ms, budget {budget_ms} ms"
                return Outcome(False, Reason.FREEZE_BUDGET_EXCEEDED, message)
            timeout_s = (timeout_ms or self._default_timeout_ms) / 1000
            return switcher.switch(timeout_s) or self._still_forward(session, deadline)

    def finish(self, migration: Migration, pod: Pod) -> None:
        """After the commit: kills what is left, lifts the guard. The kubelet does the rest."""
        key = Key(migration.uid, migration.epoch, Role.SOURCE)
        journal = self._journals.get(key)
        if journal is None or journal.last is Step.FINISHED:
            return
        session = self._session(migration, pod, None)
        with session.busy("FinishSource"):
            if not session.journal.has(Step.RUNNING):
                message = "the target has not said that its copy runs"
                raise Retryable(Reason.WRONG_STEP, message, delay_seconds=2.0)
            session.processes.hold_address()
            session.processes.kill()
            session.processes.discard()
            self._guards.lift(session.processes, back=False)
            session.journal.append(Step.FINISHED)
            self._drop(session)
            log.info("source finished", **_keys(session))

    def abort(self, migration: Migration, pod: Pod, *, lift_guard: bool) -> None:
        """Gives this attempt up, before the commit only."""
        refuse_stale(self._journals, migration.uid, migration.epoch)
        key = Key(migration.uid, migration.epoch, Role.SOURCE)
        journal = self._journals.get(key)
        if (journal is None or journal.last is Step.ABORTED) and not lift_guard:
            return
        session = self._session(migration, pod, None)
        if session.journal.has(Step.COMMITTED):
            raise Rejected(Reason.WRONG_STEP, "this migration has committed")
        session.cancelled.set()
        if session.outlet:
            session.outlet.abort()
        with session.busy("AbortSource", time.monotonic() + 20):
            if session.journal.has(Step.COMMITTED):
                raise Rejected(Reason.WRONG_STEP, "this migration has committed")
            session.close_outlet()
            if lift_guard:
                self._guards.lift(session.processes, back=True)
                for earlier in self._journals.attempts(migration.uid):
                    other = self._journals.open(earlier)
                    if earlier.role is Role.SOURCE and not other.terminal:
                        other.append(Step.ABORTED)
            elif session.journal.last is not Step.PARKED:
                session.journal.append(Step.PARKED)
            self._drop(session)
            log.info("source aborted", **_keys(session), guard_lifted=lift_guard)

    def decision(self, migration: Migration, node: str) -> Decision:
        """For a target that holds a stopped copy and has heard nothing."""
        journal = self._journals.get(Key(migration.uid, migration.epoch, Role.SOURCE))
        if journal is None:
            raise Rejected(Reason.UNKNOWN_MIGRATION, f"migration {migration.uid} is not known here")
        peer = journal.find(Step.OPENED)
        if peer is None or (peer.data.get("peer") or {}).get("name") != node:
            raise Rejected(Reason.WRONG_PEER, f"{node} is not the target of this migration")
        committed = journal.has(Step.COMMITTED)
        over = (Step.THAWED, Step.PARKED, Step.ABORTED)
        return Decision(committed, not committed and journal.find(*over) is not None)

    def outcome(self, key: Key) -> Outcome | None:
        """How the switch of this attempt ended, once it has."""
        journal = self._journals.get(key)
        record = journal.find(Step.RUNNING, Step.THAWED) if journal else None
        return Outcome.from_json(record.data["outcome"]) if record else None

    def resume_session(self, key: Key) -> SourceSession | None:
        """After a restart: what the journal knows, attached to the pod again."""
        record = self._journals.open(key).find(Step.OPENED)
        if record is None:
            return None
        migration = Migration.from_json(record.data["migration"])
        peer = record.data.get("peer")
        target = PeerNode.from_json(peer) if peer else None
        return self._session(migration, Pod.from_json(record.data["pod"]), target, stale=True)

    def roll_back(self, session: SourceSession, why: GodwitError) -> None:
        """After a restart in the middle of a switch."""
        if session.peer is None:
            raise Unsafe(Reason.INTERNAL, f"{session.journal.key}: switched without a target")
        peer = self._peers(session.peer)
        try:
            Switcher(session, session.peer, peer).roll_back(why)
        finally:
            peer.close()

    def go_on(self, session: SourceSession) -> None:
        """In the background: run the target, then end the source."""
        if session.forwarding is None or not session.forwarding.is_alive():
            session.forwarding = threading.Thread(
                target=self._go_on, args=(session,), name="forward", daemon=True
            )
            session.forwarding.start()

    def _go_on(self, session: SourceSession) -> None:
        if session.peer is None:
            raise Unsafe(Reason.INTERNAL, f"{session.journal.key}: committed without a target")
        peer = self._peers(session.peer)
        try:
            ran = forward.run_until_told(session, peer, self.stopping)
            if ran is None:
                return
            record = session.journal.find(Step.COMMITTED)
            frozen_at = record.data["frozen_at_ns"] if record else ran.resumed_unix_ns
            sent = session.outlet.bytes_sent if session.outlet else 0
            outcome = forward.outcome_of(frozen_at, ran, sent, session.parts_us)
            forward.settle(session, outcome)
        finally:
            peer.close()

    def _still_forward(self, session: SourceSession, deadline: float) -> Outcome:
        self.go_on(session)
        if session.forwarding:
            session.forwarding.join(max(deadline - time.monotonic() - 1.0, 0.1))
        known = self.outcome(session.journal.key)
        if known is None and isinstance(session.trouble, Unsafe):
            raise session.trouble
        if known is None:
            message = "committed; the target does not answer, the source stays frozen"
            raise Retryable(Reason.AGENT_UNREACHABLE, message, delay_seconds=2.0)
        return known

    def _session(
        self, migration: Migration, pod: Pod, peer: PeerNode | None, *, stale: bool = False
    ) -> SourceSession:
        with self._lock:
            if not stale:
                refuse_stale(self._journals, migration.uid, migration.epoch)
            key = Key(migration.uid, migration.epoch, Role.SOURCE)
            session = self._sessions.get((migration.uid, migration.epoch))
            if session is None:
                journal = self._journals.open(key)
                opened = journal.find(Step.OPENED)
                if opened:
                    state = msgspec.convert(opened.data["state"], PodState)
                else:
                    state = self._host.pods.find(pod.uid)
                processes = Leaving(self._host, migration.uid, state, pod.ip, self._own_address)
                session = SourceSession(migration, pod, journal, processes)
                if opened and opened.data.get("peer"):
                    session.peer = PeerNode.from_json(opened.data["peer"])
                self._sessions[migration.uid, migration.epoch] = session
            if session.pod != pod:
                raise Rejected(Reason.MALFORMED, "this attempt is about another pod")
            if peer and session.peer and session.peer != peer:
                raise Rejected(Reason.MALFORMED, "this attempt has another target")
            if not session.journal.has(Step.OPENED) or (peer and not session.peer):
                session.peer = peer
                session.journal.append(
                    Step.OPENED,
                    {
                        "migration": migration.to_json(),
                        "pod": pod.to_json(),
                        "peer": peer.to_json() if peer else None,
                        "state": msgspec.to_builtins(session.processes.state),
                    },
                )
            return session

    def _drop(self, session: SourceSession) -> None:
        session.close_outlet()
        session.processes.close()
        with self._lock:
            self._sessions.pop((session.migration.uid, session.migration.epoch), None)


def _require_undecided(session: SourceSession) -> None:
    last = session.journal.find(Step.COMMITTED, Step.THAWED, Step.ABORTED, Step.PARKED)
    if last is not None:
        raise Rejected(Reason.WRONG_STEP, f"this attempt is over ({last.step})")


def _keys(session: SourceSession) -> dict[str, object]:
    return {"uid": session.migration.uid, "epoch": session.migration.epoch}
