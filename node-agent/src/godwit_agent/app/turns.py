"""Freezes take turns: each is then as short as the node's processors allow."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from godwit_api.errors import Retryable
from godwit_api.reasons import Reason


class Turns:
    """At most ``at_once`` holders."""

    def __init__(self, at_once: int) -> None:
        self._free = threading.BoundedSemaphore(at_once)

    @contextlib.contextmanager
    def turn(self, deadline: float) -> Iterator[None]:
        """Waits until ``deadline`` (``time.monotonic()``), then raises ``Retryable``."""
        if not self._free.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
            message = "other pods of this node are being frozen"
            raise Retryable(Reason.IN_PROGRESS, message, delay_seconds=1.0)
        try:
            yield
        finally:
            self._free.release()
