"""After the commit record: only forward, until the target says that its copy runs.

The frozen source is never thawed again, whatever happens. It is killed only
after the target's word, so that a person could still decide otherwise when
the target is lost for good.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from godwit_agent import log
from godwit_agent.app.journal import Step
from godwit_agent.app.model import Outcome
from godwit_agent.app.peers import Peer, Ran
from godwit_agent.app.sessions import SourceSession
from godwit_agent.app.switch import RUN_TIMEOUT_S
from godwit_api.errors import GodwitError

_LATE_S = 0.25
_LATE_STEP_S = 0.01
_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 2.0


def run_until_told(session: SourceSession, peer: Peer, stopping: threading.Event) -> Ran | None:
    """Asks the target to run its copy until it does; None when this process ends first."""
    delay, warned = _FIRST_DELAY_S, False
    while not stopping.is_set():
        try:
            if session.peer:
                session.processes.give_away(session.peer)
            return peer.run(session.migration, RUN_TIMEOUT_S)
        except (GodwitError, OSError) as error:
            session.trouble = error if isinstance(error, GodwitError) else None
            if not warned:
                log.error(
                    "committed, but the target does not run yet",
                    **session.migration.keys,
                    error=error,
                )
                warned = True
        stopping.wait(delay)
        delay = min(delay * 2, _MAX_DELAY_S)
    return None


def settle(session: SourceSession, outcome: Outcome) -> None:
    """The copy runs: remember that, forward late packets, end what is left of the source unless
    the copy still needs it.

    The processes end beside the forwarding, which takes from the pod's network only: each lasts
    about as long as the other.
    """
    if not session.journal.has(Step.RUNNING):
        session.journal.append(Step.RUNNING, {"outcome": outcome.to_json()})
    _attempt(session, "hold_address", session.processes.hold_address)
    if session.needed:
        _attempt(session, "hold", session.processes.hold)
        _forward_late(session)
        if not session.needed:
            end(session)
    else:
        late = threading.Thread(target=_forward_late, args=(session,), name="late packets")
        late.start()
        try:
            _kill(session)
        finally:
            late.join()
        _discard(session)
    session.close_outlet()


def end(session: SourceSession) -> None:
    """What is left of the source, when nobody needs it any more."""
    _kill(session)
    _discard(session)


def _kill(session: SourceSession) -> None:
    _attempt(session, "kill", lambda: session.processes.kill(held=session.held))


def _discard(session: SourceSession) -> None:
    _attempt(session, "discard", session.processes.discard)


def _forward_late(session: SourceSession) -> None:
    """Packets that came here although the route has changed, for a quarter of a second."""
    end = time.monotonic() + _LATE_S
    outlet = session.outlet
    while outlet and outlet.usable and time.monotonic() < end:
        try:
            for packet in session.processes.packets():
                outlet.packet(packet.at_ns, packet.data)
            outlet.flush()
        except (GodwitError, OSError) as error:
            log.warning("late packets were lost", **session.migration.keys, error=error)
            return
        time.sleep(_LATE_STEP_S)


def _attempt(session: SourceSession, name: str, step: Callable[[], None]) -> None:
    """``FinishSource`` repeats what fails here."""
    try:
        step()
    except (GodwitError, OSError) as error:
        log.error("step after the commit failed", **session.migration.keys, step=name, error=error)


def outcome_of(
    ran: Ran,
    transferred_bytes: int,
    timings_us: dict[str, int],
    *,
    frozen_at_ns: int,
    waited_us: int | None = None,
    missing_bytes: int = 0,
) -> Outcome:
    """What a committed switch answers, now and when it is repeated.

    ``waited_us``: from the freeze to the target's answer, by this node's clock;
    what the target did after it had resumed is taken off, so that the freeze
    is known to half a round trip. Without it two nodes' clocks are compared.
    """
    timings = dict(timings_us) | {f"target_{name}": us for name, us in ran.timings_us.items()}
    if waited_us is None:
        freeze_us = max((ran.resumed_unix_ns - frozen_at_ns) // 1000, 0)
    else:
        freeze_us = waited_us - ran.timings_us.get("after_resume", 0)
    return Outcome(
        committed=True,
        freeze_us=freeze_us,
        transferred_bytes=transferred_bytes,
        timings_us=timings,
        missing_bytes=missing_bytes,
    )
