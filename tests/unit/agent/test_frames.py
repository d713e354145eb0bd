"""The codec of the transfer stream: round trips, limits, and hostile bytes."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit_agent.transfer import frames
from godwit_agent.transfer.frames import FrameError, Kind
from godwit_agent.transfer.wire import FrameReader, FrameWriter
from godwit_api.reasons import Reason

UID = "01234567-89ab-cdef-0123-456789abcdef"
U32 = st.integers(1, 2**32 - 1)
CONTAINER = st.integers(0, frames.MAX_CONTAINERS - 1)
VADDR = st.integers(0, 2**44).map(lambda page: page * frames.PAGE)
IMAGE_NAME = st.sampled_from(
    ["core-1.img", "pagemap-12.img", "descriptors.json", "tmpfs-dev-63.tar.gz.img", "fdinfo-2.img"]
)
HEADS = st.one_of(
    st.builds(
        frames.Hello,
        st.just(UID),
        st.integers(1, 2**62),
        st.just(0),
        st.integers(1, frames.MAX_STREAMS),
        st.just(()),
    ),
    st.builds(frames.Zero, CONTAINER, U32, VADDR, st.just(8192)),
    st.builds(frames.Packed, CONTAINER, U32, VADDR, st.just(8192)),
    st.builds(frames.File, CONTAINER, st.binary(max_size=200)),
    st.builds(frames.Packet, st.integers(0, 2**63)),
    st.builds(frames.RoundEnd, U32),
    st.builds(frames.Ack, U32),
    st.builds(frames.Failure, st.sampled_from(Reason)),
    st.builds(frames.Image, CONTAINER, st.just(0), U32, IMAGE_NAME),
)


def decode(data: bytes, sequence: int = 1) -> frames.Head:
    prefix = frames.decode_prefix(data[: frames.PREFIX.size], sequence)
    end = frames.PREFIX.size + prefix.head_length
    return frames.decode_head(prefix, data[frames.PREFIX.size : end])


@given(HEADS, st.integers(1, 2**63))
def test_what_is_encoded_is_decoded(head: frames.Head, sequence: int) -> None:
    assert decode(frames.encode(head, sequence), sequence) == head


def test_pages_carry_their_length_in_the_body() -> None:
    head = frames.Pages(1, 7, 0x7000)
    assert decode(frames.encode(head, 1, 8192)) == head


@given(st.binary(max_size=200), st.integers(0, 2))
def test_random_bytes_are_refused_or_decoded_but_never_crash(data: bytes, sequence: int) -> None:
    try:
        decode(data, sequence)
    except FrameError:
        return


@given(HEADS, st.data())
def test_a_changed_byte_never_crashes(head: frames.Head, data: st.DataObject) -> None:
    raw = bytearray(frames.encode(head, 1))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(raw))
    except FrameError:
        return


@given(HEADS, st.data())
def test_truncated_frames_are_refused(head: frames.Head, data: st.DataObject) -> None:
    raw = frames.encode(head, 1)
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(FrameError):
        decode(raw[:cut])


@pytest.mark.parametrize("got", [0, 1, 3, 2**40])
def test_repeated_and_reordered_frames_are_refused(got: int) -> None:
    with pytest.raises(FrameError, match="sequence"):
        decode(frames.encode(frames.RoundEnd(1), got), sequence=2)


@pytest.mark.parametrize(
    ("kind", "head", "body", "message"),
    [
        (0, 0, 0, "unknown kind"),
        (99, 0, 0, "unknown kind"),
        (Kind.FILE, frames.MAX_HEAD + 1, 0, "too large"),
        (Kind.PAGES, 14, frames.MAX_BODY + 4096, "too large"),
        (Kind.PACKET, 8, frames.MAX_PACKET + 1, "too large"),
        (Kind.ACK, 8, 1, "too large"),
        (Kind.ZERO, 22, 4096, "too large"),
    ],
)
def test_sizes_are_bounded_before_anything_is_read(
    kind: int, head: int, body: int, message: str
) -> None:
    with pytest.raises(FrameError, match=message):
        frames.decode_prefix(frames.PREFIX.pack(kind, 0, head, body, 1), 1)


def test_a_reserved_byte_must_be_zero() -> None:
    with pytest.raises(FrameError, match="reserved"):
        frames.decode_prefix(frames.PREFIX.pack(Kind.ACK, 1, 8, 0, 1), 1)


@pytest.mark.parametrize(
    "head",
    [
        frames.Zero(0, 1, 1, 4096),
        frames.Zero(0, 1, 4096, 1),
        frames.Zero(0, 1, 0, 0),
        frames.Zero(0, 0, 4096, 4096),
        frames.Zero(99, 1, 4096, 4096),
        frames.Zero(0, 1, 1 << 57, 4096),
        frames.Packed(0, 1, 1, 4096),
        frames.Packed(0, 1, 4096, frames.MAX_BODY + 4096),
    ],
)
def test_page_ranges_are_checked(head: frames.Head) -> None:
    with pytest.raises(FrameError):
        decode(frames.encode(head, 1))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../core-1.img",
        "a/b.img",
        ".img",
        "..img",
        "a..img",
        "core-1.img\n",
        "core 1.img",
        "-x.img",
        "a" * 120 + ".img",
        "core-1.img/",
        "c\x00.img",
    ],
)
def test_image_names_are_a_closed_pattern(name: str) -> None:
    assert not frames.is_image_name(name)
    with pytest.raises(FrameError):
        decode(frames.encode(frames.Image(0, 0, 10, name), 1))


def test_an_image_is_not_longer_than_it_says() -> None:
    with pytest.raises(FrameError, match="longer"):
        decode(frames.encode(frames.Image(0, 4, 10, "core-1.img"), 1, 7))


@pytest.mark.parametrize("body", [b"", b"a\na", b"a/b", b"\xff", b"A", b"a\n", b"x" * 64])
def test_container_names_are_checked(body: bytes) -> None:
    with pytest.raises(FrameError):
        frames.decode_hello_body(frames.Hello(UID, 1, 0, 1, ()), body)


@given(st.lists(st.binary(max_size=300_000).map(lambda b: b[: frames.MAX_BODY]), max_size=8))
def test_bytes_arrive_in_order_whatever_their_size(bodies: list[bytes]) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        writer, reader = FrameWriter(left), FrameReader(right)
        for body in bodies:
            if len(body) > 100_000:
                continue
            writer.send(frames.File(0, b"h"), body, flush=True)
            frame = reader.read()
            assert frame is not None
            assert (frame[0], bytes(frame[1])) == (frames.File(0, b"h"), body)
        left.close()
        assert reader.read() is None


def test_an_end_inside_a_frame_is_an_error() -> None:
    left, right = socket.socketpair()
    with right:
        with left:
            left.sendall(frames.encode(frames.File(0, b""), 1, 10) + b"123")
        with pytest.raises(FrameError, match="inside"):
            FrameReader(right).read()
