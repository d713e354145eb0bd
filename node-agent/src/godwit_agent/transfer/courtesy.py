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
# The client of a busy pod takes a per cent of a link of 1 Gbit/s itself.
_BELOW = 0.97
# Others that always fill the queue would push a copy aside for ever: half of it stays.
_YIELDS = 0.5
# Every step upwards finds out by making a queue whether there is more, as sending without a rate
# does, and others wait in it. So it looks more often then, for as many round trips as tell it,
# and steps less often the more often there was nothing. What the first look says may have been a
# busy processor.
_GLANCE_S, _GLANCE_RTTS = 0.05, 4
_FIRST_HOLD_S, _HOLD_S, _MAX_HOLD_S = 1.0, 5.0, 20.0
# A rate just below the link's would take long to empty a queue; half of it takes twice the queue.
_DRAIN, _MAX_DRAIN_S = 0.5, 0.5
_RISE, _MAX_RISE = 0.01, 0.16
_MORE = 1.02
_USED = 0.8
_NONE_US = 1 << 32


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
        self._drained_at = 0.0
        self._hold_s = _HOLD_S
        self._rise = _RISE
        # the rate that the present steps have begun at; 0: it does not step
        self._sure = 0
        self._start: tuple[float, int] | None = None
        self._shortest = _NONE_US
        self._count = 0

    @property
    def rate(self) -> int:
        """Bytes/s, but for a queue that is to run empty; 0: as fast as it goes."""
        both = [one for one in (self._limit, self._own) if one]
        return min(both, default=0)

    def observe(self, at_s: float, sample: Sample) -> int:
        """Takes what was seen at ``at_s`` (monotonic) into account; the rate from here on."""
        if at_s >= self._drained_at:
            self._look(at_s, sample)
        if at_s < self._drained_at:
            self._start = None
            return max(round(self.rate * _DRAIN), 1)
        return self.rate

    def _look(self, at_s: float, sample: Sample) -> None:
        if self._start is None:
            self._begin(at_s, sample)
            return
        self._count += 1
        self._shortest = min(self._shortest, sample.rtt_us)
        began_s, began_bytes = self._start
        if at_s - began_s < self._window_s(sample.min_rtt_us) or self._count < _MIN_SAMPLES:
            return
        acked = (sample.acked_bytes - began_bytes) / (at_s - began_s)
        queue_us = self._shortest - sample.min_rtt_us
        if queue_us > max(_QUEUE_US, sample.min_rtt_us * _QUEUE_SHARE):
            self._fall(at_s, acked)
            self._drained_at = at_s + min(queue_us * 1e-6 / (1 - _DRAIN), _MAX_DRAIN_S)
        elif self._own and at_s >= self._held_until and acked >= self.rate * _USED:
            self._step()
        self._begin(at_s, sample)

    def _begin(self, at_s: float, sample: Sample) -> None:
        # its own round trip is what the rate until now has led to
        self._start = (at_s, sample.acked_bytes)
        self._shortest = _NONE_US
        self._count = 0

    def _window_s(self, min_rtt_us: int) -> float:
        if self._own and not self._sure:
            return _WINDOW_S
        return min(max(_GLANCE_S, min_rtt_us * 1e-6 * _GLANCE_RTTS), _WINDOW_S)

    def _fall(self, at_s: float, acked: float) -> None:
        """There is a queue."""
        self._best = max(self._best, acked)
        below = round(acked * _BELOW)
        if self._sure:
            found = max(self._sure, min(self._own, below))
            more = found > self._sure * _MORE
            self._hold_s = _HOLD_S if more else min(max(self._hold_s * 2, _HOLD_S), _MAX_HOLD_S)
            self._own = found
        else:
            self._hold_s = _HOLD_S if self._own else _FIRST_HOLD_S
            self._own = max(below, round(self._best * _YIELDS), 1)
        self._sure, self._rise = 0, _RISE
        self._held_until = at_s + self._hold_s

    def _step(self) -> None:
        """There is none, and perhaps more to have."""
        self._sure = self._sure or self._own
        self._own = round(self._own * (1 + self._rise))
        self._rise = min(self._rise * 2, _MAX_RISE)
        if self._limit and self._own > self._limit:
            self._own = self._sure = 0
