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

from godwit_agent.memory import protobuf
from godwit_agent.memory.protobuf import ImageError

FILES = "files.img"
_MAGICS = (0x54564319, 0x56303138)  # IMG_COMMON_MAGIC, FILES_MAGIC
_TIMER = b"\x08\x11"  # field 1, the kind of the file: TIMERFD
_ENTRY_FIELD, _OWNER_FIELD, _CLOCK_FIELD = 12, 3, 4
_TICKS, _SETTIME_FLAGS, _SECONDS, _NANOSECONDS, _EVERY_S, _EVERY_NS = 5, 6, 7, 8, 9, 10
_ABSTIME = 1
# CLOCK_MONOTONIC, CLOCK_BOOTTIME: nobody sets them, so a deadline is what is left until then
_STEADY = (1, 7)


def mend(image: bytes) -> bytes:
    """``files.img`` with its timers mended; unchanged (the same object) when none needs it."""
    entries = list(protobuf.entries(image, _MAGICS))
    mended = [_entry(bytes(e)) if e[:2] == _TIMER else e for e in entries]
    if all(one is other for one, other in zip(entries, mended, strict=True)) or mended == entries:
        return image
    return protobuf.image(_MAGICS, [bytes(entry) for entry in mended])


def _entry(data: bytes) -> bytes:
    at = 0
    while at < len(data):
        start = at
        key, at = protobuf.read_varint(data, at)
        if key == _ENTRY_FIELD << 3 | 2:
            length, at = protobuf.read_varint(data, at)
            body = _timer(data[at : at + length])
            return (
                data[:start] + protobuf.varint(key) + protobuf.varint(len(body)) + body
                + data[at + length :]
            )  # fmt: skip
        at = _skip(data, key, at)
    return data


def _timer(data: bytes) -> bytes:
    """The numbers from the clock on are the message's last fields."""
    at = 0
    while at < len(data):
        start = at
        key, at = protobuf.read_varint(data, at)
        if key >> 3 == _CLOCK_FIELD:
            return data[:start] + protobuf.message(
                _values(dict(protobuf.fields(memoryview(data)[start:]))).items()
            )
        at = _skip(data, key, at)
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


def _skip(data: bytes, key: int, at: int) -> int:
    value, at = protobuf.read_varint(data, at)
    match key & 7:
        case 0:
            return at
        case 2:
            return at + value
        case kind:
            raise ImageError(f"field of kind {kind}")
