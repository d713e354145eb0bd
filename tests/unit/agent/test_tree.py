"""Process trees as CRIU writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit_agent.memory import protobuf, tree
from godwit_agent.memory.protobuf import ImageError
from godwit_agent.memory.tree import Process

_NUMBER = st.integers(0, 1 << 22)
_PROCESSES = st.lists(
    st.builds(Process, _NUMBER, _NUMBER, _NUMBER, _NUMBER, st.lists(_NUMBER).map(tuple))
)


@given(_PROCESSES)
def test_round_trip(processes: list[Process]) -> None:
    assert tree.decode(tree.encode(processes)) == tuple(processes)


def test_what_criu_has_written() -> None:
    """One process with two threads: magic, size, fields 1 to 5 (CRIU 4.2.1)."""
    image = bytes.fromhex("19435654303027500c000000080110001801200128012806")
    assert tree.decode(image) == (Process(1, 0, 1, 1, (1, 6)),)
    assert tree.encode(tree.decode(image)) == image


def test_inventory_has_what_the_daemon_asks_for() -> None:
    (entry,) = protobuf.entries(tree.inventory(), (tree.INVENTORY_MAGIC,))
    assert dict(protobuf.fields(entry)) == {1: 2, 2: 1}


@pytest.mark.parametrize("data", [b"", b"\x19CVT", bytes(12), tree.inventory()])
def test_other_images_are_errors(data: bytes) -> None:
    with pytest.raises(ImageError):
        tree.decode(data)


@given(st.binary(max_size=64))
def test_fields_of_garbage_end_or_raise(data: bytes) -> None:
    try:
        list(protobuf.fields(memoryview(data)))
    except ImageError:
        return
