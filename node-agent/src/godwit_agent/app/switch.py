"""The freeze, in the order of 'The switch' in docs/architecture.md.

``Switch.prepare`` has done everything that may be slow. Up to the commit
record every failure ends in ``rollback.roll_back``; behind it there is no way
back and ``forward`` goes on. Nothing in between may allocate much, log, or
wait for anything but the two kernels, CRIU and the other agent.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from godwit_agent.app.journal import Journal, Step
from godwit_agent.app.leaving import Leaving
from godwit_agent.app.model import Migration, PeerNode
from godwit_agent.app.outlet import Outlet
from godwit_agent.app.peers import Peer, Ran
from godwit_agent.app.stopwatch import Stopwatch
from godwit_api.errors import Aborted, GodwitError, Unsafe
from godwit_api.reasons import Reason

HANDSHAKE_HOLD_S = 0.020
_PACKET_ACK_S = 0.1
_TAKE_TIMEOUT_S = 1.0
RUN_TIMEOUT_S = 10.0


class Watchdog:
    """Ends a freeze that lasts too long, unless it has been decided.

    ``decide`` and the timer exclude each other: either the commit record is
    written, or everything that blocks is made to fail.
    """

    def __init__(self, seconds: float, stop: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._over = False
        self._fired = False
        self._stop = stop
        self._timer = threading.Timer(seconds, self._fire)
        self._timer.daemon = True
        self.deadline = time.monotonic() + seconds

    def __enter__(self) -> Watchdog:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._over = True
        self._timer.cancel()

    @property
    def fired(self) -> bool:
        return self._fired

    def left(self) -> float:
        """Seconds until the end of the freeze's time."""
        return max(self.deadline - time.monotonic(), 0.01)

    def decide(self, commit: Callable[[], None]) -> None:
        """Runs ``commit`` if there is time left; no timer can come between."""
        with self._lock:
            if self._fired:
                raise Aborted(Reason.FREEZE_TIMEOUT, "the freeze lasted too long")
            commit()
            self._over = True

    def _fire(self) -> None:
        with self._lock:
            if self._over:
                return
            self._fired = True
        self._stop()


@dataclass
class Freeze:
    """One freeze: what it works on, and what it measured."""

    migration: Migration
    journal: Journal
    source: Leaving
    outlet: Outlet
    peer: Peer
    target: PeerNode
    workers: ThreadPoolExecutor
    allowance: int | None = None  # of a post-copy: bytes that the freeze may send
    missing_bytes: int = 0  # stay here until the target has fetched them
    watch: Stopwatch = field(default_factory=Stopwatch)
    frozen_at_ns: int = 0  # Unix time, for what both nodes see; durations are by `begun`
    begun: float = 0.0
    waited_us: int = 0  # from the freeze to the target's answer
    committed: bool = False

    def until_commit(self, watchdog: Watchdog) -> None:
        """Steps 1 to 6. Raises when the source must run again."""
        part, source = self.watch.part, self.source

        self.journal.append(Step.SWITCHING)
        with part("hold_handshakes"):
            source.hold_handshakes()
            time.sleep(HANDSHAKE_HOLD_S)

        self.frozen_at_ns, self.begun = time.time_ns(), time.monotonic()
        with part("freeze"):
            source.freeze()
        with part("close_door"):
            source.close_door()

        with part("dump_and_changes"):
            changes = self.workers.submit(self._send_changes, watchdog)
            try:
                with part("dump"):
                    source.dump(watchdog.left())
            finally:
                failure = _settle(changes)
            if failure:
                raise failure

        with part("images"):
            source.send_images(self.outlet, moving=True)
        with part("acknowledge"):
            self.outlet.sync(watchdog.left())
        with part("restore"):
            restored = self.peer.restore(
                self.migration,
                watchdog.left(),
                self.source.outgoing(),
                post_copy=self.allowance is not None,
            )
        self.missing_bytes = restored.missing_bytes
        if self.missing_bytes and self.allowance is None:
            raise Aborted(Reason.VERIFY_FAILED, "pages are missing on the target")
        for name, value in restored.timings_us.items():
            self.watch.parts_us[f"target_{name}"] = value

        with part("commit"):
            watchdog.decide(self._commit)

    def after_commit(self) -> Ran:
        """Step 7. Raises ``GodwitError`` when the target did not answer; then it is asked again.

        The target's route comes first: two nodes that each think that the other has the pod send
        packets to and fro. Its door is closed until ``run``.
        """
        with self.watch.part("packets"):
            self._send_packets()
        with self.watch.part("take_route"):
            self._take_route()
        with self.watch.part("route"):
            self.source.give_away(self.target)
            self._send_packets(acknowledged=False)  # the last that came here
        with self.watch.part("run"):
            ran = self.peer.run(self.migration, RUN_TIMEOUT_S)
        self.waited_us = self.lasted_us()
        self.source.fall_silent()
        return ran

    def _send_changes(self, watchdog: Watchdog) -> None:
        with self.watch.part("changes"):
            allowance = self.allowance
            stats = self.source.send_changes(self.outlet, allowance, lambda: watchdog.fired)
        self.watch.parts_us.update({f"changes_{k}": v for k, v in stats.parts_us.items()})
        with self.watch.part("connections"):
            self.source.renew_connections()
        with self.watch.part("datagrams"):
            self.source.find_unread()

    def lasted_us(self) -> int:
        """Since the freeze; 0 before it."""
        return int((time.monotonic() - self.begun) * 1e6) if self.begun else 0

    def _commit(self) -> None:
        data = {"frozen_at_ns": self.frozen_at_ns, "missing_bytes": self.missing_bytes}
        self.journal.append(Step.COMMITTED, data)
        self.committed = True

    def _take_route(self) -> None:
        """Wanted, not needed: ``run`` takes it, too."""
        with contextlib.suppress(GodwitError):
            self.peer.take_route(self.migration, _TAKE_TIMEOUT_S)

    def _send_packets(self, *, acknowledged: bool = True) -> None:
        """Held packets are wanted, not needed: their senders would repeat them."""
        try:
            for packet in self.source.packets():
                self.outlet.packet(packet.at_ns, packet.data)
            if acknowledged:
                self.outlet.sync(_PACKET_ACK_S)
            else:
                self.outlet.flush()
        except (GodwitError, OSError):
            return


def _settle(future: Future[None]) -> BaseException | None:
    return future.exception()


def aborted(error: Exception, *, timed_out: bool) -> GodwitError:
    """What a failure before the commit is called; ``Unsafe`` stays what it is."""
    if isinstance(error, Unsafe):
        return error
    if timed_out:
        return Aborted(Reason.FREEZE_TIMEOUT, f"the freeze lasted too long ({error})")
    if isinstance(error, GodwitError):
        return Aborted(error.reason, error.message)
    return Aborted(Reason.INTERNAL, f"{type(error).__name__}: {error}")
