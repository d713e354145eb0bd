"""Source side of a migration: what the operator asks of the node that the pod leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from godwit_agent import log
from godwit_agent.app import forward
from godwit_agent.app.copying import Copier
from godwit_agent.app.epochs import refuse_stale
from godwit_agent.app.guarding import Guards
from godwit_agent.app.journal import Journal, JournalStore, Key, Role, Step
from godwit_agent.app.model import CopyPolicy, CopyProgress, Migration, Outcome, PeerNode, Pod
from godwit_agent.app.peers import Decision, PeerFactory
from godwit_agent.app.sessions import SourceSession
from godwit_agent.app.source_sessions import SourceSessions
from godwit_agent.app.switching import Switcher
from godwit_agent.app.turns import Turns
from godwit_agent.hostops.model import Extent, Inspection, Obstacle, Piece, PodState, Volume
from godwit_agent.hostops.ports import Host
from godwit_agent.memory import rounds
from godwit_agent.memory.freezes import Freezes
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
        freezes: Freezes,
        peers: PeerFactory,
        own_address: str,
        default_freeze_timeout_ms: int,
        freezes_at_once: int,
    ) -> None:
        self._host = host
        self._journals = journals
        self._guards = guards
        self._copier = copier
        self._freezes = freezes
        self._peers = peers
        self._default_timeout_ms = default_freeze_timeout_ms
        self._turns = Turns(freezes_at_once)
        self._sessions = SourceSessions(host, journals, own_address)
        self.stopping = threading.Event()

    @property
    def sessions(self) -> SourceSessions:
        """Checkpoints share them: the same pod cannot be both."""
        return self._sessions

    def stop(self) -> None:
        """Ends streams and trackers; what is frozen, guarded or committed stays so."""
        self.stopping.set()
        self._sessions.close()

    def check(self, migration: Migration, pod: Pod, volumes: tuple[Volume, ...] = ()) -> Inspection:
        """All obstacles at once; touches nothing."""
        refuse_stale(self._journals, migration.uid, migration.epoch)
        try:
            state = self._host.pods.find(pod.uid)
        except Rejected as error:
            return Inspection((Obstacle(error.reason, error.message),), ())
        state = replace(state, volumes=volumes)
        found = self._host.inspector.inspect(state)
        if faults := self._host.volumes.leaving(volumes):
            found = replace(found, obstacles=(*found.obstacles, *faults))
        here = {one.partition("/")[0] for one in state.link.addresses} if state.link else set()
        missing = [ip for ip in pod.ips if ip not in here]
        if missing:
            message = f"pod {pod.name} does not have the address {' and '.join(missing)} here"
            strange = Obstacle(Reason.NETWORK_NOT_ROUTED, message)
            return Inspection((*found.obstacles, strange), found.containers)
        return found

    def copy(
        self,
        migration: Migration,
        pod: Pod,
        target: PeerNode,
        policy: CopyPolicy,
        *,
        deadline: float,
        active: Callable[[], bool],
        volumes: tuple[Volume, ...] = (),
    ) -> Iterator[CopyProgress]:
        """Copies until what is left is small; the pod runs and is not touched."""
        session = self._sessions.of_call(migration, pod, target, volumes)
        with session.busy("Copy", deadline):
            _require_undecided(session)
            session.journal.append(Step.COPYING)
            yield from self._copier.run(session, policy, deadline=deadline, active=active)
            session.journal.append(Step.COPIED)
            log.info("copied", **session.migration.keys, bandwidth=session.bandwidth)

    def guard(self, migration: Migration, pod: Pod) -> None:
        """From now on nobody but us ends these processes."""
        session = self._sessions.of_call(migration, pod, None)
        with session.busy("Guard"):
            _require_undecided(session)
            _require_same(session, self._host.pods.find(pod.uid))
            if not session.journal.has(Step.GUARDING):
                session.journal.append(Step.GUARDING)
            self._guards.guard(session)
            if not session.journal.has(Step.GUARDED):
                session.journal.append(Step.GUARDED)
                log.info("guarded", **session.migration.keys, pod=pod.name)

    def switch(
        self,
        migration: Migration,
        pod: Pod,
        target: PeerNode,
        *,
        budget_ms: int,
        timeout_ms: int,
        deadline: float,
        post_copy: bool = False,
    ) -> Outcome:
        """Moves the processes. A repeated call waits for the first one and answers the same.

        ``post_copy``: pages that the freeze has no time for stay here until the target has
        fetched them; the frozen processes end then.
        """
        session = self._sessions.of_call(migration, pod, target)
        with session.busy("Switch", deadline - 1.0):
            known = self.outcome(session.journal.key)
            if known is not None:
                return known
            if session.journal.has(Step.COMMITTED):
                return self._still_forward(session, deadline)
            if session.undecidable:
                message = "a commit record could not be written nor taken back; see the log"
                raise Unsafe(Reason.INTERNAL, message)
            _require_undecided(session)
            if session.journal.has(Step.SWITCHING):
                switcher = Switcher(session, target, self._peers(target))
                return switcher.roll_back(Aborted(Reason.INTERNAL, "an earlier rollback failed"))
            if not session.journal.has(Step.GUARDED):
                raise Rejected(Reason.WRONG_STEP, "the source is not guarded")
            with self._turns.turn(deadline - 1.0):
                allowance = self._allowance(session, budget_ms, post_copy=post_copy)
                self._copier.once_more(session, allowance)
                base_ms = self._base_ms(session)
                allowance = self._allowance(session, budget_ms, post_copy=post_copy)
                left = session.left_bytes
                if allowance is not None:
                    left = min(left, session.bound_bytes + allowance)
                predicted = rounds.predicted_freeze_ms(left, session.bandwidth, base_ms)
                if budget_ms and predicted > budget_ms:
                    message = f"predicted freeze {predicted} ms, budget {budget_ms} ms"
                    if session.fixed_ms:
                        message += f"; shared or compared memory takes {session.fixed_ms} ms of it"
                    return Outcome(False, Reason.FREEZE_BUDGET_EXCEEDED, message)
                timeout_s = (timeout_ms or self._default_timeout_ms) / 1000
                peer = self._peers(target)
                catch_up = None if post_copy else self._copier.catch_up
                switcher = Switcher(session, target, peer, allowance=allowance, catch_up=catch_up)
                outcome = switcher.switch(timeout_s)
                if outcome and outcome.committed and not post_copy:  # its dump is another one
                    took_ms = max(outcome.freeze_us / 1000 - session.fixed_ms, 0)
                    left, bandwidth = session.left_bytes, session.bandwidth
                    self._freezes.learn(session.count, took_ms, left, bandwidth)
            return outcome or self._still_forward(session, deadline)

    def finish(self, migration: Migration, pod: Pod, *, lost: bool = False) -> None:
        """After the commit: kills what is left, lifts the guard. The kubelet does the rest.
        ``lost``: the copy that needed pages from here is gone, and has been given up."""
        key = Key(migration.uid, migration.epoch, Role.SOURCE)
        journal = self._journals.get(key)
        if journal is None or journal.last is Step.FINISHED:
            return
        session = self._sessions.of_call(migration, pod, None)
        with session.busy("FinishSource"):
            if not session.journal.has(Step.RUNNING):
                message = "the target has not said that its copy runs"
                raise Retryable(Reason.WRONG_STEP, message, delay_seconds=2.0)
            if session.needed and not lost:
                message = "the target has not fetched all pages yet"
                raise Retryable(Reason.IN_PROGRESS, message, delay_seconds=1.0)
            session.processes.hold_address()
            session.processes.kill(held=session.held)
            session.processes.discard()
            self._guards.lift(session.processes, back=False)
            session.processes.clean()
            session.journal.append(Step.FINISHED)
            self._sessions.end_all(migration.uid)
            self._sessions.drop(session)
            log.info("source finished", **session.migration.keys)

    def abort(self, migration: Migration, pod: Pod, *, lift_guard: bool) -> None:
        """Gives this attempt up, before the commit only."""
        refuse_stale(self._journals, migration.uid, migration.epoch)
        key = Key(migration.uid, migration.epoch, Role.SOURCE)
        journal = self._journals.get(key)
        attempts = [k for k in self._journals.attempts(migration.uid) if k.role is Role.SOURCE]
        if not attempts or (not lift_guard and (journal is None or journal.terminal)):
            return
        session = self._sessions.of_call(migration, pod, None)
        if session.journal.has(Step.COMMITTED):
            raise Rejected(Reason.WRONG_STEP, "this migration has committed")
        session.cancelled.set()
        if session.outlet:
            session.outlet.abort()
        with session.busy("AbortSource", time.monotonic() + 20):
            if session.journal.has(Step.COMMITTED):
                raise Rejected(Reason.WRONG_STEP, "this migration has committed")
            session.close_outlet()
            session.processes.clean()
            if lift_guard:
                self._guards.lift(session.processes, back=True)
                self._sessions.end_all(migration.uid)
            elif session.journal.last is not Step.PARKED:
                session.journal.append(Step.PARKED)
            self._sessions.drop(session)
            log.info("source aborted", **session.migration.keys, guard_lifted=lift_guard)

    def decision(self, migration: Migration, node: str) -> Decision:
        """For a target that holds a stopped copy and has heard nothing."""
        journal = self._journal_for(migration, node)
        committed = journal.has(Step.COMMITTED)
        over = (Step.THAWED, Step.PARKED, Step.ABORTED)
        return Decision(committed, not committed and journal.find(*over) is not None)

    def pages(self, migration: Migration, node: str, piece: Piece) -> Sequence[Extent]:
        """For a target that is, or may soon be, running without all of them."""
        journal = self._journal_for(migration, node)
        over = journal.find(Step.THAWED, Step.PARKED, Step.ABORTED, Step.ARRIVED, Step.FINISHED)
        if over is not None or not journal.has(Step.SWITCHING):
            what = f"is over ({over.step})" if over else "has not begun"
            raise Rejected(Reason.WRONG_STEP, f"the switch of this attempt {what}")
        session = self.resume_session(journal.key)
        if session is None:
            raise Rejected(Reason.WRONG_STEP, "the journal of this attempt says nothing")
        return session.processes.read(piece)

    def arrived(self, migration: Migration, node: str) -> None:
        """The target needs this side no more: what stands frozen here may end."""
        journal = self._journal_for(migration, node)
        if not journal.has(Step.COMMITTED):
            raise Rejected(Reason.WRONG_STEP, "this attempt has not committed")
        session = self.resume_session(journal.key)
        if session is None or journal.terminal:
            return
        with session.busy("Arrived"):
            if not journal.has(Step.ARRIVED):
                journal.append(Step.ARRIVED)
                log.info("every page has arrived", **session.migration.keys)
            if journal.has(Step.RUNNING):
                forward.end(session)

    def _journal_for(self, migration: Migration, node: str) -> Journal:
        """Only the node that this migration names as its target may ask."""
        journal = self._journals.get(Key(migration.uid, migration.epoch, Role.SOURCE))
        if journal is None:
            raise Rejected(Reason.UNKNOWN_MIGRATION, f"migration {migration.uid} is not known here")
        peer = journal.find(Step.OPENED)
        if peer is None or (peer.data.get("peer") or {}).get("name") != node:
            raise Rejected(Reason.WRONG_PEER, f"{node} is not the target of this migration")
        return journal

    def outcome(self, key: Key) -> Outcome | None:
        """How the switch of this attempt ended, once it has."""
        journal = self._journals.get(key)
        record = journal.find(Step.RUNNING, Step.THAWED) if journal else None
        return Outcome.from_json(record.data["outcome"]) if record else None

    def resume_session(self, key: Key) -> SourceSession | None:
        """After a restart: what the journal knows, attached to the pod again."""
        return self._sessions.of_journal(key)

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
            outcome = forward.outcome_of(
                ran,
                sent,
                session.parts_us,
                frozen_at_ns=frozen_at,
                missing_bytes=session.missing_bytes,
            )
            forward.settle(session, outcome)
        finally:
            peer.close()

    def _base_ms(self, session: SourceSession) -> int:
        """What a freeze takes however little is sent, by the last round."""
        return self._freezes.base_ms(session.count) + session.fixed_ms

    def _allowance(self, session: SourceSession, budget_ms: int, *, post_copy: bool) -> int | None:
        """By the last round, too; None: no post-copy, everything is sent."""
        if not post_copy:
            return None
        base_ms, bound = self._base_ms(session), session.bound_bytes
        return rounds.allowance(session.bandwidth, budget_ms, base_ms, bound)

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


def _require_undecided(session: SourceSession) -> None:
    last = session.journal.find(Step.COMMITTED, Step.THAWED, Step.ABORTED, Step.PARKED)
    if last is not None:
        raise Rejected(Reason.WRONG_STEP, f"this attempt is over ({last.step})")


def _require_same(session: SourceSession, now: PodState) -> None:
    """A container that was restarted since the copy began is not what was copied."""
    before = {container.id for container in session.processes.state.containers}
    if before != {container.id for container in now.containers}:
        raise Aborted(Reason.SOURCE_EXITED, "a container of the pod was restarted meanwhile")
