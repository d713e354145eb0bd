"""Unix time that does not jump when somebody sets the machine's clock."""

from __future__ import annotations

import time


class SteadyClock:
    """The time of its making, and what has passed since: bounds of steps are durations."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()
