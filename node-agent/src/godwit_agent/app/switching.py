"""Around the freeze: what is prepared before it, and what becomes of it after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

from godwit_agent import log
from godwit_agent.app import forward
from godwit_agent.app.journal import Step
from godwit_agent.app.model import Outcome, PeerNode
from godwit_agent.app.outlet import Outlet
from godwit_agent.app.peers import Peer
from godwit_agent.app.rollback import roll_back
from godwit_agent.app.sessions import SourceSession
from godwit_agent.app.switch import Freeze, Watchdog, aborted
from godwit_api.errors import Aborted, GodwitError, Retryable, Unsafe
from godwit_api.reasons import Reason

_WARM_TIMEOUT_S = 5.0
_ARM_TIMEOUT_S = 20.0
_ABORT_TIMEOUT_S = 3.0


class Switcher:
    """One switch of one session. ``catch_up`` is called when all else is prepared: it sends what
    has been written meanwhile."""

    def __init__(
        self,
        session: SourceSession,
        target: PeerNode,
        peer: Peer,
        *,
        allowance: int | None = None,
        catch_up: Callable[[SourceSession], None] | None = None,
    ) -> None:
        self._allowance = allowance
        self._catch_up = catch_up
        self._session = session
        self._target = target
        self._peer = peer
        self._keys = session.migration.keys

    def switch(self, timeout_s: float) -> Outcome | None:
        """How it ended; None when it has committed and the target has not answered yet.

        Raises, untouched, what kept it from beginning; ``Unsafe`` when the
        journal cannot say what was decided, or when the source cannot be thawed.
        """
        session = self._session
        try:
            outlet = self._prepare()
            with ThreadPoolExecutor(1, thread_name_prefix="freeze") as workers:
                freeze = Freeze(
                    session.migration,
                    session.journal,
                    session.processes,
                    outlet,
                    self._peer,
                    self._target,
                    workers,
                    self._allowance,
                )
                workers.submit(int).result()  # its thread exists before the freeze
                return self._freeze(freeze, timeout_s)
        finally:
            self._peer.close()

    def _prepare(self) -> Outlet:
        session = self._session
        outlet = session.outlet
        if outlet is None:
            raise Retryable(Reason.TRANSFER_FAILED, "the transfer stream is gone")
        try:
            self._peer.warm(_WARM_TIMEOUT_S)
            outlet.sync()
            self._peer.arm(session.migration, _ARM_TIMEOUT_S)
            session.processes.prepare(post_copy=self._allowance is not None)
            if self._catch_up:
                self._catch_up(session)
        except (GodwitError, OSError):
            session.processes.discard()
            raise
        return outlet

    def _freeze(self, freeze: Freeze, timeout_s: float) -> Outcome | None:
        log.info("freeze", **self._keys, target=self._target.name)
        try:
            with Watchdog(timeout_s, freeze.outlet.abort) as watchdog:
                freeze.until_commit(watchdog)
        except Exception as error:
            decision = aborted(error, timed_out=watchdog.fired)
            if isinstance(decision, Unsafe):
                self._session.undecidable = True
                log.error("switch: nobody knows whether it has committed", **self._keys)
                raise decision from error
            if not isinstance(error, GodwitError):
                log.exception("switch failed", **self._keys)
            sent, parts = freeze.outlet.bytes_sent, freeze.watch.parts_us
            return self.roll_back(decision, freeze.lasted_us, sent, parts)
        self._session.parts_us = freeze.watch.parts_us
        try:
            ran = freeze.after_commit()
        except (GodwitError, OSError) as error:
            log.warning("committed; the target is asked again", **self._keys, error=error)
            return None
        sent, parts = freeze.outlet.bytes_sent, freeze.watch.parts_us
        outcome = forward.outcome_of(
            ran,
            sent,
            parts,
            frozen_at_ns=freeze.frozen_at_ns,
            waited_us=freeze.waited_us,
            missing_bytes=freeze.missing_bytes,
        )
        forward.settle(self._session, outcome)
        log.info("switched", **self._keys, freeze_us=outcome.freeze_us, **outcome.timings_us)
        return outcome

    def roll_back(
        self,
        why: GodwitError,
        lasted_us: Callable[[], int] = int,
        sent: int = 0,
        parts_us: Mapping[str, int] = MappingProxyType({}),
    ) -> Outcome:
        """The source runs again, and the journal says why; the target is told."""
        session = self._session
        assert not session.journal.has(Step.COMMITTED)
        roll_back(session.migration, session.processes)
        try:
            session.processes.require_processes()
        except Aborted as ended:
            # whatever failed has failed for this, or does not matter any more
            why = Aborted(ended.reason, f"{ended.message} ({why.message})")
        outcome = Outcome(
            committed=False,
            reason=why.reason,
            message=why.message,
            freeze_us=lasted_us(),
            transferred_bytes=sent,
            timings_us=parts_us,
        )
        session.journal.append(Step.THAWED, {"outcome": outcome.to_json()})
        log.warning("switch rolled back", **self._keys, reason=why.reason, message=why.message)
        session.close_outlet()
        self._tell_target()
        return outcome

    def _tell_target(self) -> None:
        """Not for long: a target that does not hear it asks, and hears that we have aborted."""
        try:
            self._peer.abort_restore(self._session.migration, _ABORT_TIMEOUT_S)
        except GodwitError as error:
            log.warning("target was not told of the rollback", **self._keys, error=error)
