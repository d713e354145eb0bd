"""From a decision and what its effect has learned to the next status. Pure.

Conditions follow kstatus: ``Reconciling`` while work goes on, ``Stalled`` after
a final failure, ``Ready`` and ``Succeeded`` at success. The rest tell how far
the migration has come.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from godwit_api.migration import (
    Condition,
    Failure,
    Handover,
    ObstacleView,
    Phase,
    PhaseTransition,
    PodMigration,
    Status,
)
from godwit_api.reasons import Reason
from godwit_operator.plan import Decision, Observation, Result, Source, is_lost
from godwit_operator.steps import ENDS, READY_SECONDS, Step, bound_seconds, phase_of

_MAX_TRANSITIONS = 64
Object = dict[str, Any]


@dataclass(frozen=True)
class Learned:
    """What an effect has learned: fields of the status and of the note to replace."""

    status: dict[str, Any] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)

    def merged(self, other: Learned) -> Learned:
        return replace(self, status=self.status | other.status, note=self.note | other.note)


def timestamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(text: str) -> float:
    """The inverse, also of microsecond precision."""
    return datetime.fromisoformat(text).timestamp()


def apply(status: Status, learned: Learned) -> Status:
    """Status with what was learned."""
    note = msgspec.structs.replace(status.handover, **learned.note)
    return msgspec.structs.replace(status, handover=note, **learned.status)


def enter(migration: PodMigration, status: Status, decision: Decision, now: float) -> Status:
    """Status that announces the decided step. It is written before the effect."""
    note = status.handover
    step = decision.step
    if decision.committed:
        note = msgspec.structs.replace(note, committed=True)
    if decision.failure is not None and note.failure is None:
        note = msgspec.structs.replace(note, failure=decision.failure)
    if is_lost(decision.failure):
        note = msgspec.structs.replace(note, lost=True)
    if decision.unready:
        note = msgspec.structs.replace(note, unready=True)
    match step:
        case Step.PREPARE_TARGET:
            note = msgspec.structs.replace(note, attempt_open=True)
        case Step.DELETE_POD:
            note = msgspec.structs.replace(note, delete_intended=True)
    moment = datetime.fromtimestamp(now, UTC).isoformat()
    note = msgspec.structs.replace(note, step_started=moment)
    phase = phase_of(step, committed=note.committed) or Phase(status.phase or Phase.PENDING)
    transitions = list(status.phase_transition_timestamps)
    if phase != status.phase:
        transitions.append(PhaseTransition(phase=phase, timestamp=timestamp(now)))
    reason, message = _told(status, note, step)
    status = msgspec.structs.replace(
        status,
        observed_generation=migration.metadata.generation,
        phase=phase,
        step=step,
        reason=reason,
        message=message,
        handover=note,
        phase_transition_timestamps=transitions[-_MAX_TRANSITIONS:],
    )
    return with_conditions(migration, status, now)


def observation(
    migration: PodMigration,
    status: Status,
    result: Result | None,
    *,
    source: Source,
    cancel: bool,
    now: float,
) -> Observation:
    """What the planner looks at."""
    note = status.handover
    step = Step(status.step) if status.step else Step.QUEUE
    started = seconds(note.step_started) if note.step_started else now
    if step is Step.RESOLVE_SWITCH:  # it alternates with Switch: both together are bounded
        started = seconds(status.phase_transition_timestamps[-1].timestamp)
    return Observation(
        step=step,
        result=result,
        source=source,
        epoch=status.epoch,
        bare=note.owner_kind == "",
        cancel=cancel,
        dry_run=bool(migration.spec.dry_run),
        overdue=now - started > bound_seconds(step, migration.spec.timeouts),
        attempt_open=note.attempt_open,
        guarded=note.guarded,
        rule_proven=note.rule_proven,
        delete_intended=note.delete_intended,
        expected=note.expected,
        released=note.released,
        committed=note.committed,
        missing=bool(status.post_copy_bytes),
        returning=bool(status.epoch) and status.target_node == status.source_node,
        returns=note.returns,
        lost=note.lost,
        failure=note.failure,
    )


def waiting(migration: PodMigration, status: Status, failure: Failure, now: float) -> Status:
    """Status that tells what the present step is waiting for."""
    told = msgspec.structs.replace(status, message=_clip(failure.message))
    return with_conditions(migration, told, now)


def _told(status: Status, note: Handover, step: Step) -> tuple[str, str]:
    failure = note.failure
    match step:
        case Step.SUCCEEDED if not note.committed:
            predicted = status.predicted_freeze_milliseconds
            return (
                Reason.DRY_RUN,
                f"A move to {status.target_node} is predicted to freeze the pod for {predicted} ms",
            )
        case Step.SUCCEEDED:
            frozen = f", frozen for {status.freeze}" if status.freeze else ""
            after = ""
            if status.post_copy_bytes:
                after = f", with {status.post_copy_bytes >> 20} MiB of memory fetched after that"
            if note.unready:
                after += f"; it was not Ready {READY_SECONDS} s later, see kubectl describe pod"
            return (
                Reason.SUCCEEDED,
                f"Moved from {status.source_node} to {status.target_node}{frozen}{after}",
            )
        case Step.REJECTED | Step.ABORTED | Step.STALLED:
            reason = failure.reason if failure else Reason.INTERNAL
            message = failure.message if failure else ""
            if step is Step.ABORTED and note.committed and not note.lost:
                message = f"{message}; the pod runs on its node {status.source_node} again"
            return reason, _clip(message)
        case Step.QUEUE:
            return Reason.PENDING, ""
        case Step.AWAIT_PAGES:
            return (
                Reason.POST_COPY,
                f"The pod runs on {status.target_node}; memory of it is still on "
                f"{status.source_node}, and would be lost with that node",
            )
        case _ if failure is not None and not note.committed:
            return failure.reason, _clip(f"Going back: {failure.message}")
        case _:
            return Reason.IN_PROGRESS, ""


def with_conditions(migration: PodMigration, status: Status, now: float) -> Status:
    """Status with all conditions derived from the rest of it."""
    generation = migration.metadata.generation
    known = {condition.type: condition for condition in status.conditions}
    conditions = []
    for kind, (value, reason, message) in _conditions(status).items():
        old = known.get(kind)
        since = old.last_transition_time if old and old.status == value else timestamp(now)
        conditions.append(
            Condition(
                type=kind,
                status=value,
                reason=reason,
                message=message,
                last_transition_time=since,
                observed_generation=generation,
            )
        )
    return msgspec.structs.replace(status, conditions=conditions)


def _conditions(status: Status) -> dict[str, tuple[str, str, str]]:
    note = status.handover
    step = Step(status.step)
    ended = step in ENDS
    reason, message = status.reason or Reason.PENDING, status.message
    succeeded = step is Step.SUCCEEDED

    def passed(flag: bool) -> tuple[str, str, str]:
        if flag:
            return "True", "Done", ""
        return ("False", reason, message) if ended else ("Unknown", Reason.PENDING, "")

    result = {
        "Reconciling": ("False", reason, message) if ended else ("True", reason, message),
        "Stalled": ("True", reason, message)
        if ended and not succeeded
        else ("False", reason, "" if not ended else message),
        "Ready": ("True" if succeeded else "False", reason, message),
        "Succeeded": ("True" if succeeded else "False" if ended else "Unknown", reason, message),
        "Checked": passed(bool(status.epoch)),
        "Copied": passed(note.copied),
        "HandedOver": passed(note.delete_intended and note.released),
        "Committed": passed(note.committed),
    }
    if status.obstacles:
        text = _clip(describe_obstacles(status.obstacles), 32000)
        result["Checked"] = ("False", status.obstacles[0].reason, text)
    return result


def describe_obstacles(obstacles: list[ObstacleView]) -> str:
    return "; ".join(f"{item.reason}: {item.message}" for item in obstacles)


def _clip(text: str, limit: int = 8000) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def encode(status: Status) -> Object:
    """Status as the API holds it."""
    found: Object = msgspec.to_builtins(status)
    return found


def merge_patch(old: Object, new: Object) -> Object:
    """JSON merge patch from ``old`` to ``new``: what is gone becomes null."""
    patch: Object = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if value == before and key in old:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            patch[key] = merge_patch(before, value)
        else:
            patch[key] = value
    return patch
