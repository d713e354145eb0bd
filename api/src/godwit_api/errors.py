"""Errors that carry a decision.

    GodwitError
    ├── Rejected   the request cannot be served as it is; nothing was touched
    ├── Retryable  try the same step again, after ``delay_seconds``
    ├── Aborted    this attempt is over; the source is intact and runs
    └── Unsafe     a person decides; nothing more is touched

Each carries a CamelCase ``reason`` for machines and a message for people. They
are translated once at each edge: to a condition, to a gRPC status (code plus
``ErrorInfo``), to text. Nothing ever matches on message text.
"""

from __future__ import annotations

from godwit_api.reasons import Reason


class GodwitError(Exception):
    """Base of all decisions; never raised itself."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class Rejected(GodwitError):
    """The request cannot be served as it is; nothing was touched."""


class Retryable(GodwitError):
    """The same step may succeed later."""

    def __init__(self, reason: Reason, message: str, *, delay_seconds: float = 1.0) -> None:
        super().__init__(reason, message)
        self.delay_seconds = delay_seconds


class Aborted(GodwitError):
    """This attempt is over; the source is intact and runs."""


class Unsafe(GodwitError):
    """Going on could lose or double the process; a person decides."""
