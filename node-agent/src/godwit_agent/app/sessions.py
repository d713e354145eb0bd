"""What this process holds for each (uid, epoch, role), beside the journal."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from godwit_agent.app.arriving import Arriving
from godwit_agent.app.fetching import Fetching
from godwit_agent.app.journal import Journal, Step
from godwit_agent.app.leaving import Leaving
from godwit_agent.app.model import Migration, PeerNode, Pod
from godwit_agent.app.outlet import Outlet
from godwit_agent.hostops.model import Packet
from godwit_api.errors import GodwitError, Rejected, Retryable
from godwit_api.reasons import Reason


class Busy:
    """One operation at a time; a second one waits, then is told to come back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._what = ""

    @contextlib.contextmanager
    def __call__(self, what: str, deadline: float = 0.0) -> Iterator[None]:
        """Until ``deadline`` (``time.monotonic()``) for an operation that is under way."""
        if not self._lock.acquire(timeout=max(deadline - time.monotonic(), 1.0)):
            message = f"{self._what} is still under way"
            raise Retryable(Reason.IN_PROGRESS, message, delay_seconds=1.0)
        self._what = what
        try:
            yield
        finally:
            self._lock.release()


@dataclass(eq=False)
class SourceSession:
    """Source side of one attempt."""

    migration: Migration
    pod: Pod
    journal: Journal
    processes: Leaving
    peer: PeerNode | None = None
    outlet: Outlet | None = None
    copied: bool = False
    compress: bool = False
    left_bytes: int = 0  # for the freeze to send, by the last round
    bound_bytes: int = 0  # of them, what no post-copy withholds
    fixed_ms: int = 0  # what shared memory adds to any freeze, by the last round
    bandwidth: int = 0
    dirty_rate: int = 0  # bytes/s, by the last round
    looked_at: float = 0.0  # time.monotonic() when that began
    count: int = 0  # of processes, by the last round
    busy: Busy = field(default_factory=Busy)
    cancelled: threading.Event = field(default_factory=threading.Event)
    forwarding: threading.Thread | None = None
    trouble: GodwitError | None = None  # last answer of a target that should run its copy
    parts_us: dict[str, int] = field(default_factory=dict)  # of the freeze that committed
    undecidable: bool = False  # a commit record of unknown fate: hands off

    @property
    def missing_bytes(self) -> int:
        """Of a committed post-copy: what the target was without."""
        record = self.journal.find(Step.COMMITTED)
        return int(record.data.get("missing_bytes", 0)) if record else 0

    @property
    def held(self) -> bool:
        """Whether the frozen tree had to stand for longer than a switch."""
        return bool(self.missing_bytes)

    @property
    def needed(self) -> bool:
        """Whether the target's copy depends on the frozen tree."""
        return bool(self.missing_bytes) and not self.journal.has(Step.ARRIVED)

    def close_outlet(self) -> None:
        """Ends the stream; a later copy starts over."""
        outlet, self.outlet = self.outlet, None
        self.copied = False
        if outlet:
            outlet.close()


@dataclass(eq=False)
class TargetSession:
    """Target side of one attempt."""

    migration: Migration
    source: PeerNode
    containers: tuple[str, ...]
    journal: Journal
    pod: Arriving
    busy: Busy = field(default_factory=Busy)
    stopped: int = 0  # tasks of the verified copy that is held
    routed: bool = False  # by this process, before ``Run``
    resumed: bool = False
    fetching: Fetching | None = None  # of a post-copy whose pages are not all here
    packets: list[Packet] = field(default_factory=list)
    packets_lock: threading.Lock = field(default_factory=threading.Lock)

    def require_source(self, node: str) -> None:
        """Only the node that this migration names as its source may ask."""
        if node != self.source.name:
            message = f"{node} is not the source of migration {self.migration.uid}"
            raise Rejected(Reason.WRONG_PEER, message)

    def packet(self, packet: Packet) -> None:
        """A packet from the source: kept until the copy runs, injected at once after."""
        with self.packets_lock:
            if not self.resumed:
                self.packets.append(packet)
                return
        self.pod.inject([packet])
