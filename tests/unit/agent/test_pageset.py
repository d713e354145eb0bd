"""The page set agrees with a plain set of page numbers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from godwit_agent.memory.pageset import PAGE, PageSet

# around the border between two chunks of 2**18 pages
_NUMBERS = st.integers(min_value=(1 << 18) - 40, max_value=(1 << 18) + 40)
_RANGES = st.lists(st.tuples(_NUMBERS, st.integers(0, 20)), max_size=12)


def _fill(ranges: list[tuple[int, int]]) -> tuple[PageSet, set[int]]:
    real, model = PageSet(), set[int]()
    for start, count in ranges:
        real.add(start * PAGE, (start + count) * PAGE)
        model.update(range(start, start + count))
    return real, model


@given(_RANGES, _NUMBERS, st.integers(1, 60))
def test_questions_about_a_range(ranges: list[tuple[int, int]], start: int, count: int) -> None:
    real, model = _fill(ranges)
    asked = set(range(start, start + count))
    low, high = start * PAGE, (start + count) * PAGE
    missing = sorted(asked - model)
    assert real.covers(low, high) == (not missing)
    assert real.first_missing(low, high) == (missing[0] * PAGE if missing else None)
    assert real.touches(low, high) == bool(asked & model)


@given(_RANGES)
def test_length(ranges: list[tuple[int, int]]) -> None:
    real, model = _fill(ranges)
    assert len(real) == len(model)


def test_nothing_is_covered_by_nothing() -> None:
    assert PageSet().first_missing(0x7FFC_0000_0000, 0x7FFC_0000_1000) == 0x7FFC_0000_0000
    assert PageSet().covers(0, 0)


@given(_RANGES, _NUMBERS, st.integers(1, 60))
def test_runs_are_the_pages_of_a_range(
    ranges: list[tuple[int, int]], start: int, count: int
) -> None:
    real, model = _fill(ranges)
    found = set[int]()
    for low, high in real.runs(start * PAGE, (start + count) * PAGE):
        found.update(range(low // PAGE, high // PAGE))
    assert found == model & set(range(start, start + count))


@settings(deadline=None)  # half a megabyte each
@given(_RANGES, _RANGES)
def test_sets_with_sets(ranges: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    real, model = _fill(ranges)
    other, other_model = _fill(others)
    bounds = [(start * PAGE, (start + count) * PAGE) for start, count in others]
    assert _members(real.within(bounds)) == model & other_model
    real.unite(other)
    assert _members(real) == model | other_model


@settings(deadline=None)
@given(_RANGES)
def test_many_at_once(ranges: list[tuple[int, int]]) -> None:
    real = PageSet()
    real.add_all([at * PAGE for start, count in ranges for at in (start, start + count)])
    assert _members(real) == _fill(ranges)[1]


def _members(pages: PageSet) -> set[int]:
    runs = pages.runs(0, (1 << 19) * PAGE)
    found = {number for a, b in runs for number in range(a // PAGE, b // PAGE)}
    assert len(pages) == len(found)
    return found
