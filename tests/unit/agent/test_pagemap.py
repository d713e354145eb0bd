"""Page maps survive a round trip, and bad ones are named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit_agent.memory import pagemap
from godwit_agent.memory.pagemap import PE_LAZY, PE_PRESENT, Entry
from godwit_agent.memory.pageset import PAGE
from godwit_agent.memory.protobuf import ImageError

_ENTRIES = st.lists(
    st.builds(
        Entry,
        st.integers(0, (1 << 45) - 1).map(lambda page: page * PAGE),
        st.integers(1, 1 << 33),
        st.sampled_from([PE_PRESENT, PE_PRESENT | PE_LAZY, PE_LAZY, 1]),
    ),
    max_size=30,
)


@st.composite
def _disjoint(draw: st.DrawFn) -> list[tuple[int, int]]:
    at, ranges = draw(st.integers(0, 1 << 30)), []
    for _ in range(draw(st.integers(0, 8))):
        start = at + draw(st.integers(1, 1 << 20))
        at = start + draw(st.integers(1, 1 << 16))
        ranges.append((start * PAGE, at * PAGE))
    return ranges


@given(st.integers(1, 1 << 31), _ENTRIES)
def test_round_trip(number: int, entries: list[Entry]) -> None:
    assert pagemap.decode(pagemap.encode(number, entries)) == (number, tuple(entries))


@given(_disjoint())
def test_in_a_sparse_file_every_page_lies_at_its_address(ranges: list[tuple[int, int]]) -> None:
    offset = 0
    for entry in pagemap.for_sparse_file(ranges):
        assert entry.flags & PE_PRESENT
        assert entry.vaddr == offset
        if entry.flags & PE_LAZY:
            assert entry.pages * PAGE <= 64 << 20
        offset += entry.pages * PAGE
    lazy = [e for e in pagemap.for_sparse_file(ranges) if e.flags & PE_LAZY]
    assert pagemap.lazy_ranges(lazy) == ranges


@given(_ENTRIES, st.data())
def test_a_cut_off_image_is_an_error_or_a_shorter_one(
    entries: list[Entry], data: st.DataObject
) -> None:
    whole = pagemap.encode(7, entries)
    cut = data.draw(st.integers(0, len(whole) - 1))
    try:
        _, found = pagemap.decode(whole[:cut])
    except ImageError:
        return
    assert found == tuple(entries)[: len(found)]


@given(st.binary(max_size=200))
def test_garbage_is_an_error(data: bytes) -> None:
    magic = pagemap.encode(1, [])[:8]
    with pytest.raises(ImageError):
        pagemap.decode(b"\0" + data)
    try:
        pagemap.decode(magic + data)
    except ImageError:
        return


def test_pages_listed_twice_are_an_error() -> None:
    double = [Entry(0x1000, 4, PE_LAZY), Entry(0x3000, 1, PE_LAZY)]
    with pytest.raises(ImageError, match="twice"):
        pagemap.lazy_ranges(double)


def test_what_criu_has_written() -> None:
    """Fields as in images/pagemap.proto: 1 vaddr, 2 nr_pages before 4.2, 4 flags, 5 nr_pages."""
    image = bytes.fromhex("194356542540085602000000080109000000088080102006288002")
    assert pagemap.decode(image) == (1, (Entry(0x40000, 256, PE_PRESENT | PE_LAZY),))
    older = bytes.fromhex("194356542540085602000000080106000000088080101003")
    assert pagemap.decode(older) == (1, (Entry(0x40000, 3, PE_PRESENT),))


def _lazy(start: int, pages: int) -> Entry:
    return Entry(start * PAGE, pages, PE_LAZY)


def test_hot_pages_are_few_short_and_those_that_the_daemon_would_serve() -> None:
    entries = [_lazy(1, 2), Entry(8 * PAGE, 1, PE_PRESENT), _lazy(10, 5), _lazy(20, 1)]
    everything = [(0, 100 * PAGE)]
    assert pagemap.hot(entries, everything, 100) == [entries[0], entries[2], entries[3]]
    assert pagemap.hot(entries, everything, 3) == [entries[0], entries[3]]
    assert pagemap.hot(entries, everything, 0) == []
    assert pagemap.hot(entries, [(0, 2 * PAGE), (10 * PAGE, 15 * PAGE)], 100) == [entries[2]]


@given(_disjoint(), st.data())
def test_every_page_is_either_brought_or_served(
    ranges: list[tuple[int, int]], data: st.DataObject
) -> None:
    entries = [Entry(start, (end - start) // PAGE, PE_LAZY) for start, end in ranges]
    chosen = pagemap.hot(entries, ranges, data.draw(st.integers(0, 1 << 18)))
    left = pagemap.without(ranges, chosen)
    assert sorted([*left, *((e.vaddr, e.end) for e in chosen)]) == ranges
    mended = pagemap.present(entries, chosen)
    assert pagemap.lazy_ranges(mended) == left
    assert [e.vaddr for e in mended if e.flags == PE_PRESENT] == [e.vaddr for e in chosen]
