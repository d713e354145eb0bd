"""What a freeze costs before a byte is sent, learned from the freezes of this node. Pure."""

from __future__ import annotations

import statistics
from collections import deque

from godwit_agent.memory.rounds import FIXED_FREEZE_MS

# Of what the first process costs. Measured with processes that do nothing, on a busy machine: four
# were frozen 2.2 to 2.4 times as long as one, 16 of them 2.8 to 5.4 times (shortest of four, and
# medians, in two series).
_PER_PROCESS = 0.3
_KEPT = 8
_ENOUGH = 3
# A node is as fast as the one that was measured, or within this; the rest is chance.
_SLOWEST, _FASTEST = 8.0, 0.5
_SMALL = 0.2


class Freezes:
    """Remembers the last ones while the agent lives."""

    def __init__(self) -> None:
        self._factors: deque[float] = deque(maxlen=_KEPT)

    def base_ms(self, processes: int) -> int:
        """For a pod of so many processes (0: not known yet)."""
        return round(_expected_ms(processes) * self._factor())

    def learn(self, processes: int, freeze_ms: float, left_bytes: int, bandwidth: int) -> None:
        """A freeze that sent about ``left_bytes`` at ``bandwidth`` bytes/s is over. It tells
        nothing where the sending may have been much of it."""
        sending_ms = left_bytes * 1000 / bandwidth if bandwidth else 0.0
        if sending_ms <= freeze_ms * _SMALL:
            self._factors.append(freeze_ms / _expected_ms(processes))

    def _factor(self) -> float:
        """Rather too long than too short: the upper of the usual ones."""
        known = sorted(self._factors)
        if len(known) < _ENOUGH:
            return 1.0
        usual = statistics.quantiles(known, n=4, method="inclusive")[2]
        return min(max(usual, _FASTEST), _SLOWEST)


def _expected_ms(processes: int) -> float:
    return FIXED_FREEZE_MS * (1 + _PER_PROCESS * max(processes - 1, 0))
