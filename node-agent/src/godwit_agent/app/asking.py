"""A target that holds a stopped copy and hears nothing asks the source what it has decided; one
that has fetched every page of a post-copy tells it so."""

from __future__ import annotations

import threading
from collections.abc import Callable

from godwit_agent import log
from godwit_agent.app.journal import Step
from godwit_agent.app.peers import PeerFactory
from godwit_agent.app.sessions import TargetSession
from godwit_api.errors import Retryable
from godwit_api.reasons import Reason

_EVERY_S = 1.0
_TIMEOUT_S = 3.0
_OVER = (Step.FENCED, Step.RESUMED, Step.REFUSED, Step.ABORTED, Step.FINISHED)


class Asking:
    """One thread per copy. It ends with the source's word, whichever way that comes."""

    def __init__(
        self,
        session: TargetSession,
        peers: PeerFactory,
        stopping: threading.Event,
        *,
        run: Callable[[], object],
        refuse: Callable[[], object],
    ) -> None:
        self._session = session
        self._peers = peers
        self._stopping = stopping
        self._run = run
        self._refuse = refuse
        self._warned = False

    def start(self, silence_s: float) -> None:
        """Asks after ``silence_s``, in the background."""
        threading.Thread(
            target=self._loop, args=(silence_s,), name="ask-source", daemon=True
        ).start()

    def _loop(self, silence_s: float) -> None:
        self._stopping.wait(silence_s)
        peer = self._peers(self._session.source)
        try:
            while not self._stopping.is_set() and not self._session.journal.find(*_OVER):
                try:
                    decision = peer.committed(self._session.migration, _TIMEOUT_S)
                    if decision.committed:
                        self._run()
                    elif decision.aborted:
                        self._refuse()
                except Exception as error:
                    self._warn(error)
                self._stopping.wait(_EVERY_S)
        finally:
            peer.close()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            keys = self._session.migration.keys
            log.warning("the source's decision cannot be followed yet", **keys, error=error)
            self._warned = True


class Telling:
    """One thread that tells the source that its frozen processes are needed no more."""

    def __init__(
        self, session: TargetSession, peers: PeerFactory, stopping: threading.Event
    ) -> None:
        self._session = session
        self._peers = peers
        self._stopping = stopping

    def start(self) -> None:
        threading.Thread(target=self._loop, name="tell-source", daemon=True).start()

    def _loop(self) -> None:
        peer = self._peers(self._session.source)
        migration, warned = self._session.migration, False
        try:
            while not self._stopping.is_set() and not self._session.journal.terminal:
                try:
                    peer.arrived(migration, _TIMEOUT_S)
                    return
                except Exception as error:
                    if not warned:
                        log.warning("the source does not hear yet", **migration.keys, error=error)
                    warned = True
                self._stopping.wait(_EVERY_S)
        finally:
            peer.close()


def require_not_committed(session: TargetSession, peers: PeerFactory) -> None:
    """A stopped copy is only thrown away when its source has said that it runs."""
    peer = peers(session.source)
    try:
        decision = peer.committed(session.migration, _TIMEOUT_S)
    finally:
        peer.close()
    if not decision.aborted:
        message = "this node holds a copy, and the source has not said that the pod runs there"
        raise Retryable(Reason.IN_PROGRESS, message, delay_seconds=2.0)
