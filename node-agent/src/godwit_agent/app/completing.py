"""A copy that runs while pages of it are still on its source: until every page has come, or never
will."""

from __future__ import annotations

import threading

from godwit_agent import log
from godwit_agent.app.asking import Telling
from godwit_agent.app.fetching import Fetching
from godwit_agent.app.journal import Step
from godwit_agent.app.peers import PeerFactory
from godwit_agent.app.sessions import TargetSession
from godwit_agent.hostops.ports import Serving
from godwit_api.errors import GodwitError, Rejected
from godwit_api.reasons import Reason


def incomplete(session: TargetSession) -> bool:
    """Whether a copy runs that depends on its source. By the journal: a node that was restarted
    has lost the copy, and all that it knew of what is missing."""
    resumed = session.journal.find(Step.RESUMED)
    depends = resumed is not None and bool(resumed.data.get("incomplete"))
    return depends and not session.journal.find(Step.ARRIVED, Step.LOST)


class Completing:
    """One object for all copies on this node."""

    def __init__(self, peers: PeerFactory, stopping: threading.Event) -> None:
        self._peers = peers
        self._stopping = stopping

    def start(self, session: TargetSession) -> None:
        """Pages are fetched from now on, if any is missing."""
        missing = session.pod.missing()
        if missing is None or session.fetching or session.journal.find(Step.ARRIVED, Step.LOST):
            return
        session.fetching = Fetching(
            session.migration,
            session.source,
            missing,
            self._peers,
            arrived=lambda: self._all_here(session),
            lost=lambda error: self.lose(session, error),
        )
        session.fetching.start()

    @staticmethod
    def stop(session: TargetSession) -> None:
        """Returns when no page is fetched any more."""
        fetching, session.fetching = session.fetching, None
        if fetching:
            fetching.stop()

    def without_source(self, session: TargetSession) -> None:
        """No page comes any more: all of them are here, or the copy is lost."""
        self.stop(session)
        if not incomplete(session):
            return  # the last one has come meanwhile
        missing = session.pod.missing()
        if missing and not missing.bytes and missing.serving() is not Serving.BROKEN:
            self._all_here(session)
        else:
            self.lose(session, Rejected(Reason.NODE_LOST, "the source's node is gone"))

    def lose(self, session: TargetSession, error: GodwitError) -> None:
        """It must not run on: what it has not got would be waited for, or read as zero."""
        session.pod.kill()
        if not session.journal.has(Step.LOST):
            why = "the pod's process is lost with memory that was still on its source"
            by_node = error.reason is Reason.NODE_LOST
            reason = Reason.NODE_LOST if by_node else Reason.PAGES_LOST
            message = f"{why}: {error.message}"
            session.journal.append(Step.LOST, {"reason": reason, "message": message})
            log.error("the running copy was killed", **session.migration.keys, error=error)
        self.tell(session)

    def tell(self, session: TargetSession) -> None:
        """In the background, until the source has heard it: it ends what stands frozen there."""
        Telling(session, self._peers, self._stopping).start()

    def _all_here(self, session: TargetSession) -> None:
        session.journal.append(Step.ARRIVED)
        log.info("every page has arrived", **session.migration.keys)
        missing = session.pod.missing()
        if missing:
            missing.let_go()
        self.tell(session)
