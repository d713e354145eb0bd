"""Pages that stay on the source: the store has stale content in their place, which nobody gets."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit_agent.hostops.pages.pagestore import PageStore
from godwit_agent.memory import pagemap
from godwit_agent.memory.pagemap import PE_LAZY, PE_PRESENT, Entry
from godwit_agent.memory.pageset import PAGE
from godwit_api.errors import Aborted

VPID = 7
# Written last, as CRIU lists them; the restore would bring each of them itself.
WRITTEN = tuple(Entry(at * PAGE, count, PE_LAZY) for at, count in ((2, 1), (4, 2), (8, 1)))


def ranges(*pairs: tuple[int, int]) -> memoryview:
    """Of page numbers."""
    return memoryview(array("Q", [number * PAGE for pair in pairs for number in pair]).tobytes())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    """A process with pages 1 to 9 that came in an earlier round."""
    made = PageStore(tmp_path)
    made.write(VPID, PAGE, memoryview(b"o" * (9 * PAGE)))
    made.populated(VPID, 0, ranges((1, 10)))
    yield made
    made.close()


def served(directory: Path) -> list[tuple[int, int]]:
    """Page numbers that the page daemon has to serve."""
    _, entries = pagemap.decode((directory / f"pagemap-{VPID}.img").read_bytes())
    assert all(entry.flags & PE_PRESENT for entry in entries)
    lazy = pagemap.lazy_ranges(entries)
    return [(start // PAGE, end // PAGE) for start, end in lazy]


def missing(store: PageStore) -> list[tuple[int, int]]:
    marks = store.missing.marks(VPID)
    assert marks
    return [(start // PAGE, end // PAGE) for start, end in marks.ranges()]


def test_the_restore_brings_what_was_written_last(store: PageStore, tmp_path: Path) -> None:
    size, hot = store.complete(VPID, WRITTEN, b"", 100)
    assert (size, hot) == (9 * PAGE, list(WRITTEN))
    assert served(tmp_path) == [(1, 2), (3, 4), (6, 8), (9, 10)]
    assert not store.missing


def test_no_restore_brings_what_has_stayed_on_the_source(store: PageStore, tmp_path: Path) -> None:
    store.withheld(VPID, 0, ranges((2, 3), (5, 6)))  # one of them all of an entry, one a half
    _, hot = store.complete(VPID, WRITTEN, b"", 100, may_miss=True)
    assert hot == [WRITTEN[2]]
    assert missing(store) == [(2, 3), (5, 6)]
    # the daemon serves them, once they have come
    assert served(tmp_path) == [(1, 8), (9, 10)]


def test_what_has_stayed_does_not_take_the_place_of_others(store: PageStore) -> None:
    store.withheld(VPID, 0, ranges((2, 3)))
    _, hot = store.complete(VPID, WRITTEN, b"", 1, may_miss=True)
    assert hot == [WRITTEN[2]]


def test_without_a_post_copy_nothing_may_stay(store: PageStore) -> None:
    store.withheld(VPID, 0, ranges((2, 3)))
    with pytest.raises(Aborted, match="stayed on the source"):
        store.complete(VPID, WRITTEN, b"", 100)
