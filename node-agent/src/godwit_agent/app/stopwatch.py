"""Names and durations of the parts of a freeze."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from godwit_api import failpoints


class Stopwatch:
    """Parts may overlap when threads are at work; each is measured by itself."""

    def __init__(self) -> None:
        self.parts_us: dict[str, int] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter_ns()
        try:
            failpoints.reach(f"part.{name}")
            yield
        finally:
            self.parts_us[name] = (time.perf_counter_ns() - start) // 1000
