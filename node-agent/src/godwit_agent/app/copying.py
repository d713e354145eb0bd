"""Rounds of pages and files into the target's store while the pod runs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from godwit_agent import log
from godwit_agent.app.model import CopyProgress
from godwit_agent.app.outlet import Outlet
from godwit_agent.app.sessions import SourceSession
from godwit_agent.hostops.model import RoundStats
from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable
from godwit_api.reasons import Reason

MAX_ROUNDS = 12
# What a freeze costs without a single byte: CRIU's dump and restore of a container (facts.md).
FIXED_FREEZE_MS = 150
_SMALL_BYTES = 8 << 20
_SHRINKS = 0.9
_TICK_S = 1.0

Connect = Callable[[SourceSession], Outlet]


def predicted_freeze_ms(dirty_bytes: int, bandwidth: int) -> int:
    """The bytes left over, at the bandwidth seen so far, and what is paid anyway."""
    return FIXED_FREEZE_MS + round(dirty_bytes * 1000 / bandwidth if bandwidth else 0)


class Copier:
    """Copies one session until it has converged; ``connect`` opens its stream."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    def run(
        self,
        session: SourceSession,
        *,
        budget_ms: int,
        limit: int,
        deadline: float,
        active: Callable[[], bool],
    ) -> Iterator[CopyProgress]:
        """Progress about once a second; the last one has ``converged``.

        Raises what ended the copy: nothing of the pod has been touched then.
        """
        session.cancelled.clear()
        reports: queue.Queue[CopyProgress | BaseException] = queue.Queue()
        work = threading.Thread(
            target=self._work,
            args=(session, budget_ms, limit, reports.put),
            name=f"copy-{session.migration.uid[:8]}",
            daemon=True,
        )
        work.start()
        latest: CopyProgress | None = None
        try:
            while latest is None or not latest.converged:
                try:
                    report = reports.get(timeout=_TICK_S)
                except queue.Empty:
                    report = _ticking(session, latest)
                if isinstance(report, BaseException):
                    raise report
                latest = report
                yield latest
                if time.monotonic() > deadline or not active():
                    raise Retryable(Reason.TIMED_OUT, "nobody waits for the copy any more")
        finally:
            session.cancelled.set()
            if work.is_alive() and not (latest and latest.converged) and session.outlet:
                session.outlet.abort()
            work.join()
            session.cancelled.clear()

    def once_more(self, session: SourceSession) -> None:
        """Before a freeze: what changed since the copy ended; everything when it was lost."""
        if session.outlet is None or not session.outlet.usable or not session.copied:
            log.info("copy starts over", uid=session.migration.uid, epoch=session.migration.epoch)
            self._rounds(session, 0, 0, lambda _: None)
            return
        for _ in range(3):
            if self._round(session, session.outlet).dirty_bytes <= _SMALL_BYTES:
                break

    def _work(
        self,
        session: SourceSession,
        budget_ms: int,
        limit: int,
        report: Callable[[CopyProgress | BaseException], None],
    ) -> None:
        try:
            self._rounds(session, budget_ms, limit, report)
        except BaseException as error:
            session.close_outlet()
            if not isinstance(error, GodwitError):
                log.exception("copy failed", uid=session.migration.uid)
                error = Retryable(Reason.COPY_FAILED, f"{type(error).__name__}: {error}")
            report(error)

    def _rounds(
        self,
        session: SourceSession,
        budget_ms: int,
        limit: int,
        report: Callable[[CopyProgress], None],
    ) -> None:
        session.close_outlet()
        session.processes.start_over()
        outlet = session.outlet = self._connect(session)
        outlet.limit(limit)
        before: RoundStats | None = None
        for number in range(1, MAX_ROUNDS + 1):
            start = time.monotonic()
            this = self._round(session, outlet)
            progress = _progress(session, number, this, time.monotonic() - start)
            if _enough(number, before, this, progress, budget_ms):
                break
            report(progress)
            before = this
        if budget_ms and progress.predicted_freeze_ms > budget_ms:
            message = (
                f"after {number} rounds the freeze is predicted to last "
                f"{progress.predicted_freeze_ms} ms, the budget is {budget_ms} ms"
            )
            raise Aborted(Reason.FREEZE_BUDGET_EXCEEDED, message)
        outlet.limit(0)
        session.copied = True
        report(replace(progress, converged=True))

    def _round(self, session: SourceSession, outlet: Outlet) -> RoundStats:
        if session.cancelled.is_set():
            raise Rejected(Reason.CANCELLED, "the copy was cancelled")
        start, sent = time.monotonic(), outlet.bytes_sent
        result = session.processes.copy_round(outlet, session.cancelled)
        outlet.sync()
        seconds, count = time.monotonic() - start, outlet.bytes_sent - sent
        if count > _SMALL_BYTES or not session.bandwidth:
            session.bandwidth = max(round(count / max(seconds, 1e-6)), 1)
        session.dirty_bytes = result.dirty_bytes
        return result


def _enough(
    number: int, before: RoundStats | None, this: RoundStats, progress: CopyProgress, budget_ms: int
) -> bool:
    if number == MAX_ROUNDS:
        return True
    if number > 1 and this.dirty_bytes <= _SMALL_BYTES:
        return True
    shrinking = before is None or this.dirty_bytes < before.dirty_bytes * _SHRINKS
    within = not budget_ms or progress.predicted_freeze_ms <= budget_ms
    return number > 2 and not shrinking and (within or number > MAX_ROUNDS // 2)


def _progress(
    session: SourceSession, number: int, this: RoundStats, seconds: float
) -> CopyProgress:
    # the first round sends everything, so it tells nothing about what is being written
    left = this.dirty_bytes if number > 1 else 0
    return CopyProgress(
        round=number,
        transferred_bytes=session.outlet.bytes_sent if session.outlet else 0,
        remaining_bytes=left,
        dirty_bytes_per_s=round(left / max(seconds, 1e-3)),
        bandwidth_bytes_per_s=session.bandwidth,
        predicted_freeze_ms=predicted_freeze_ms(left, session.bandwidth),
        converged=False,
    )


def _ticking(session: SourceSession, latest: CopyProgress | None) -> CopyProgress:
    sent = session.outlet.bytes_sent if session.outlet else 0
    if latest is None:
        return CopyProgress(1, sent, 0, 0, 0, 0, converged=False)
    return replace(latest, transferred_bytes=sent)
