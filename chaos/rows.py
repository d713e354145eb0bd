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

# In this order: what breaks most often first.
FAULTS = (
    "kill operator",
    "kill source agent",
    "kill target agent",
    "restart kubelet of the source",
    "restart kubelet of the target",
    "restart containerd of the source",
    "restart containerd of the target",
    "kill CRIU",
    "cut the agents' link for 5 s",
    "API server away for 10 s",
    "delete the migration",
    "delete the pod",
    "end the process",
)
_EITHER = frozenset({"Succeeded", "Aborted"})
# The pod's object is there only before the handover; after it the successor has its name.
_LOSES = frozenset({"end the process", "delete the pod"})


def rows() -> tuple[Row, ...]:
    """Every boundary with every fault that makes sense there."""
    return tuple(
        _row(boundary, fault)
        for boundary in BOUNDARIES
        for fault in FAULTS
        if _fits(boundary, fault)
    )


def _fits(boundary: Boundary, fault: str) -> bool:
    if fault == "kill CRIU":
        return boundary.name in ("dump", "restore")
    if fault == "delete the pod":
        return not boundary.handed_over
    return True


def _row(boundary: Boundary, fault: str) -> Row:
    loses = fault in _LOSES
    allowed = _EITHER
    if boundary.committed and not loses:
        allowed = frozenset({"Succeeded"})
    return Row(boundary, fault, allowed, connection=not loses)


# A part of it that is quick and has found the most: `make test` runs it.
SAMPLE = (
    "guarded/kill operator",
    "dump/kill source agent",
    "restored/kill target agent",
    "committed/kill source agent",
    "restore/kill CRIU",
)
