"""The other end of a terminal: what a person does with it."""

from __future__ import annotations

import os
import select
import time


def read_until(master: int, text: str, seconds: float = 20.0) -> str:
    """What is written to the terminal, up to ``text``; fails when it does not come."""
    seen, deadline = "", time.monotonic() + seconds
    while text not in seen:
        ready, _, _ = select.select([master], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{text!r} has not come, but {seen!r}"
        seen += os.read(master, 4096).decode(errors="replace")
    return seen


def write(master: int, text: str) -> None:
    """Keys that somebody presses."""
    os.write(master, text.encode())
