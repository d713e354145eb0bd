"""Rounds of pages and files into the target's store while the pod runs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from godwit_agent import log
from godwit_agent.app.model import CopyPolicy, CopyProgress
from godwit_agent.app.outlet import Outlet
from godwit_agent.app.sessions import SourceSession
from godwit_agent.memory import rounds
from godwit_agent.memory.freezes import Freezes
from godwit_agent.memory.rounds import Decision, Round, Verdict
from godwit_api.errors import Aborted, GodwitError, Rejected, Retryable
from godwit_api.reasons import Reason

_TICK_S = 1.0
# The first one sends what the preparation took; each further one what the one before it took.
_CATCH_UP_ROUNDS = 3
_GOES_ON = (Verdict.AGAIN, Verdict.THROTTLE)

Connect = Callable[[SourceSession], Outlet]


class Copier:
    """Copies one session until it has converged; ``connect`` opens its stream."""

    def __init__(self, connect: Connect, freezes: Freezes | None = None) -> None:
        self._connect = connect
        self._freezes = freezes or Freezes()

    def run(
        self,
        session: SourceSession,
        policy: CopyPolicy,
        *,
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
            args=(session, policy, reports.put),
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

    def once_more(self, session: SourceSession, allowance: int | None = None) -> None:
        """Before a freeze: what changed since the copy ended; everything when it was lost.
        ``allowance``: of a post-copy; when a round leaves more pages than that, another one helps
        nobody but those who write shared memory or files: all of that travels in the freeze."""
        if session.outlet is None or not session.outlet.usable or not session.copied:
            log.info("copy starts over", uid=session.migration.uid, epoch=session.migration.epoch)
            policy = CopyPolicy(post_copy=allowance is not None)
            self._rounds(session, policy, lambda _: None)
            return
        for _ in range(3):
            pages = session.left_bytes - session.bound_bytes
            few = session.bound_bytes <= rounds.SMALL_BYTES
            if allowance is not None and pages > allowance and few:
                break
            self._round(session, session.outlet)
            if session.left_bytes <= rounds.SMALL_BYTES:
                break

    def catch_up(self, session: SourceSession) -> None:
        """Between preparing a freeze, which takes its time, and the freeze: pages written since."""
        for _ in range(_CATCH_UP_ROUNDS):
            since_s = time.monotonic() - session.looked_at
            worth = rounds.worth_another(session.dirty_rate, since_s, session.bandwidth)
            if not worth or session.outlet is None:
                break
            self._round(session, session.outlet, files=False)

    def _work(
        self,
        session: SourceSession,
        policy: CopyPolicy,
        report: Callable[[CopyProgress | BaseException], None],
    ) -> None:
        try:
            session.compress = policy.compress
            self._rounds(session, policy, report)
        except BaseException as error:
            session.close_outlet()
            if not isinstance(error, GodwitError):
                log.exception("copy failed", uid=session.migration.uid)
                error = Retryable(Reason.COPY_FAILED, f"{type(error).__name__}: {error}")
            report(error)

    def _rounds(
        self,
        session: SourceSession,
        policy: CopyPolicy,
        report: Callable[[CopyProgress], None],
    ) -> None:
        session.close_outlet()
        session.processes.start_over()
        outlet = session.outlet = self._connect(session)
        outlet.limit(policy.limit)
        budget_ms, number, share = policy.budget_ms, 0, 1.0
        done: list[Round] = []  # since the pod was slowed down last
        steps = list(rounds.THROTTLE_STEPS) if policy.throttle else []
        base_ms = self._freezes.base_ms(session.count)
        decision = rounds.decide(done, budget_ms=budget_ms, base_ms=base_ms)
        progress = _progress(session, number, done, decision, share)
        while decision.verdict in _GOES_ON:
            if decision.verdict is Verdict.THROTTLE:
                share, done = steps.pop(0), done[-1:]
                session.processes.throttle(share)
                log.info("source slowed down", uid=session.migration.uid, share=share)
            done.append(self._round(session, outlet))
            number += 1
            base_ms = self._freezes.base_ms(session.count)
            decision = rounds.decide(
                done,
                budget_ms=budget_ms,
                steps_left=len(steps),
                base_ms=base_ms,
                post_copy=policy.post_copy,
            )
            progress = _progress(session, number, done, decision, share)
            if decision.verdict in _GOES_ON:
                report(progress)
        if decision.verdict is Verdict.REFUSE:
            report(progress)  # the prediction belongs into the status too
            message = (
                f"after {number} rounds the freeze is predicted to last "
                f"{decision.predicted_freeze_ms} ms, the budget is {budget_ms} ms"
            )
            if session.fixed_ms:
                message += f", of which shared or compared memory takes {session.fixed_ms} ms"
            if share < 1:
                message += f", although the pod had only {share:.0%} of its CPU time"
            raise Aborted(Reason.FREEZE_BUDGET_EXCEEDED, message)
        outlet.hurry()
        session.copied = True
        report(replace(progress, converged=True))

    def _round(self, session: SourceSession, outlet: Outlet, *, files: bool = True) -> Round:
        if session.cancelled.is_set():
            raise Rejected(Reason.CANCELLED, "the copy was cancelled")
        start, sent = time.monotonic(), outlet.bytes_sent
        result = session.processes.copy_round(outlet, session.cancelled, files=files)
        outlet.sync()
        seconds, count = time.monotonic() - start, outlet.bytes_sent - sent
        if count > rounds.SMALL_BYTES or not session.bandwidth:
            session.bandwidth = max(round(count / max(seconds, 1e-6)), 1)
        done = Round(
            dirty_bytes=result.dirty_bytes,
            sent_bytes=count,
            seconds=seconds,
            since_s=result.since_us / 1e6,
            bandwidth=session.bandwidth,
            fixed_ms=rounds.fixed_ms(result.freeze_us, result.carried_bytes, session.bandwidth),
            bound_bytes=result.bound_bytes,
        )
        session.left_bytes, session.fixed_ms = done.left_bytes, done.fixed_ms
        session.bound_bytes = done.bound_left_bytes
        session.dirty_rate, session.looked_at = done.dirty_rate, start
        session.count = result.processes
        return done


def _progress(
    session: SourceSession, number: int, done: list[Round], decision: Decision, share: float
) -> CopyProgress:
    last = done[-1] if done else None
    # the first round sends everything, so it tells nothing about what is being written
    known = decision.verdict not in _GOES_ON or (last is not None and not last.first)
    return CopyProgress(
        round=number,
        transferred_bytes=session.outlet.bytes_sent if session.outlet else 0,
        remaining_bytes=last.left_bytes if last else 0,
        dirty_bytes_per_s=last.dirty_rate if last else 0,
        bandwidth_bytes_per_s=session.bandwidth,
        predicted_freeze_ms=decision.predicted_freeze_ms if known else 0,
        converged=False,
        cpu_percent=round(share * 100),
    )


def _ticking(session: SourceSession, latest: CopyProgress | None) -> CopyProgress:
    sent = session.outlet.bytes_sent if session.outlet else 0
    if latest is None:
        return CopyProgress(1, sent, 0, 0, 0, 0, converged=False)
    since = sent - latest.transferred_bytes
    return replace(
        latest,
        transferred_bytes=sent,
        remaining_bytes=max(latest.remaining_bytes - since, 0),
    )
