"""Back to a running source, from any moment before the commit record."""

from __future__ import annotations

from collections.abc import Callable

from godwit_agent import log
from godwit_agent.app.leaving import Leaving
from godwit_agent.app.model import Migration
from godwit_api.errors import GodwitError, Unsafe
from godwit_api.reasons import Reason


def roll_back(migration: Migration, source: Leaving) -> None:
    """CRIU lets go (sockets leave repair mode with it), thaw, door, replay: in this order.

    Every step is tried, whatever became of the ones before: each makes the
    source better off. Only when it cannot be thawed is a person needed. The
    target plays no part: it does not run its copy without our word.
    """
    released = _attempt(migration, "release_dump", source.release_dump)
    thawed = _attempt(migration, "thaw", source.thaw)
    opened = _attempt(migration, "open_door", source.open_door)
    _attempt(migration, "replay_here", source.replay_here)
    _attempt(migration, "discard", source.discard)
    faults = {"CRIU did not let go": released, "no thaw": thawed, "door not opened": opened}
    if not all(faults.values()):
        what = ", ".join(fault for fault, done in faults.items() if not done)
        raise Unsafe(Reason.INTERNAL, f"the source could not be made to run again: {what}")


def _attempt(migration: Migration, name: str, step: Callable[[], None]) -> bool:
    try:
        step()
    except (GodwitError, OSError) as error:
        log.error("rollback step failed", **migration.keys, step=name, error=error)
        return False
    except Exception:
        log.exception("rollback step failed", **migration.keys, step=name)
        return False
    return True
