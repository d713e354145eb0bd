"""Timers of timerfd_create(2) in CRIU's ``files.img``, mended between dump and restore.

images/fdinfo.proto, timerfd.proto, v4.2. Two things go wrong without it:

- A periodic timer that has expired and has not been read, as one does that fires
  in the freeze, tells the kernel's ``fdinfo`` no time to its next expiration
  (fs/timerfd.c arms it again at the read). CRIU restores it disarmed: it would
  never fire again.
- A deadline (TFD_TIMER_ABSTIME) is stored as the time that is left, and armed
  (timerfd_arm, criu/pie/restorer.c) without the fraction of the current second:
  up to a second early. As a plain timer it keeps what is left.
"""

from __future__ import annotations

from godwit_agent.memory import openfiles, protobuf
from godwit_agent.memory.protobuf import ImageError

_TIMER, _ENTRY_FIELD = 17, 12  # TIMERFD
_CLOCK_FIELD = 4
_TICKS, _SETTIME_FLAGS, _SECONDS, _NANOSECONDS, _EVERY_S, _EVERY_NS = 5, 6, 7, 8, 9, 10
_ABSTIME = 1
# CLOCK_MONOTONIC, CLOCK_BOOTTIME: nobody sets them, so a deadline is what is left until then
_STEADY = (1, 7)


def mend(image: bytes) -> bytes:
    """``files.img`` with its timers mended; unchanged (the same object) when none needs it."""
    return openfiles.changed(image, _TIMER, _ENTRY_FIELD, _timer)


def _timer(data: bytes) -> bytes:
    """The numbers from the clock on are the message's last fields."""
    at = 0
    for number, part, _ in protobuf.split(data):
        if number == _CLOCK_FIELD:
            values = dict(protobuf.fields(memoryview(data)[at:]))
            return data[:at] + protobuf.message(_values(values).items())
        at += len(part)
    raise ImageError("timer without a clock")


def _values(values: dict[int, int]) -> dict[int, int]:
    armed = values.get(_SECONDS) or values.get(_NANOSECONDS)
    periodic = values.get(_EVERY_S) or values.get(_EVERY_NS)
    mended = dict(values)
    if periodic and not armed and values.get(_TICKS):
        mended[_SECONDS], mended[_NANOSECONDS] = values[_EVERY_S], values[_EVERY_NS]
        mended[_SETTIME_FLAGS] = 0
    elif values.get(_SETTIME_FLAGS) == _ABSTIME and values.get(_CLOCK_FIELD) in _STEADY:
        mended[_SETTIME_FLAGS] = 0
    return mended
