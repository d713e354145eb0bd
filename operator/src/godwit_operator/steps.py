"""Names of the steps of a migration, and what belongs to each.

A step is one effect. Its name is written to ``status.step`` before the effect,
so that after a crash the same step is taken again; every effect is idempotent.
"""

from __future__ import annotations

from enum import StrEnum
from typing import assert_never

from godwit_api.migration import Phase, Timeouts


class Step(StrEnum):
    """One effect; the comments name who carries it out."""

    QUEUE = "Queue"
    CHECK = "Check"  # both agents, API
    PREPARE_TARGET = "PrepareTarget"  # target agent
    COPY = "Copy"  # source agent
    BRIDGE = "Bridge"  # API: Services; the rule's objects, in force with ArmRule
    GUARD = "Guard"  # source agent
    STORE_MANIFEST = "StoreManifest"  # API: bare pods only
    ARM_RULE = "ArmRule"  # API: admission rule, and its proof
    DELETE_POD = "DeletePod"  # API
    CREATE_SUCCESSOR = "CreateSuccessor"  # API: bare pods only
    FIND_SUCCESSOR = "FindSuccessor"  # API
    EXPECT_POD = "ExpectPod"  # target agent
    RELEASE_SUCCESSOR = "ReleaseSuccessor"  # API: pin, then lift the gate
    AWAIT_GATE = "AwaitGate"  # target agent
    SWITCH = "Switch"  # source agent
    RESOLVE_SWITCH = "ResolveSwitch"  # source agent: how did it end?
    # Committed: forward only
    SYNC_ADDRESSES = "SyncAddresses"  # all agents
    AWAIT_PAGES = "AwaitPages"  # target agent: of a post-copy only
    FINISH_SOURCE = "FinishSource"
    DISARM_RULE = "DisarmRule"  # also on the way back
    AWAIT_READY = "AwaitReady"
    REMOVE_BRIDGE = "RemoveBridge"  # also on the way back
    FINISH_TARGET = "FinishTarget"
    CLEAN_UP = "CleanUp"  # also on the way back
    # Back, while the source's Pod is there (or somebody else deleted it)
    RELEASE_SOURCE = "ReleaseSource"  # AbortSource, guard lifted
    DROP_TARGET = "DropTarget"  # AbortTarget
    # On to the next target, once the source's Pod was deleted
    ABORT_ATTEMPT = "AbortAttempt"  # AbortSource, guard kept
    REARM_RULE = "RearmRule"
    DELETE_SUCCESSOR = "DeleteSuccessor"
    NEXT_TARGET = "NextTarget"
    # The process has ended, or its owner has: an ordinary new pod may start
    LET_GO = "LetGo"
    # Ends
    SUCCEEDED = "Succeeded"
    REJECTED = "Rejected"
    ABORTED = "Aborted"
    STALLED = "Stalled"


READY_SECONDS = 120
"""How long a pod that has moved is waited for until it is Ready; its process runs all the while."""

ENDS = frozenset({Step.SUCCEEDED, Step.REJECTED, Step.ABORTED, Step.STALLED})
BEFORE_TOUCH = frozenset({Step.QUEUE, Step.CHECK})
AFTER_COMMIT = (
    Step.SYNC_ADDRESSES,
    Step.AWAIT_PAGES,
    Step.FINISH_SOURCE,
    Step.DISARM_RULE,
    Step.AWAIT_READY,
    Step.REMOVE_BRIDGE,
    Step.FINISH_TARGET,
    Step.CLEAN_UP,
)
BACK = (
    Step.RELEASE_SOURCE,
    Step.DISARM_RULE,
    Step.DROP_TARGET,
    Step.REMOVE_BRIDGE,
    Step.CLEAN_UP,
)
ONWARD = (
    Step.ABORT_ATTEMPT,
    Step.REARM_RULE,
    Step.DELETE_SUCCESSOR,
    Step.DROP_TARGET,
    Step.NEXT_TARGET,
)
INTERRUPTIBLE = frozenset(
    {
        Step.QUEUE,
        Step.CHECK,
        Step.PREPARE_TARGET,
        Step.COPY,
        Step.FIND_SUCCESSOR,
        Step.AWAIT_GATE,
        Step.AWAIT_PAGES,
    }
)
"""Steps that a cancellation may cut short: repeating or undoing them is safe."""


def phase_of(step: Step, *, committed: bool) -> Phase | None:
    """Phase that a step shows; None on the way back, where the phase stays."""
    match step:
        case Step.QUEUE:
            return Phase.PENDING
        case Step.CHECK:
            return Phase.CHECKING
        case Step.PREPARE_TARGET | Step.COPY:
            return Phase.COPYING
        case (
            Step.BRIDGE
            | Step.GUARD
            | Step.STORE_MANIFEST
            | Step.ARM_RULE
            | Step.DELETE_POD
            | Step.CREATE_SUCCESSOR
            | Step.FIND_SUCCESSOR
            | Step.EXPECT_POD
            | Step.RELEASE_SUCCESSOR
            | Step.AWAIT_GATE
            | Step.ABORT_ATTEMPT
            | Step.REARM_RULE
            | Step.DELETE_SUCCESSOR
            | Step.NEXT_TARGET
            | Step.LET_GO
        ):
            return Phase.HANDING_OVER
        case Step.SWITCH | Step.RESOLVE_SWITCH:
            return Phase.SWITCHING
        case Step.SYNC_ADDRESSES | Step.AWAIT_PAGES | Step.FINISH_SOURCE:
            return Phase.COMMITTED
        case Step.AWAIT_READY | Step.FINISH_TARGET:
            return Phase.FINISHING
        case Step.DISARM_RULE | Step.REMOVE_BRIDGE | Step.CLEAN_UP:
            return Phase.FINISHING if committed else None
        case Step.RELEASE_SOURCE | Step.DROP_TARGET:
            return None
        case Step.SUCCEEDED:
            return Phase.SUCCEEDED
        case Step.REJECTED:
            return Phase.REJECTED
        case Step.ABORTED:
            return Phase.ABORTED
        case Step.STALLED:
            return Phase.STALLED
        case _:
            assert_never(step)


def bound_seconds(step: Step, timeouts: Timeouts) -> float:
    """How long a step may be retried before it counts as failed; inf: for ever."""
    match step:
        case Step.CHECK:
            return timeouts.checking_seconds
        case Step.PREPARE_TARGET | Step.COPY:
            return timeouts.copy_seconds
        case Step.SWITCH:
            return timeouts.freeze_milliseconds / 1000 + 30
        case Step.RESOLVE_SWITCH | Step.ABORT_ATTEMPT:
            return 600
        case Step.REARM_RULE | Step.DELETE_SUCCESSOR | Step.NEXT_TARGET | Step.LET_GO:
            return 600
        case Step.RELEASE_SOURCE:
            return 60
        case Step.DROP_TARGET:
            return 15
        case Step.AWAIT_READY:
            return READY_SECONDS
        case _ if step in ENDS or step is Step.QUEUE or step in AFTER_COMMIT:
            return float("inf")
        case _:
            return timeouts.handover_seconds
