"""The matrix: where a migration is stopped, and what is done to it there. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Boundary:
    """A failpoint at which one process of a migration pauses.

    ``side``: operator, source or target. ``committed``: whether the record is on disk there.
    ``handed_over``: whether the pod's object has been deleted there.
    """

    name: str
    side: str
    failpoint: str
    handed_over: bool = False
    committed: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of the matrix; ``allowed``: phases in which it may end."""

    boundary: Boundary
    fault: str
    allowed: frozenset[str]
    connection: bool
    """Whether the client's connection has to live."""
    reasons: frozenset[str]
    """Reasons that are true ones for an end other than ``Succeeded``."""

    @property
    def name(self) -> str:
        return f"{self.boundary.name}/{self.fault}"


BOUNDARIES = (
    Boundary("copying", "source", "source.Copying.after"),
    Boundary("copied", "source", "source.Copied.after"),
    Boundary("guarded", "source", "source.Guarded.after"),
    Boundary("pod-deleted", "operator", "operator.DeletePod.done", handed_over=True),
    Boundary("successor-released", "operator", "operator.ReleaseSuccessor.done", handed_over=True),
    Boundary("armed", "target", "target.Armed.after", handed_over=True),
    Boundary("freeze", "source", "part.close_door", handed_over=True),
    Boundary("dump", "source", "part.dump", handed_over=True),
    Boundary("restore", "source", "part.restore", handed_over=True),
    Boundary("restored", "source", "part.commit", handed_over=True),
    Boundary("committed", "source", "source.Committed.after", handed_over=True, committed=True),
    Boundary("running", "source", "source.Running.after", handed_over=True, committed=True),
    Boundary(
        "finishing", "operator", "operator.FinishSource.done", handed_over=True, committed=True
    ),
)

# Reasons that come from time passing while something is away or held up.
_LATE = frozenset({"FreezeTimeout", "TimedOut"})
_AGENTS = _LATE | {"AgentRestarted", "AgentUnreachable", "TransferFailed"}
_PODS = _LATE | {
    "SuccessorNotAdmitted",
    "SuccessorNotScheduled",
    "SuccessorNotCreated",
    "SuccessorFailed",
}
_RUNTIME = _PODS | {"DumpFailed", "RestoreFailed"}
_EARLY = ("copying", "copied", "guarded")


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault. ``at``: the boundaries where it makes sense, none for all. ``reasons``: what may
    be said of it, none where it has to succeed. ``loses``: it ends the process or its pod."""

    name: str
    reasons: frozenset[str] = frozenset()
    at: tuple[str, ...] = ()
    loses: bool = False


# In this order: what breaks most often first.
KINDS = (
    Kind("kill operator"),
    Kind("kill source agent", _AGENTS),
    Kind("kill target agent", _AGENTS),
    Kind("restart kubelet of the source", _RUNTIME),
    Kind("restart kubelet of the target", _RUNTIME),
    Kind("restart containerd of the source", _RUNTIME),
    Kind("restart containerd of the target", _RUNTIME),
    Kind("kill CRIU", frozenset({"DumpFailed", "RestoreFailed"}), at=("dump", "restore")),
    Kind("kill the page daemon", frozenset({"RestoreFailed"}), at=("restore",)),
    Kind("cut the agents' link for 5 s", _AGENTS),
    Kind(
        "cut the agents' link for good",
        _AGENTS,
        at=("copying", "copied", "armed", "dump", "restore"),
    ),
    Kind("API server away for 10 s", _PODS | {"APIUnavailable"}),
    Kind("no pod can be created for 20 s", _PODS, at=("copied", "guarded")),
    Kind(
        "fill the target's store",
        # a successor that cannot be claimed in a full store: the message names it
        frozenset({"NotEnoughMemory", "SuccessorFailed"}),
        at=("copying", "copied", "armed", "dump"),
    ),
    Kind(
        "target node gone",
        _AGENTS | _PODS | {"TargetNotReady"},
        at=("copying", "copied", "armed", "dump", "restore"),
    ),
    Kind(
        "source node gone",
        frozenset({"NodeLost", "SourceDeleted", "PodReplaced"}),
        at=("copied", "armed", "restored", "committed"),
        loses=True,
    ),
    Kind(
        "an old operator beside the new one", at=("copied", "guarded", "armed", "dump", "committed")
    ),
    Kind("delete the migration", frozenset({"Cancelled"})),
    Kind(
        "delete the pod",
        frozenset({"SourceDeleted", "SourceExited", "PodReplaced", "PodNotFound"}),
        at=_EARLY,
        loses=True,
    ),
    Kind(
        "end the process",
        frozenset({"SourceExited", "SourceDeleted", "PodReplaced", "PodNotFound", "PodNotRunning"}),
        loses=True,
    ),
)
FAULTS = tuple(kind.name for kind in KINDS)
_EITHER = frozenset({"Succeeded", "Aborted"})
# A copy that is complete runs without its source's word when the source is fenced.
_COMPLETE = ("restored", "committed")


def rows() -> tuple[Row, ...]:
    """Every boundary with every fault that makes sense there."""
    return tuple(
        _row(boundary, kind)
        for boundary in BOUNDARIES
        for kind in KINDS
        if not kind.at or boundary.name in kind.at
    )


def _row(boundary: Boundary, kind: Kind) -> Row:
    loses = kind.loses
    if kind.name == "source node gone":
        loses = boundary.name not in _COMPLETE
    allowed = frozenset({"Succeeded"}) if boundary.committed and not loses else _EITHER
    return Row(boundary, kind.name, allowed, connection=not loses, reasons=kind.reasons)


# A part of it that is quick: `make test` runs it. Each process is killed once, since the kubelet
# lets one that was killed before wait.
SAMPLE = (
    "guarded/kill operator",
    "dump/kill source agent",
    "restored/kill target agent",
)
