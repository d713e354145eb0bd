"""Whether this node can take a process of another one. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from godwit_agent.hostops.model import NodeFacts, Obstacle
from godwit_api.reasons import Reason

# both ends speak with these, so they must be the same build
_SAME_VERSION = ("criu", "agent", "hook")
# of whose profiles each process carries one; CRIU restores no other module's
_SAME_MODULE = "security module"


def obstacles(source_node: str, source: NodeFacts, here: NodeFacts) -> Iterator[Obstacle]:
    """All reasons why a process of ``source_node`` cannot go on here."""
    for problem in here.problems:
        yield Obstacle(Reason.NODE_NOT_PREPARED, problem.message)
    if source.architecture != here.architecture:
        yield Obstacle(
            Reason.ARCHITECTURE_DIFFERS,
            f"{source_node} is {source.architecture}, this node is {here.architecture}",
        )
    # the process may have looked at any of them, and goes on using it
    missing = sorted(set(source.cpu_features) - set(here.cpu_features))
    if missing:
        named = ", ".join(missing[:8]) + (" and more" if len(missing) > 8 else "")
        yield Obstacle(Reason.CPU_DIFFERS, f"this node's CPU lacks {named} of {source_node}")
    for name in (*_SAME_VERSION, _SAME_MODULE):
        theirs, ours = source.versions.get(name), here.versions.get(name)
        if theirs != ours:
            message = f"{name} is {theirs or 'absent'} on {source_node}, {ours or 'absent'} here"
            yield Obstacle(Reason.VERSION_DIFFERS, message)
