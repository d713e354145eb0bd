"""Mappings are found in CRIU's image whatever their numbers are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from godwit_agent.memory import mappings, pagemap, protobuf
from godwit_agent.memory.pagemap import PE_PRESENT, Entry
from godwit_agent.memory.pageset import PAGE

_NUMBER = st.integers(0, (1 << 64) - 1)
_AREA = st.tuples(_NUMBER, _NUMBER, _NUMBER, _NUMBER, st.integers(0, 7), st.integers(0, 1 << 31))


def image(areas: list[tuple[int, ...]]) -> bytes:
    """As protobuf-c writes it: numbers of the process, then its mappings, then more."""
    parts = [protobuf.message((number, 0x7FFF_0000 + number) for number in range(1, 14))]
    for area in areas:
        body = protobuf.message([*enumerate(area, 1), (7, 0x201), (8, 3)])
        parts.append(b"\x72" + protobuf.varint(len(body)) + body)
    return b"".join(parts)


@given(st.lists(_AREA, max_size=20))
def test_every_mapping_is_found(areas: list[tuple[int, ...]]) -> None:
    assert list(mappings.entries(image(areas))) == [(a[0], a[1], a[5]) for a in areas]


def test_kinds_of_memory() -> None:
    private, droppable, shared, locked = 0x22, 0x4028, 0x21, 0x2022
    areas = [
        (at * PAGE, (at + 1) * PAGE, 0, 0, 3, flags)
        for at, flags in enumerate((private, droppable, shared, locked, droppable), 1)
    ]
    content = image(areas)
    assert mappings.droppable(content) == [(2 * PAGE, 3 * PAGE), (5 * PAGE, 6 * PAGE)]
    assert mappings.eager(content) == [(4 * PAGE, 5 * PAGE)]


def test_droppable_memory_is_not_served() -> None:
    there = [(PAGE, 4 * PAGE)]
    held = [Entry(3 * PAGE, 1, PE_PRESENT)]
    assert pagemap.to_serve(held, there, [(2 * PAGE, 3 * PAGE)]) == [(PAGE, 2 * PAGE)]


def test_overlap() -> None:
    ranges = [(1, 3), (5, 9)]
    assert pagemap.overlap(ranges, []) is None
    assert pagemap.overlap(ranges, [(3, 5), (9, 10)]) is None
    assert pagemap.overlap(ranges, [(0, 1), (8, 10)]) == (5, 9)
