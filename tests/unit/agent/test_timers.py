"""Timers that CRIU would restore dead or early are mended in its image, and nothing else is."""

from __future__ import annotations

import pytest

from godwit_agent.memory import protobuf, timers
from godwit_agent.memory.protobuf import ImageError

MAGICS = (0x54564319, 0x56303138)
OTHER = b"\x08\x06\x10\x05\x42\x02\x08\x05"  # an eventfd


def timer(
    clock: int, ticks: int, flags: int, value: tuple[int, int], every: tuple[int, int]
) -> bytes:
    owner = b"\x1a\x04\x08\x00\x10\x00"
    numbers = [(4, clock), (5, ticks), (6, flags), (7, value[0]), (8, value[1])]
    body = (
        protobuf.message([(1, 9), (2, 2)])
        + owner
        + protobuf.message([*numbers, (9, every[0]), (10, every[1])])
    )
    return protobuf.message([(1, 17), (2, 9)]) + b"\x62" + protobuf.varint(len(body)) + body


def mended(entry: bytes) -> bytes:
    image = protobuf.image(MAGICS, [OTHER, entry, OTHER])
    first, found, last = (bytes(e) for e in protobuf.entries(timers.mend(image), MAGICS))
    assert (first, last) == (OTHER, OTHER)
    return found


def test_periodic_timer_that_has_expired_goes_on() -> None:
    found = mended(timer(1, 1, 0, (0, 0), (0, 250_000_000)))
    assert found == timer(1, 1, 0, (0, 250_000_000), (0, 250_000_000))


@pytest.mark.parametrize("clock", [1, 7])
def test_deadline_keeps_what_is_left(clock: int) -> None:
    assert mended(timer(clock, 0, 1, (29, 5), (0, 0))) == timer(clock, 0, 0, (29, 5), (0, 0))


@pytest.mark.parametrize(
    "entry",
    [
        timer(1, 0, 0, (0, 0), (5, 0)),  # disarmed
        timer(1, 1, 0, (0, 0), (0, 0)),  # expired, once
        timer(1, 0, 0, (3, 1), (5, 0)),
        timer(0, 0, 1, (3, 1), (0, 0)),  # the wall clock: may be set meanwhile
        timer(0, 0, 3, (3, 1), (0, 0)),
    ],
)
def test_others_stay_as_they_are(entry: bytes) -> None:
    image = protobuf.image(MAGICS, [OTHER, entry])
    assert timers.mend(image) is image


def test_long_image_without_timers_is_not_touched() -> None:
    image = protobuf.image(MAGICS, [OTHER] * 1000)
    assert timers.mend(image) is image


def test_another_image_is_an_error() -> None:
    with pytest.raises(ImageError):
        timers.mend(b"something else")


def test_cut_off_timer_is_an_error() -> None:
    entry = timer(1, 1, 0, (0, 0), (5, 0))
    with pytest.raises(ImageError):
        timers.mend(protobuf.image(MAGICS, [entry[:12]]))
