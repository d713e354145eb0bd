"""The source sessions of this process, made from calls or from journals."""

from __future__ import annotations

import threading
from dataclasses import replace

import msgspec

from godwit_agent import heap
from godwit_agent.app.epochs import refuse_stale
from godwit_agent.app.journal import Journal, JournalStore, Key, Record, Role, Step
from godwit_agent.app.leaving import Leaving
from godwit_agent.app.model import Migration, PeerNode, Pod
from godwit_agent.app.sessions import SourceSession
from godwit_agent.hostops.model import PodState, Volume
from godwit_agent.hostops.ports import Host
from godwit_api.errors import Rejected
from godwit_api.reasons import Reason


class SourceSessions:
    """One session per (uid, epoch). The first line of a journal says what the session is about,
    with the pod as its runtime knew it: later the runtime may have forgotten it."""

    def __init__(self, host: Host, journals: JournalStore, own_address: str) -> None:
        self._host = host
        self._journals = journals
        self._own_address = own_address
        self._sessions: dict[Key, SourceSession] = {}
        self._lock = threading.Lock()

    def of_call(
        self,
        migration: Migration,
        pod: Pod,
        peer: PeerNode | None,
        volumes: tuple[Volume, ...] | None = None,
    ) -> SourceSession:
        """Refuses stale epochs, and calls that name another pod or target than those before.
        ``volumes``: of the node's directories; known from the first call on that names them."""
        with self._lock:
            refuse_stale(self._journals, migration.uid, migration.epoch)
            key = Key(migration.uid, migration.epoch, Role.SOURCE)
            session = self._sessions.get(key) or self._from_journal(key)
            if session is None:
                processes = self._leaving(migration, pod, volumes or ())
                session = SourceSession(migration, pod, self._journals.open(key), processes)
                self._sessions[key] = session
                _write_opened(session, peer)
            if session.pod != pod:
                raise Rejected(Reason.MALFORMED, "this attempt is about another pod")
            if volumes is not None and session.processes.state.volumes != volumes:
                raise Rejected(Reason.MALFORMED, "this attempt has other volumes")
            if peer and session.peer and session.peer != peer:
                raise Rejected(Reason.MALFORMED, "this attempt has another target")
            if peer and not session.peer:
                _write_opened(session, peer)
            return session

    def of_journal(self, key: Key) -> SourceSession | None:
        """After a restart; None for a journal that says nothing."""
        with self._lock:
            return self._sessions.get(key) or self._from_journal(key)

    def drop(self, session: SourceSession) -> None:
        """Nothing of it is needed in memory any more."""
        session.close_outlet()
        session.processes.close()
        with self._lock:
            self._sessions.pop(session.journal.key, None)
        heap.give_back()

    def close(self) -> None:
        """Ends streams and trackers of all sessions."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.close_outlet()
            session.processes.close()

    def end_all(self, uid: str) -> None:
        """A migration is over: so are the attempts that were parked before, and its store."""
        for key in self._journals.attempts(uid):
            journal = self._journals.open(key)
            if key.role is Role.SOURCE and not journal.terminal:
                journal.append(Step.ABORTED)
        if uid not in self._journals.live():  # else this node is its target, too
            self._host.stores.destroy(uid)

    def _from_journal(self, key: Key) -> SourceSession | None:
        journal = self._journals.get(key)
        record = journal.find(Step.OPENED) if journal else None
        if journal is None or record is None:
            return None
        migration = Migration.from_json(record.data["migration"])
        pod = Pod.from_json(record.data["pod"])
        volumes = msgspec.convert(record.data["state"], PodState).volumes
        session = SourceSession(migration, pod, journal, self._leaving(migration, pod, volumes))
        peer = record.data["peer"]
        session.peer = PeerNode.from_json(peer) if peer else None
        self._sessions[key] = session
        return session

    def _leaving(self, migration: Migration, pod: Pod, volumes: tuple[Volume, ...]) -> Leaving:
        state = self._known_state(migration.uid, pod) or self._host.pods.find(pod.uid)
        state = replace(state, volumes=volumes)
        return Leaving(self._host, migration.uid, state, pod.ips, self._own_address)

    def _known_state(self, uid: str, pod: Pod) -> PodState | None:
        for key in reversed(self._journals.attempts(uid)):
            record = _opened(self._journals.open(key)) if key.role is Role.SOURCE else None
            if record and record.data["pod"]["uid"] == pod.uid:
                return msgspec.convert(record.data["state"], PodState)
        return None


def _opened(journal: Journal) -> Record | None:
    return journal.find(Step.OPENED)


def _write_opened(session: SourceSession, peer: PeerNode | None) -> None:
    session.peer = peer
    data = {
        "migration": session.migration.to_json(),
        "pod": session.pod.to_json(),
        "peer": peer.to_json() if peer else None,
        "state": msgspec.to_builtins(session.processes.state),
    }
    session.journal.append(Step.OPENED, data)
