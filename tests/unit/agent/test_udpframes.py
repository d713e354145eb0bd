"""Datagrams become frames and are found again in captured ones."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit_agent.hostops.model import Packet
from godwit_agent.hostops.net import checksum, udpframes
from godwit_agent.hostops.net.udpframes import Datagram

FOUR = ipaddress.ip_address("10.1.2.3"), ipaddress.ip_address("10.9.8.7")
SIX = ipaddress.ip_address("fd00::3"), ipaddress.ip_address("fd00::7")


def datagram(payload: bytes, ends: tuple[udpframes.Address, udpframes.Address] = FOUR) -> Datagram:
    return Datagram((ends[0], 4000), (ends[1], 53), payload, traffic_class=0x28, hops=9)


@given(st.binary(max_size=1200), st.sampled_from([FOUR, SIX]))
def test_a_frame_says_what_it_was_made_of(
    payload: bytes, ends: tuple[udpframes.Address, udpframes.Address]
) -> None:
    one = datagram(payload, ends)
    (frame,) = udpframes.frames(one)
    assert udpframes.key(frame) == [one.key]
    assert udpframes.destination(frame) == ends[1]
    body = frame[udpframes.START :]
    if ends is FOUR:
        assert checksum.internet(body[:20]) == 0
        assert (body[1], body[8]) == (0x28, 9)
    assert one.key[:2] == (ends[0].packed, 4000)
    pseudo = ends[0].packed + ends[1].packed + struct.pack("!II", 8 + len(payload), 17)
    udp = body[20 if ends is FOUR else 40 :]
    assert checksum.internet(pseudo + udp) == 0
    assert udp[6:8] != b"\0\0"


@pytest.mark.parametrize("ends", [FOUR, SIX])
def test_a_large_one_is_fragmented(ends: tuple[udpframes.Address, udpframes.Address]) -> None:
    frames = udpframes.frames(datagram(bytes(range(250)) * 20, ends))
    assert len(frames) == (4 if ends is FOUR else 5)
    assert all(len(frame) - udpframes.START <= 1280 for frame in frames)
    assert all(udpframes.key(frame) == [] for frame in frames)
    head = 20 if ends is FOUR else 48
    whole = b"".join(frame[udpframes.START + head :] for frame in frames)
    assert whole[8:] == bytes(range(250)) * 20


@given(st.binary(max_size=120))
def test_any_frame_is_looked_at(frame: bytes) -> None:
    udpframes.key(frame.ljust(24, b"\0"))
    for kind in (b"\x08\x00", b"\x86\xdd"):
        made = bytes(22) + kind + frame
        udpframes.key(made)
        udpframes.stays_inside(made, ["10.1.2.3"])


def test_what_lies_in_a_socket_comes_once() -> None:
    one, two = datagram(b"one"), datagram(b"two")
    held = [Packet(at, frame) for at, x in ((10, one), (11, two), (12, one)) for frame in
            udpframes.frames(x)]  # fmt: skip
    # captured and delivered before the door was closed: ``one`` is in the queue, ``two`` is not
    assert [p.at_ns for p in udpframes.without(held, [one], 20)] == [11, 12]
    assert [p.at_ns for p in udpframes.without(held, [one, one], 20)] == [11]
    # the same words, sent again behind the door
    assert [p.at_ns for p in udpframes.without(held, [one, one], 12)] == [11, 12]
    assert list(udpframes.without(held, [], 20)) == held


def test_datagrams_that_were_sent_as_one_are_known_by_their_parts() -> None:
    parts = [datagram(b"a" * 100), datagram(b"b" * 100), datagram(b"c" * 7)]
    (frame,) = udpframes.frames(datagram(b"a" * 100 + b"b" * 100 + b"c" * 7))
    frame = struct.pack("=BBHHHH", 1, 5, 0, 100, 0, 0) + frame[10:]
    assert udpframes.key(frame) == [one.key for one in parts]
    assert list(udpframes.without([Packet(1, frame)], parts, 5)) == []


@pytest.mark.parametrize(
    ("source", "inside"),
    [("127.0.0.1", True), ("10.1.2.3", True), ("10.1.2.4", False), ("::1", True),
     ("fd00::3", True), ("fd00::4", False)],
)  # fmt: skip
def test_what_a_pod_sends_to_itself_stays_inside(source: str, inside: bool) -> None:
    address = ipaddress.ip_address(source)
    (frame,) = udpframes.frames(Datagram((address, 1), (address, 2), b"x"))
    assert udpframes.stays_inside(frame, ("10.1.2.3", "fd00::3")) is inside
