"""The planner: from what is known to the next step. Pure.

Why it is safe, in the order of events:

1. The source's Pod object is deleted only while its processes are guarded and
   the admission rule is proven, so neither can they be killed nor can an empty
   successor start.
2. A successor is released only after the target agent expects it.
3. The commit is the source agent's alone. Until it is known, each way on leads
   through ``AbortAttempt`` or ``ResolveSwitch``, which ask for it; the source
   never commits an attempt that it has aborted. So at most one copy runs.
4. The guard is lifted before the commit only where the source's Pod still
   exists, or somebody else ended the pod.
5. After the commit there is only forward.

``check`` states this as assertions on every decision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

from godwit_api.migration import Failure
from godwit_api.reasons import Reason
from godwit_operator.steps import AFTER_COMMIT, BACK, BEFORE_TOUCH, ENDS, ONWARD, Step

MAX_RETURNS = 3
"""Attempts to restore on the source node itself, before a person is asked."""

LOST = frozenset({Reason.SOURCE_EXITED, Reason.SOURCE_DELETED, Reason.NODE_LOST, Reason.PAGES_LOST})
"""Reasons after which there is no process left, or nobody wants it."""


class Source(StrEnum):
    """The Pod object with the recorded UID."""

    PRESENT = "present"
    LEAVING = "leaving"
    GONE = "gone"


@dataclass(frozen=True)
class Done:
    """The effect is there."""


@dataclass(frozen=True)
class Committed:
    """The source agent says that this attempt is committed."""


@dataclass(frozen=True)
class Again:
    """Not yet; the same step may succeed later."""

    failure: Failure


@dataclass(frozen=True)
class Failed:
    """This step will not succeed in this attempt."""

    failure: Failure
    unsafe: bool = False


Result = Done | Committed | Again | Failed


@dataclass(frozen=True)
class Observation:
    """All that a decision depends on. The booleans are what was persisted."""

    step: Step = Step.QUEUE
    result: Result | None = None  # of that step, since it was persisted
    source: Source = Source.PRESENT
    epoch: int = 0
    bare: bool = False
    cancel: bool = False
    dry_run: bool = False  # ends after the copy, by the way back
    overdue: bool = False
    attempt_open: bool = False  # the source has not confirmed an abort of this epoch
    guarded: bool = False
    rule_proven: bool = False
    delete_intended: bool = False
    expected: bool = False
    released: bool = False
    committed: bool = False
    missing: bool = False  # pages stayed on the source when it committed
    returning: bool = False  # the target is the source node itself
    returns: int = 0
    lost: bool = False  # no process is left, or nobody wants it
    failure: Failure | None = None  # the first one; kept to the end


@dataclass(frozen=True)
class Decision:
    """The next step; ``failure`` is set where the plan changes for it, ``unready`` where the pod
    is not waited for any longer."""

    step: Step
    failure: Failure | None = None
    committed: bool = False
    unready: bool = False


class InvariantError(AssertionError):
    """The planner was about to do harm; nothing is done."""


def plan(seen: Observation) -> Decision:
    """The next step. Raises InvariantError rather than do harm."""
    decision = _decide(seen)
    check(seen, decision)
    return decision


def _decide(seen: Observation) -> Decision:
    if seen.step in ENDS:
        return _decide_end(seen)
    if isinstance(seen.result, Committed) and not seen.committed:
        return Decision(AFTER_COMMIT[0], committed=True)
    if seen.committed:
        return _forward(seen)
    if seen.step in BACK and seen.step is not Step.DROP_TARGET:
        return _back(seen)
    if seen.step is Step.DROP_TARGET:
        return _onward(seen) if _keeps_guard(seen) else _back(seen)
    if seen.step in ONWARD:
        return _onward(seen)
    if seen.step is Step.LET_GO:
        return _let_go(seen)
    return _attempt(seen)


def _decide_end(seen: Observation) -> Decision:
    """An end is left only to bring a stalled process home when its object is deleted."""
    if seen.step is Step.STALLED and seen.cancel:
        if seen.committed:
            return Decision(AFTER_COMMIT[0])
        if seen.lost:
            return Decision(Step.LET_GO)  # where it stalled: there is no process to bring home
        if seen.delete_intended and seen.source is not Source.PRESENT:
            return Decision(Step.ABORT_ATTEMPT)
        return Decision(Step.RELEASE_SOURCE)
    return Decision(seen.step)


def _attempt(seen: Observation) -> Decision:
    """Steps up to the switch."""
    touched = seen.step not in BEFORE_TOUCH
    if touched and seen.source is not Source.PRESENT and not seen.delete_intended:
        return _fail(seen, _failure(Reason.SOURCE_DELETED, "The pod was deleted meanwhile"))
    switching = seen.step in {Step.SWITCH, Step.RESOLVE_SWITCH}
    if seen.cancel and not switching and not seen.returning:
        return _fail(seen, _failure(Reason.CANCELLED, "The PodMigration was deleted"))
    match seen.result:
        case None:
            # A switch is never started blindly a second time.
            return Decision(Step.RESOLVE_SWITCH if seen.step is Step.SWITCH else seen.step)
        case Done() if seen.step is Step.RESOLVE_SWITCH and seen.overdue:
            return _fail(seen, _failure(Reason.TIMED_OUT, "The switch does not come to an end"))
        case Done():
            return Decision(_after(seen))
        case Again(failure):
            if seen.step is Step.SWITCH:
                return Decision(Step.RESOLVE_SWITCH)
            return _fail(seen, failure) if seen.overdue else Decision(seen.step)
        case Failed(failure, unsafe):
            return Decision(Step.STALLED, failure) if unsafe else _fail(seen, failure)
        case Committed():
            raise InvariantError("a commit is handled before")
        case _:
            assert_never(seen.result)


def _after(seen: Observation) -> Step:
    match seen.step:
        case Step.QUEUE:
            return Step.CHECK
        case Step.CHECK:
            return Step.PREPARE_TARGET
        case Step.PREPARE_TARGET:
            return Step.COPY
        case Step.COPY if seen.dry_run:
            return Step.RELEASE_SOURCE
        case Step.COPY:
            return Step.GUARD if seen.delete_intended else Step.BRIDGE
        case Step.BRIDGE:
            return Step.GUARD
        case Step.GUARD if seen.delete_intended:
            return Step.CREATE_SUCCESSOR if seen.bare else Step.FIND_SUCCESSOR
        case Step.GUARD:
            return Step.STORE_MANIFEST if seen.bare else Step.ARM_RULE
        case Step.STORE_MANIFEST:
            return Step.ARM_RULE
        case Step.ARM_RULE:
            return Step.DELETE_POD
        case Step.DELETE_POD:
            return Step.CREATE_SUCCESSOR if seen.bare else Step.FIND_SUCCESSOR
        case Step.CREATE_SUCCESSOR:
            return Step.FIND_SUCCESSOR
        case Step.FIND_SUCCESSOR:
            return Step.EXPECT_POD
        case Step.EXPECT_POD:
            return Step.RELEASE_SUCCESSOR
        case Step.RELEASE_SUCCESSOR:
            return Step.AWAIT_GATE
        case Step.AWAIT_GATE | Step.RESOLVE_SWITCH:
            return Step.SWITCH
        case _:
            raise InvariantError(f"{seen.step} cannot simply be done")


def _fail(seen: Observation, failure: Failure) -> Decision:
    if seen.step in BEFORE_TOUCH:
        cancelled = failure.reason in {Reason.CANCELLED, Reason.SOURCE_DELETED}
        return Decision(Step.ABORTED if cancelled else Step.REJECTED, failure)
    if seen.delete_intended and seen.source is not Source.PRESENT:
        return Decision(Step.LET_GO if failure.reason in LOST else Step.ABORT_ATTEMPT, failure)
    return Decision(Step.RELEASE_SOURCE, failure)


def _back(seen: Observation) -> Decision:
    """The pod is where it was: give everything up.

    An agent that can be reached must lift its guard, however long that takes.
    Without an agent nobody renews the guard, and it lapses.
    """
    match seen.result:
        case Done():
            over = True
        case Failed():
            over = seen.step in {Step.RELEASE_SOURCE, Step.DROP_TARGET}
        case Again(failure) if seen.step is Step.RELEASE_SOURCE:
            over = seen.overdue and failure.reason == Reason.AGENT_MISSING
        case Again():
            over = seen.overdue and seen.step is Step.DROP_TARGET
        case _:
            over = False
    if not over:
        return Decision(seen.step)
    following = BACK[BACK.index(seen.step) + 1 :]
    if following:
        return Decision(following[0])
    return Decision(Step.SUCCEEDED if seen.dry_run and seen.failure is None else Step.ABORTED)


def _onward(seen: Observation) -> Decision:
    """The source's Pod is gone, its process guarded: make way for the next attempt."""
    if seen.step is Step.NEXT_TARGET and seen.returns >= MAX_RETURNS:
        return Decision(Step.STALLED, seen.failure)
    match seen.result:
        case Done():
            following = ONWARD[ONWARD.index(seen.step) + 1 :]
            return Decision(following[0] if following else Step.PREPARE_TARGET)
        case Failed(failure) if failure.reason in LOST:
            return Decision(Step.LET_GO, failure)
        case Failed() | Again() if seen.step is Step.DROP_TARGET and (
            seen.overdue or isinstance(seen.result, Failed)
        ):
            return Decision(Step.NEXT_TARGET)  # the source will never let that copy run
        case Failed(failure, unsafe) if unsafe or seen.overdue:
            return Decision(Step.STALLED, failure)
        case Again(failure) if seen.overdue:
            return Decision(Step.STALLED, _stalled(seen, failure))
        case _:
            return Decision(seen.step)


def _let_go(seen: Observation) -> Decision:
    match seen.result:
        case Done():
            return Decision(Step.RELEASE_SOURCE)
        case Failed(failure):
            return Decision(Step.STALLED, failure)
        case Again(failure) if seen.overdue:
            return Decision(Step.STALLED, failure)
        case _:
            return Decision(seen.step)


def _forward(seen: Observation) -> Decision:
    """After the commit every failure is only a reason to try again, but for one: a copy that has
    been killed since the rest of its memory will never come."""
    if seen.step not in AFTER_COMMIT:
        return Decision(AFTER_COMMIT[0])
    result = seen.result
    if seen.step is Step.AWAIT_PAGES and isinstance(result, Failed) and is_lost(result.failure):
        return Decision(Step.FINISH_SOURCE, result.failure)
    done = isinstance(result, Done)
    waited = seen.step is Step.AWAIT_READY and (seen.overdue or seen.lost)
    if done or waited:
        following = AFTER_COMMIT[AFTER_COMMIT.index(seen.step) + 1 :]
        if following and following[0] is Step.AWAIT_PAGES and not seen.missing:
            following = following[1:]
        if following:
            return Decision(following[0], unready=waited and not done)
        return Decision(Step.ABORTED if seen.returning or seen.lost else Step.SUCCEEDED)
    return Decision(seen.step)


def _keeps_guard(seen: Observation) -> bool:
    """Whether the process still has to be brought into a successor."""
    return seen.delete_intended and seen.source is not Source.PRESENT and not seen.lost


def _stalled(seen: Observation, failure: Failure) -> Failure:
    if seen.step is Step.ABORT_ATTEMPT and failure.reason == Reason.AGENT_UNREACHABLE:
        return _failure(Reason.SOURCE_UNREACHABLE, failure.message)
    return failure


def _failure(reason: Reason, message: str) -> Failure:
    return Failure(reason=reason, message=message)


def is_lost(failure: Failure | None) -> bool:
    return failure is not None and failure.reason in LOST


def check(seen: Observation, decision: Decision) -> None:
    """The safety argument, as assertions on one decision."""
    committed = seen.committed or decision.committed
    lost = seen.lost or is_lost(decision.failure)
    pod_deleted = seen.delete_intended and seen.source is not Source.PRESENT
    closes_now = seen.step is Step.ABORT_ATTEMPT and isinstance(seen.result, Done)
    facts = replace(seen, attempt_open=seen.attempt_open and not closes_now)
    rules: dict[Step, bool] = {
        Step.BRIDGE: not facts.dry_run,
        Step.DELETE_POD: not facts.dry_run
        and facts.guarded
        and facts.rule_proven
        and not committed,
        Step.CREATE_SUCCESSOR: facts.delete_intended and facts.guarded and not committed,
        Step.DELETE_SUCCESSOR: facts.rule_proven and not facts.attempt_open and not committed,
        Step.GUARD: not facts.dry_run,
        Step.RELEASE_SUCCESSOR: facts.expected and facts.guarded and facts.attempt_open,
        Step.SWITCH: facts.released and facts.attempt_open and not committed,
        Step.RELEASE_SOURCE: not committed and (not pod_deleted or lost),
        Step.ABORT_ATTEMPT: not committed,
        Step.DROP_TARGET: not committed,
        Step.NEXT_TARGET: not committed and not facts.attempt_open,
        Step.LET_GO: not committed and lost,
        Step.SYNC_ADDRESSES: committed,
        Step.AWAIT_PAGES: committed,
        Step.FINISH_SOURCE: committed,
        Step.FINISH_TARGET: committed,
        Step.REMOVE_BRIDGE: committed or not pod_deleted or lost,
        Step.SUCCEEDED: (committed and not (seen.returning or lost))
        or (facts.dry_run and not (committed or facts.guarded or facts.delete_intended)),
        Step.ABORTED: committed or not pod_deleted or lost,
        Step.REJECTED: seen.step in BEFORE_TOUCH or seen.step is Step.REJECTED,
    }
    if not rules.get(decision.step, True):
        raise InvariantError(f"{decision.step} after {seen.step}: {seen}")
