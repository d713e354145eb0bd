"""How a check is written: a generator that sets itself up and looks again when it is resumed."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import traceback
from collections.abc import Callable, Generator

Check = Generator[None, None, None]
libc = ctypes.CDLL(None, use_errno=True)
_MAKERS: list[tuple[str, Callable[[], Check]]] = []


class Differs(Exception):
    """Something is not as it was left."""


class Unavailable(Exception):
    """This machine or container cannot make the object at all."""


def check(maker: Callable[[], Check]) -> Callable[[], Check]:
    """Registers a check: code before its first ``yield`` makes the object, what follows each
    ``yield`` compares, and leaves everything ready for the next comparison."""
    _MAKERS.append((maker.__name__, maker))
    return maker


def same(seen: object, left: object, what: str = "") -> None:
    """Raise unless both are equal."""
    if seen != left:
        raise Differs(f"{what}: {seen!r}, not {left!r}" if what else f"{seen!r}, not {left!r}")


def system(result: int, what: str) -> int:
    """Result of a C call; raises with its errno when it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


class Board:
    """All checks of this process."""

    def __init__(self, names: list[str]) -> None:
        self._makers = [one for one in _MAKERS if not names or one[0] in names]
        self._running: dict[str, Check] = {}
        self._over: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._makers)

    def set_up(self) -> None:
        for name, maker in self._makers:
            running = maker()
            try:
                next(running)
                self._running[name] = running
            except Unavailable as reason:
                self._over[name] = f"unavailable: {reason}"
            except Exception:
                self._over[name] = f"cannot be set up: {traceback.format_exc(limit=-2)}"

    def look(self) -> dict[str, str]:
        """Result of every check: ``ok``, ``unavailable: …`` or what is wrong."""
        results = dict(self._over)
        for name, running in list(self._running.items()):
            # a check that hangs says where in the container's log
            faulthandler.dump_traceback_later(20)
            try:
                next(running)
                results[name] = "ok"
            except Exception:
                # a generator that has raised is over: its word stands
                self._over[name] = results[name] = traceback.format_exc(limit=-2)
                del self._running[name]
        faulthandler.cancel_dump_traceback_later()
        return results
