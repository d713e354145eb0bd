"""How fast a copy sends so that others find the link free. Pure.

A copy that takes all a link gives keeps a queue in front of it, and in a plain
queue everybody's packets wait behind the copy's: a client with a request in
flight all the time then loses most of its requests. The queue shows in the
round-trip time of the copy's own segments. A rate a little below the one at
which it appeared keeps the link busy and the queue empty.
"""

from __future__ import annotations

from dataclasses import dataclass

_WINDOW_S = 0.2
_MIN_SAMPLES = 4
# Above the shortest time seen. Without a queue a round trip is as short again within a window,
# whatever a busy processor adds to single ones.
_QUEUE_US = 500
_QUEUE_SHARE = 0.5
_BELOW = 0.97
# Others that always fill the queue would push a copy aside for ever: half of it stays.
_YIELDS = 0.5
# Every step upwards finds out by making a queue whether there is more.
_HOLD_S = 5.0
_RISE, _MAX_RISE = 0.01, 0.16
_USED = 0.8


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a connection: ``struct tcp_info`` of linux/tcp.h."""

    rtt_us: int
    min_rtt_us: int
    acked_bytes: int


class Courtesy:
    """One connection's rate. ``limit``: bytes/s that it may not exceed anyway, 0 for none."""

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._own = 0
        self._best = 0.0
        self._held_until = 0.0
        self._rise = _RISE
        self._start: tuple[float, int] | None = None
        self._shortest = 0
        self._count = 0

    @property
    def rate(self) -> int:
        """Bytes/s; 0: as fast as it goes."""
        both = [one for one in (self._limit, self._own) if one]
        return min(both, default=0)

    def observe(self, at_s: float, sample: Sample) -> int:
        """Takes what was seen at ``at_s`` (monotonic) into account; the ``rate`` from here on."""
        if self._start is None:
            self._begin(at_s, sample)
            return self.rate
        self._count += 1
        self._shortest = min(self._shortest, sample.rtt_us)
        began_s, began_bytes = self._start
        if at_s - began_s >= _WINDOW_S and self._count >= _MIN_SAMPLES:
            acked = (sample.acked_bytes - began_bytes) / (at_s - began_s)
            self._decide(at_s, acked, self._shortest - sample.min_rtt_us, sample.min_rtt_us)
            self._begin(at_s, sample)
        return self.rate

    def _begin(self, at_s: float, sample: Sample) -> None:
        self._start = (at_s, sample.acked_bytes)
        self._shortest = sample.rtt_us
        self._count = 0

    def _decide(self, at_s: float, acked: float, queue_us: int, min_rtt_us: int) -> None:
        if queue_us > max(_QUEUE_US, min_rtt_us * _QUEUE_SHARE):
            self._best = max(self._best, acked)
            self._own = max(round(acked * _BELOW), round(self._best * _YIELDS), 1)
            self._held_until = at_s + _HOLD_S
            self._rise = _RISE
        elif self._own and at_s >= self._held_until and acked >= self.rate * _USED:
            self._own = round(self._own * (1 + self._rise))
            self._rise = min(self._rise * 2, _MAX_RISE)
