"""Sizes of files on network volumes are left out of CRIU's image, and nothing else is."""

from __future__ import annotations

import pytest

from godwit_agent.memory import protobuf, sizes
from godwit_agent.memory.protobuf import ImageError

MAGICS = (0x54564319, 0x56303138)
OTHER = b"\x08\x06\x10\x05\x42\x02\x08\x05"  # an eventfd


def file(mount: int | None, size: int | None, *, name: bytes = b"/net/log") -> bytes:
    owner = b"\x2a\x0a\x08\x00\x10\x00\x18\x00\x20\x00\x28\x00"
    body = protobuf.message([(1, 7), (2, 0o100002), (3, 162)]) + owner
    body += b"\x32" + protobuf.varint(len(name)) + name
    if mount is not None:
        body += protobuf.message([(7, mount << 1 if mount >= 0 else -mount * 2 - 1)])
    if size is not None:
        body += protobuf.message([(8, size)])
    body += protobuf.message([(9, 0), (10, 0o100644)])
    return protobuf.message([(1, 1), (2, 7)]) + b"\x1a" + protobuf.varint(len(body)) + body


def test_size_of_a_file_on_the_network_is_left_out() -> None:
    here, there = file(900, 1 << 40), file(901, 5, name=b"/net/" + b"x" * 200)
    image = protobuf.image(MAGICS, [OTHER, here, there, OTHER])
    found = [bytes(e) for e in protobuf.entries(sizes.leave_out(image, {901}), MAGICS)]
    assert found == [OTHER, here, file(901, None, name=b"/net/" + b"x" * 200), OTHER]


@pytest.mark.parametrize("entry", [file(901, None), file(3, 5), file(None, 5), file(-1, 5), OTHER])
def test_others_stay_as_they_are(entry: bytes) -> None:
    image = protobuf.image(MAGICS, [OTHER, entry])
    assert sizes.leave_out(image, {901, 902}) is image


def test_without_network_volumes_nothing_is_read() -> None:
    assert sizes.leave_out(b"something else", set()) == b"something else"


def test_another_image_is_an_error() -> None:
    with pytest.raises(ImageError):
        sizes.leave_out(b"something else", {1})


def test_cut_off_file_is_an_error() -> None:
    with pytest.raises(ImageError):
        sizes.leave_out(protobuf.image(MAGICS, [file(901, 5)[:20]]), {901})
